"""Boxes and points for users' own pictures and volumes: from the command line or a CSV file to a Case.

Coordinates are pixels (voxel indices i j k) of the original file, zero-based, inclusive.
"""
import csv
import os
from functools import partial
from pathlib import Path

import numpy as np

from ..files import add_option
from ..inference.boxes import check_boxes, check_points
from ..inference.compose import Composition
from ..inference.names import composed
from ..inference.npz import Case
from ..inference.predictor import Predictor
from .pictures import WINDOWS, is_picture, load_picture, parse_window
from .volumes import AXES, list_images, load_volume

# The headings of a table's columns behind the file's name, without "_" and capitals. Others may mean another order.
HEADINGS = ("x0 y0 x1 y1", "x1 y1 x2 y2", "xmin ymin xmax ymax", "i0 j0 k0 i1 j1 k1")


def add_prompt_options(parser) -> None:
    """Add the options of infer.py for pictures and volumes to an argparse parser."""
    group = parser.add_argument_group("your own pictures (PNG, JPEG, TIFF, BMP) and volumes (NIfTI, DICOM, NRRD, MHA)",
                                      "coordinates are pixels or voxel indices of the file, counted from 0, inclusive")
    add = partial(add_option, group)
    add("--box", float, "x0 y0 x1 y1, or i0 j0 k0 i1 j1 k1 of a volume; repeat for more objects", nargs="+",
        action="append", metavar="N")
    add("--boxes", Path, "lines of: file, x0, y0, x1, y1 (or six numbers)", metavar="CSV")
    point = dict(nargs=2, action="append", metavar=("X", "Y"))
    add("--point", float, "a point on the object", **point)
    add("--not", float, "a point beside the object", **point, dest="background")
    add("--pick", False, "draw the boxes in a window, masks appear at once")
    add("--z", int, "slices that boxes of four numbers span in a volume, indices along the slicing axis", nargs=2,
        metavar=("FIRST", "LAST"))
    add("--slice", int, "the slice they were drawn on (default: the middle one)", metavar="K")
    parser.set_defaults(box=[], point=[], background=[])
    add_reading_options(group)


def add_reading_options(group) -> None:
    """Add the options that say how files are read, which infer.py and convert share."""
    add = partial(add_option, group)
    add("--axis", "axial", "direction of a volume's slices", choices=AXES)
    add("--series", int, "which of the series in a DICOM folder (without it they are listed)", metavar="N")
    add("--window", str, f"intensities that become 0-255: two numbers, or {', '.join(WINDOWS)} "
        "(default: 0.5 and 99.5 percentiles; 8 bits stay as they are)", nargs="+", metavar=("LEVEL", "WIDTH"))


def check_prompts(arguments) -> None:
    """Refuse options that contradict each other (ValueError), turn --window into level and width, and add `own_files`.

    That says whether pictures and volumes are meant, not NPZ cases.
    """
    boxes, points = arguments.box, arguments.point + arguments.background
    arguments.own_files = bool(arguments.pick or boxes or points or arguments.boxes)
    lengths = [len(box) for box in boxes if len(box) not in (4, 6)]
    refused = {
        f"--box: expected 4 numbers, or 6 for a volume, found {lengths}": lengths,
        "--boxes: expected no --box, --point or --not beside it, found one": arguments.boxes and (boxes or points),
        f"--point, --not: expected one --box at most beside them, found {len(boxes)}": points and len(boxes) > 1,
        "--not: expected a --point or a --box beside it, found none": points and not arguments.point and not boxes,
        "--pick: expected no other boxes, points or slices beside it, found some":
            arguments.pick and (boxes or points or arguments.boxes or arguments.z),
        f"--z: expected a --box of 4 numbers beside it, or --boxes, found {boxes}":
            arguments.z and not arguments.boxes and 4 not in map(len, boxes),
        f"--slice: expected one of those of --z beside it, found {arguments.slice} and {arguments.z}":
            arguments.slice is not None and not (arguments.z and arguments.z[0] <= arguments.slice <= arguments.z[1]),
        "--axis, --series, --window: expected boxes of your own beside them, found none": not arguments.own_files and (
            arguments.axis != "axial" or arguments.series is not None or arguments.window),
    }
    for line, wrong in refused.items():
        if wrong:
            raise ValueError(line)
    arguments.window = parse_window(arguments.window)


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """Read a CSV file with lines `file, x0, y0, x1, y1` or `file, i0, j0, k0, i1, j1, k1` as boxes by file name (NFC).

    The first line may be a heading, any word and then one of HEADINGS. ValueError for a line that is neither, or no
    line at all, OSError if the file cannot be read.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    delimiter = ";" if lines and ";" in lines[0] else ","
    table = {}
    for number, row in enumerate(csv.reader(lines, delimiter=delimiter), 1):
        row = [cell.strip() for cell in row]
        if not any(row) or number == 1 and " ".join(row[1:]).lower().replace("_", "") in HEADINGS:
            continue
        name, *cells = row
        try:
            box = [float(cell) for cell in cells]
        except ValueError:
            box = []
        if not name or len(box) not in (4, 6):
            raise ValueError(f"{path.name}: line {number}: expected a file and x0 y0 x1 y1 or i0 j0 k0 i1 j1 k1, "
                             f"found {delimiter.join(row)}")
        table.setdefault(composed(name.replace("\\", "/")), []).append(box)
    if not table:
        raise ValueError(f"{path.name}: file: expected lines of file and box, found none")
    return table


def list_user_files(arguments) -> tuple[dict[Path, list[list[float]]], list[str]]:
    """Find the files of --input with their boxes, from --boxes or --box; and a line for each name that no file bears.

    In the CSV file a name is a path below the input folder; a bare name that is no such path means the files of that
    name in subfolders. ValueError where there is no picture or volume, or the CSV file names none of them.
    """
    source = Path(os.path.abspath(arguments.input))                            # "." and ".." are no names
    files = list_images(source)
    if not arguments.boxes:
        return dict.fromkeys(files, arguments.box), []
    table, folder = read_boxes(arguments.boxes), source.parent if source in files else source
    names = {path: composed(path.relative_to(folder).as_posix()) for path in files}
    chosen, there, found = {}, set(names.values()), set()
    for path, name in names.items():
        bare = composed(path.name)
        key = name if name in table or bare in there else bare
        if key in table:
            chosen[path] = table[key]
            found.add(key)
    if not chosen:
        raise ValueError(f"{source}: expected the files that {arguments.boxes.name} names, found none of them")
    lines = [f"{name}: file: expected in {source}, as {arguments.boxes.name} names it, found none"
             for name in table if name not in found and folder == source]
    return chosen, lines


def read_user_case(path: Path, boxes: list[list[float]], arguments) -> Case:
    """Read a picture or volume, and check its prompts; boxes become those of the slices. ValueError of one line."""
    points = arguments.point + arguments.background
    if is_picture(path):
        if arguments.z:
            raise ValueError("--z: expected a volume, found a picture")
        image, intensity = load_picture(path, arguments.window)
        case = Case(path, image.shape[:2], pixels=image, intensity=intensity)
        case.boxes, case.warnings = check_boxes(boxes, case.shape, path.name)
        if points:
            labels = [1] * len(arguments.point) + [0] * len(arguments.background)
            case.points, case.point_labels = check_points(points, labels, case.shape)
            if not boxes:
                case.warnings.append(
                    f"{path.name}: points without a box: weights trained on boxes alone, such as the default ones and "
                    "LiteMedSAM's, answer them badly; see the overlay, or give a --box")
        return case
    if points:
        raise ValueError("--point, --not: expected a picture, found a volume, which needs a box")
    if arguments.z is None and any(len(box) == 4 for box in boxes):
        raise ValueError("boxes: expected 6 numbers i0 j0 k0 i1 j1 k1 in a volume, or --z with boxes of 4, found 4")
    volume, grid, intensity = load_volume(path, arguments.axis, arguments.window, arguments.series)
    case = Case(path, volume.shape[:3], pixels=volume, spacing=grid.spacing, intensity=intensity, grid=grid)
    boxes = [box if len(box) == 6 else np.insert(np.reshape(box, (2, 2)), grid.order[0], arguments.z, axis=1).ravel()
             for box in boxes]
    checked, case.warnings = check_boxes(boxes, grid.shape[::-1], path.name)
    case.boxes = grid.boxes_to_slices(checked)
    if arguments.slice is not None:
        drawn = grid.boxes_to_slices([arguments.slice] * 6)[0, 2]
        case.drawn_slice = np.full(len(case.boxes), drawn, int)
    return case


def segment_points(model, case: Case) -> Composition:
    """Segment the one object that a case's points describe, and its box if it has one."""
    predictor = Predictor(model)
    predictor.set_image(case.pixels)
    box = next(iter(case.boxes), None)
    (mask,), *_ = predictor.predict(case.points, case.point_labels, box, multimask_output=False)
    found = Composition(case.shape, 1)
    found.claim(0, (), mask, mask)
    return found
