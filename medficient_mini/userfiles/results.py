"""What infer.py leaves for each case: a picture, the masks with what made them, and a row of efficiency.csv."""
import csv
from pathlib import Path

import cv2
import numpy as np

from ..files import first_line
from ..inference.compose import Composition, lost_objects
from ..inference.npz import Case, write_segs
from ..show.draw import contact_sheet, overlay, save_png
from .pictures import is_picture, save_label_picture, stem_of
from .volumes import META, NIFTI, save_labels

FIELDS = "boxes points point_labels intensity spacing".split()
POINT_COLOURS = (230, 0, 0), (0, 200, 0)         # beside the object, on it


def mask_file(name, arguments) -> Path:
    """Return where the masks of a user's own file of that name go, such as STEM_mask.png."""
    lower = str(name).lower()
    of_volume = "nii.gz" if lower.endswith(NIFTI) else "mha" if lower.endswith(META) else "nrrd"
    return arguments.output / f"{stem_of(name)}_mask.{'png' if is_picture(name) else of_volume}"


def show(case: Case, labels: np.ndarray, arguments) -> None:
    """Write the picture of a case, masks, boxes and points: of an NPZ case only with --overlay."""
    if arguments.own_files or arguments.overlay:
        draw = contact_sheet if case.is_3d else overlay
        picture = draw(case.pixels, labels, case.boxes)
        if case.points is not None:
            centres = ((case.points + 0.5) * len(picture) / len(case.pixels)).astype(int).tolist()
            for centre, label in zip(centres, case.point_labels):
                cv2.circle(picture, centre, 6, POINT_COLOURS[label], -1)
        name = stem_of(case.name) + "_overlay" * arguments.own_files
        save_png((arguments.overlay or arguments.output) / f"{name}.png", picture)


def write(case: Case, found: Composition, arguments, origin: str, seconds: float):
    """Write the masks of a case, its picture and its row of efficiency.csv.

    STEM.npz holds `segs`; of a user's own file also FIELDS, after STEM_mask: where both are, the case is finished. With
    --separate, where objects overlap, it also holds `masks` bool (N, H, W) of an image, `bits` of a volume (see
    `Composition`). Returned are a line for each lost object, and one if picture or row could not be written.
    """
    fields, lost, fault = {"made_with": origin}, lost_objects(found), []
    if arguments.own_files:
        fields |= {name: getattr(case, name) for name in FIELDS if getattr(case, name) is not None}
        if case.is_3d:
            save_labels(mask_file(case.name, arguments), found.labels, case.grid)
        else:
            save_label_picture(mask_file(case.name, arguments), found.labels)
    if arguments.separate and found.mask_sizes.sum() > np.count_nonzero(found.labels):
        fields |= {"bits": found.bits} if case.is_3d else {"masks": found.masks()}
    write_segs(arguments.output / f"{stem_of(case.name)}.npz", found.labels, **fields)
    table = arguments.output / "efficiency.csv"
    heading = [("case", "seconds", "lost")] * (not table.exists())      # twice at worst: readers skip it
    try:
        try:
            show(case, found.labels, arguments)
        finally:                                         # neither costs the other
            with open(table, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows([*heading, (case.name, f"{seconds:.3f}", "; ".join(lost))])
    except Exception as error:                           # the masks are there
        fault = [f"overlay, efficiency.csv: {first_line(error)}"]
    return lost, fault
