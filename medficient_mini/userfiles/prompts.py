"""Users' own pictures and NIfTI volumes with boxes and points from the command line: read as a Case, results written.

Coordinates are pixels (voxel indices i j k) of the original file, zero-based, inclusive.
"""
import csv
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from ..inference.npz import Case, check_boxes, modality_of, write_segs
from .formats import (AXES, PICTURES, VOLUMES, WINDOWS, is_nifti, list_files, load_nifti, load_picture, parse_window,
                      save_label_nifti, save_label_picture, stem_of)
from ..inference.predictor import Predictor


def add_prompt_options(parser) -> None:
    """The options of infer.py for pictures and NIfTI files."""
    group = parser.add_argument_group("your own pictures (PNG, JPEG, TIFF, BMP) and NIfTI volumes",
                                      "coordinates are pixels or voxel indices of the file, counted from 0, inclusive")
    group.add_argument("--box", nargs="+", type=float, action="append", metavar="N",
                       help="x0 y0 x1 y1, or i0 j0 k0 i1 j1 k1 of a NIfTI volume; repeat for more objects")
    group.add_argument("--boxes", type=Path, metavar="CSV", help="lines of: file, x0, y0, x1, y1 (or six numbers)")
    group.add_argument("--point", nargs=2, type=float, action="append", metavar=("X", "Y"), help="a point on the object")
    group.add_argument("--not", nargs=2, type=float, action="append", metavar=("X", "Y"), dest="background",
                       help="a point beside the object")
    group.add_argument("--pick", action="store_true", help="draw the boxes in a window, masks appear at once")
    group.add_argument("--z", nargs=2, type=int, metavar=("FIRST", "LAST"),
                       help="slices that boxes of four numbers span in a volume, indices along the slicing axis")
    group.add_argument("--slice", type=int, metavar="K", help="the slice those boxes were drawn on (default: the middle)")
    group.add_argument("--axis", choices=AXES, default="axial", help="direction of the slices (default: axial)")
    group.add_argument("--window", nargs="+", metavar=("LEVEL", "WIDTH"),
                       help=f"intensities that become 0-255: two numbers, or {', '.join(WINDOWS)} "
                            "(default: 0.5 and 99.5 percentiles; 8 bits stay as they are)")


@dataclass
class Prompts:
    """What the options above say. boxes: for every file. table: boxes by file name or path below the input folder."""
    boxes: list[list[float]] = field(default_factory=list)
    table: dict[str, list[list[float]]] = field(default_factory=dict)
    points: list[list[float]] = field(default_factory=list)
    background: list[list[float]] = field(default_factory=list)
    z: tuple[int, int] | None = None
    slice: int | None = None
    axis: str = "axial"
    window: tuple[float, float] | None = None
    pick: bool = False

    @property
    def at_hand(self) -> bool:
        """Whether the prompts are typed or drawn now, so that earlier results are of others."""
        return bool(self.pick or self.boxes or self.points or self.background)

    @property
    def given(self) -> bool:
        return self.at_hand or bool(self.table)


def prompts_of(arguments) -> Prompts:
    """Prompts of parsed arguments. ValueError for those that contradict each other or a bad CSV file."""
    boxes, points, background = arguments.box or [], arguments.point or [], arguments.background or []
    for box in boxes:
        if len(box) not in (4, 6):
            raise ValueError(f"--box: expected 4 numbers, or 6 for a volume, found {len(box)}")
    if boxes and arguments.boxes:
        raise ValueError("--boxes: expected no --box beside it")
    if background and not points and len(boxes) != 1:
        raise ValueError("--not: expected a --point or one --box beside it")
    if points and len(boxes) > 1:
        raise ValueError(f"--point: expected at most one --box beside it (points belong to one object), found {len(boxes)}")
    if arguments.boxes and (points or background):
        raise ValueError("--boxes: expected no --point or --not beside it")
    if arguments.pick and (boxes or points or background or arguments.boxes or arguments.z):
        raise ValueError("--pick: expected no other boxes, points or slices beside it")
    if arguments.slice is not None and arguments.z is None:
        raise ValueError("--slice: expected --z beside it")
    table = read_boxes(arguments.boxes) if arguments.boxes else {}
    return Prompts(boxes, table, points, background, tuple(arguments.z) if arguments.z else None, arguments.slice,
                   arguments.axis, parse_window(arguments.window), arguments.pick)


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """CSV lines "file, x0, y0, x1, y1" or "file, i0, j0, k0, i1, j1, k1", a heading allowed -> boxes by file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: file: expected a readable CSV file, found {error}") from None
    lines, table = text.splitlines(), {}
    delimiter = ";" if lines and ";" in lines[0] else ","
    for number, row in enumerate(csv.reader(lines, delimiter=delimiter), 1):
        row = [cell.strip() for cell in row]
        if not any(row):
            continue
        try:
            box = [float(cell) for cell in row[1:]]
        except ValueError:
            if number == 1 and not any(is_number(cell) for cell in row[1:]):      # a heading
                continue
            box = []
        if len(box) not in (4, 6) or not row[0]:
            raise ValueError(f"{path.name}: line {number}: expected a file and 4 or 6 numbers, found {delimiter.join(row)}")
        table.setdefault(row[0].replace("\\", "/"), []).append(box)
    if not table:
        raise ValueError(f"{path.name}: expected lines of file and box, found none")
    return table


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def list_user_files(path, prompts: Prompts) -> list[Path]:
    """The pictures and NIfTI files of a folder, or one; only those that the table names, where there is one.

    ValueError for names in the table that are not there.
    """
    root, files = Path(path), list_files(path, PICTURES + VOLUMES)
    if not prompts.table:
        return files
    wanted = {name: [f for f in files if name in _names(f, root, prompts)] for name in prompts.table}
    absent = [name for name, found in wanted.items() if not found]
    if absent:
        raise ValueError(f"{path}: expected the files that --boxes names, found no {', '.join(absent[:3])}"
                         + (f" and {len(absent) - 3} more" if len(absent) > 3 else ""))
    return sorted({f for found in wanted.values() for f in found})


def _names(path: Path, root: Path, prompts: Prompts) -> set[str]:
    """Names of the table that mean this file: its path below the folder, or its bare name where no file has that path."""
    if not root.is_dir():
        return {path.name}
    below = path.relative_to(root).as_posix()
    return {below} if below in prompts.table or (root / path.name).is_file() else {below, path.name}


def read_user_case(path: Path, root, prompts: Prompts) -> Case:
    """A picture or NIfTI file with its prompts, checked as a challenge case is. ValueError of one line otherwise.

    In the Case, boxes lie on the slices as they will be shown; points come with at most one box and only in 2D.
    Without any prompt there are no boxes (`--pick` draws them).
    """
    boxes = [box for name in sorted(_names(path, Path(root), prompts)) for box in prompts.table.get(name, [])] or prompts.boxes
    case = Case(path.name, modality_of(path))
    try:
        (_read_volume if is_nifti(path) else _read_picture)(case, path, boxes, prompts)
    except ValueError as error:
        line = str(error)
        raise ValueError(line if line.startswith(path.name) else f"{path.name}: {line}") from None
    return case


def _read_picture(case: Case, path: Path, boxes: list[list[float]], prompts: Prompts) -> None:
    if prompts.z:
        raise ValueError("--z: expected a NIfTI volume, found a picture")
    if any(len(box) != 4 for box in boxes):
        raise ValueError("boxes: expected 4 numbers x0 y0 x1 y1 in a picture, found 6")
    case.image, case.intensity = load_picture(path, prompts.window)
    case.boxes, case.warnings = check_boxes(np.array(boxes, np.float64).reshape(-1, 4), case.shape, path.name)
    if prompts.points or prompts.background:
        case.points = np.array(prompts.points + prompts.background, np.float64)
        case.point_labels = np.array([1] * len(prompts.points) + [0] * len(prompts.background))
        outside = ~((case.points >= 0) & (case.points < case.shape[::-1])).all(1)          # NaN is outside too
        if outside.any():
            x, y = case.points[outside.argmax()]
            raise ValueError(f"points: expected them inside the {case.shape[1]}×{case.shape[0]} image, found {x:g} {y:g}")


def _read_volume(case: Case, path: Path, boxes: list[list[float]], prompts: Prompts) -> None:
    if prompts.points or prompts.background:
        raise ValueError("--point, --not: expected a picture, found a volume, which needs a box")
    case.volume, case.grid, case.intensity = load_nifti(path, prompts.axis, prompts.window)
    case.spacing = case.grid.spacing
    sliced = case.grid.order[0]                                                # file axis that the slices lie along
    if prompts.z is None and any(len(box) == 4 for box in boxes):
        raise ValueError("boxes: expected 6 numbers i0 j0 k0 i1 j1 k1 in a volume, or --z with boxes of 4, found 4")
    in_file = np.array([box if len(box) == 6 else _insert(box, sliced, prompts.z) for box in boxes], np.float64)
    checked, case.warnings = check_boxes(in_file.reshape(-1, 6), case.grid.shape[::-1], path.name)
    case.boxes = case.grid.boxes_to_slices(checked)
    case.boxes[:, 2], case.boxes[:, 5] = np.floor(case.boxes[:, 2]), np.ceil(case.boxes[:, 5])   # slices are whole
    if prompts.slice is not None:
        last = case.volume.shape[0] - 1
        start = last - prompts.slice if case.grid.flip[0] else prompts.slice
        if not ((case.boxes[:, 2] <= start) & (start <= case.boxes[:, 5])).all():
            raise ValueError(f"--slice: expected a slice within the boxes' range, found {prompts.slice}")
        case.start = np.full(len(case.boxes), start)


def _insert(box: list[float], axis: int, z: tuple[int, int]) -> list[float]:
    """A box of four numbers along the two other file axes, in their order, with the range z put in at `axis`."""
    low, high = box[:2], box[2:]
    return low[:axis] + [z[0]] + low[axis:] + high[:axis] + [z[1]] + high[axis:]


def segment_points(model, case: Case) -> np.ndarray:
    """Labels uint8 (H, W) of the one object that the case's points, and its box if there is one, describe."""
    predictor = Predictor(model)
    predictor.set_image(case.image)
    masks, _, _ = predictor.predict(box=case.boxes if len(case.boxes) else None, point_coords=case.points,
                                    point_labels=case.point_labels)
    return masks[0].astype(np.uint8)


def draw_points(picture: np.ndarray, case: Case) -> None:
    """The case's points into its overlay (H', W', 3): green on the object, red beside it."""
    scale = picture.shape[0] / case.shape[0]
    for point, label in zip(case.points, case.point_labels):
        x, y = (int(v) for v in (point + 0.5) * scale)
        cv2.circle(picture, (x, y), 5, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(picture, (x, y), 4, (0, 200, 0) if label else (230, 0, 0), -1, cv2.LINE_AA)


def write_user_case(folder: Path, case: Case, segs: np.ndarray) -> None:
    """STEM_mask.png (grey, the numbers are the labels) or STEM_mask.nii.gz on the file's grid, then STEM.npz.

    The NPZ holds `segs`, `boxes` or `points` as they lie on those slices, `intensity`, and `spacing` of a volume.
    """
    stem = stem_of(case.name)
    if case.grid is not None:
        save_label_nifti(folder / f"{stem}_mask.nii.gz", segs, case.grid)
    else:
        save_label_picture(folder / f"{stem}_mask.png", segs)
    optional = {"points": case.points, "point_labels": case.point_labels, "spacing": case.spacing}
    write_segs(folder / f"{stem}.npz", segs, boxes=case.boxes, intensity=case.intensity,
               **{name: value for name, value in optional.items() if value is not None})
