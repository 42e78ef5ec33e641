"""The few lines that every room shares: writing a file whole or not at all, and the one line of an error."""
import os
import uuid
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path):
    """Give a temporary Path beside `path` that becomes it when the block ends well and vanishes when it does not.

    The folder is made if need be. The temporary name starts with a dot, which hides it from `list_cases`, and keeps
    the suffix, since some writers choose the format by it. It holds nothing else of the name, so that a name of the
    greatest length can be written, and differs from call to call, so that threads may write the same path: the one
    that ends last stays.

    Raises:
        OSError: nothing can be written there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix[-64:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error) -> str:
    """Return the first line of an error's message, its type where it has none: what a user is shown."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
