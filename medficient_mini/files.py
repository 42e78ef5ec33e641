"""The few lines that every room shares: finding files, writing one whole or not at all, a script's options and end."""
import argparse
import os
import sys
import uuid
from contextlib import contextmanager
from functools import partial
from pathlib import Path


def list_files(path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with these endings in a folder and its subfolders, sorted, or the one file itself.

    Linked folders are followed, each folder once. Hidden files, which are half-written outputs, and what is no regular
    file are left out; a subfolder that may not be read costs a line on stderr. ValueError where nothing is left.
    """
    path, found, seen = Path(path), [], set()
    if path.is_file() and path.name.lower().endswith(suffixes):
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder or a file that ends in {', '.join(suffixes)}, "
                         f"found {'another file' if path.exists() else 'nothing of that name'}")

    def pass_over(error):
        print(f"{error.filename}: expected a folder to read, found: {error.strerror}", file=sys.stderr)

    for folder, subfolders, names in os.walk(path, onerror=pass_over, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:                                 # a link back to where the walk has been
            subfolders.clear()
        else:
            seen.add(real)
            subfolders.sort()
            found += [Path(folder, name) for name in names if name.lower().endswith(suffixes) and name[0] != "."]
    # A dead link, and what may not be looked at, get a line when they are read.
    found = sorted(file for file in found if os.path.isfile(file) or not os.path.exists(file))
    if not found:
        raise ValueError(f"{path}: expected files that end in {', '.join(suffixes)} in this folder, found none")
    return found


@contextmanager
def whole_file(path):
    """Give a temporary Path beside `path` that becomes it when the block ends well and vanishes when it does not.

    The folder is made if need be; OSError where that fails. The temporary name starts with a dot, which hides it from
    `list_files`, and ends as `path` does, since some writers choose the format by it. It is never longer than `path`'s
    may be, and new in each call: threads may write the same path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.name[-8:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error) -> str:
    """Return the first line of an error's message, its type where it has none: what a user is shown."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A process of torch's that reads samples sends a traceback along, which ends with the error itself.
    return lines[-1].removeprefix("ValueError: ") if lines[0].startswith("Caught ") else lines[0]


def complain(error) -> None:
    """Write an error that ends a script on stderr, in one line; one that is not meant for users with its type."""
    kind = "" if isinstance(error, (ValueError, OSError, RuntimeError, MemoryError)) else f"{type(error).__name__}: "
    print(kind + first_line(error), file=sys.stderr)


def show_any_name() -> None:
    """Let stdout and stderr write what their encoding lacks, as in names that are no UTF-8, as \\u… instead."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def option_parser(doc: str, **more):
    """Return an argparse parser that explains a script by its docstring `doc`, and `add_option` for it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
    return parser, partial(add_option, parser)


def add_option(group, names, default, help, **more):
    """Add an option, "-s --long", to a parser or group: a switch where its default is a bool, of a type without one."""
    if isinstance(default, bool):
        more["action"] = "store_false" if default else "store_true"
    elif isinstance(default, type):
        more["type"] = default
    else:
        more |= {"type": type(default), "default": default}
        help += " (default: %(default)s)"
    group.add_argument(*names.split(), help=help, **more)


def exit_status(work, stopped: str = "stopped") -> int:
    """Return a script's exit status: 1 where work() returns a number of failures or raises an error, 130 after Ctrl-C.

    The error costs one line on stderr; `stopped` is the line after Ctrl-C.
    """
    show_any_name()
    try:
        return 1 if work() else 0
    except Exception as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def stray_kind(path) -> str:
    """Tell what a file is that never arrived: empty, git-lfs's pointer to it, or text; "" for any other."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(64).strip()
    except (OSError, UnicodeDecodeError):
        return ""
    if start.startswith("version https://git-lfs"):
        return "the pointer that git-lfs keeps in the file's place: fetch it with `git lfs pull`"
    if start and "".join(start.split()).isprintable():
        return f"a web page or text ({first_line(start)})"
    return "" if start else "an empty file"
