"""What infer.py leaves for each case: a picture, the masks with what made them, and a row of efficiency.csv."""
import csv
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np

from ..files import first_line
from ..inference.checkpoint import resolve
from ..inference.compose import Composition, lost_objects
from ..inference.npz import Case, write_segs
from ..show.draw import contact_sheet, overlay, save_png
from .pictures import is_picture, save_label_picture, stem_of
from .volumes import META, NIFTI, parts_of, save_labels

# The options that decide a result, besides the files of weights.
DECISIVE = ("precision", "propagation", "overlap", "separate", "z_exclusive", "point", "background", "pick", "z",
            "slice", "axis", "window", "series")
FIELDS = ("boxes", "points", "point_labels", "intensity", "spacing")
POINT_COLOURS = (230, 0, 0), (0, 200, 0)        # beside the object, on it


def digest(path) -> str:
    """Return a short hash of a file's content, or a DICOM folder's, which stays when it is copied or touched."""
    found = hashlib.sha256()
    for part in parts_of(Path(path)):
        with open(part, "rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:16]


def what_decides(arguments) -> dict:
    """Return what decides all results of a run, by name: options, and the content of the files of weights."""
    weights, decoder = arguments.weights, arguments.decoder_weights
    return {"weights": [digest(resolve(weights)), decoder and digest(resolve(decoder))],
            **{name: getattr(arguments, name) for name in DECISIVE}}


def made_with(path: Path, boxes, decisive: dict) -> str:
    """Describe what decides the result of one input: its content, boxes given beside it, and `decisive`; JSON."""
    return json.dumps({"input": digest(path), **decisive, "boxes": boxes})


def mask_file(name, arguments) -> Path:
    """Return where the masks of a user's own file of that name go, such as STEM_mask.png."""
    lower = str(name).lower()
    of_volume = "nii.gz" if lower.endswith(NIFTI) else "mha" if lower.endswith(META) else "nrrd"
    return arguments.output / f"{stem_of(name)}_mask.{'png' if is_picture(name) else of_volume}"


def what_changed(origin: str, result: Path, mask: Path | None = None) -> str:
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


def show(case: Case, labels: np.ndarray, arguments) -> None:
    """Write the picture of a case, masks, boxes and points: of an NPZ case only with --overlay."""
    if not (arguments.own_files or arguments.overlay):
        return
    draw = contact_sheet if case.is_3d else overlay
    picture = draw(case.volume if case.is_3d else case.image, labels, case.boxes)
    if case.points is not None:
        scale = picture.shape[0] / case.shape[0]
        for point, label in zip(case.points, case.point_labels):
            centre = ((point + 0.5) * scale).astype(int).tolist()
            cv2.circle(picture, centre, 4, POINT_COLOURS[label], -1, cv2.LINE_AA)
    name = stem_of(case.name) + "_overlay" * arguments.own_files
    save_png((arguments.overlay or arguments.output) / f"{name}.png", picture)


def write(case: Case, found: Composition, arguments, origin: str, seconds: float):
    """Write the masks of a case, its picture and its row of efficiency.csv.

    STEM.npz holds `segs`; of a user's own file also FIELDS, after STEM_mask: where both are, the case is finished. With
    --separate, where objects overlap, it also holds `masks` bool (N, H, W) of an image, `bits` of a volume (see
    `Composition`). Returned is a line for each lost object, and one for picture and row each, if not written.
    """
    fields, lost, faults = {"made_with": origin}, lost_objects(found), []
    if arguments.own_files:
        fields |= {name: getattr(case, name) for name in FIELDS if getattr(case, name) is not None}
        if case.is_3d:
            save_labels(mask_file(case.name, arguments), found.labels, case.grid)
        else:
            save_label_picture(mask_file(case.name, arguments), found.labels)
    if arguments.separate and found.mask_sizes.sum() > np.count_nonzero(found.labels):
        fields |= {"bits": found.bits} if case.is_3d else {"masks": found.masks()}
    write_segs(arguments.output / f"{stem_of(case.name)}.npz", found.labels, **fields)
    try:
        show(case, found.labels, arguments)
    except Exception as error:
        faults.append(f"overlay: {first_line(error)}")
    table = arguments.output / "efficiency.csv"
    heading = [] if table.exists() else [("case", "seconds", "lost")]    # twice at worst: readers skip it
    try:
        with open(table, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([*heading, (case.name, f"{seconds:.3f}", "; ".join(lost))])
    except OSError as error:
        faults.append(f"efficiency.csv: {first_line(error)}")
    return lost, faults
