"""Writing a file whole or not at all: the one place where that is done."""
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path):
    """A temporary Path beside `path` that becomes it when the block ends well and vanishes when it does not.

    The folder is made if need be; the suffix is kept, since some writers choose the format by it; the leading dot
    hides it from `list_cases`. OSError where nothing can be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
