"""What made a result: by it, infer.py knows which cases are finished and which have to be done again."""
import hashlib
import json
from pathlib import Path

import numpy as np


def digest(files: list[Path]) -> str:
    """Return a short hash of the content of an input's files, which stays when they are copied or touched."""
    found = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:16]


def made_with(files: list[Path], boxes, decisive: dict) -> str:
    """Describe what decides a result: the content of its input, boxes given beside it, and `decisive`; JSON."""
    return json.dumps({"input": digest(files), **decisive, "boxes": boxes})


def what_changed(origin: str, result: Path, mask: Path | None) -> str:
    """Say what differs between what would make a result now (`made_with`) and what made it: "" where nothing does."""
    if not result.exists():
        return "new"
    if mask and not mask.exists():
        return f"{mask.name} is gone"
    try:
        with np.load(result, allow_pickle=False) as file:
            before = json.loads(str(file["made_with"]))
        return ", ".join(f"other {name}" for name, value in json.loads(origin).items() if value != before.get(name))
    except Exception:                                    # whatever is wrong with the file: it is made again
        return "the result does not say what made it"
