"""Masks without a network, to measure networks against: each box filled, or the ellipse (ellipsoid) in it.

    python -m medficient_mini.evaluation.baselines -i cases -o out_box --shape box
    python -m medficient_mini.evaluation.baselines -i cases -o out_ellipse --shape ellipse
"""
import argparse
import sys
from pathlib import Path

import numpy as np

from ..inference.npz import first_line, list_cases, read_case, write_segs
from ..show.progress import progress
from ..inference.predictor import label_dtype


def inside_ellipsoid(shape: tuple[int, ...]) -> np.ndarray:
    """bool array of `shape`: voxel centres in the ellipsoid that touches its six faces (2D: the ellipse, four sides)."""
    axes = [(2 * np.arange(n) + 1 - n) / n for n in shape]                     # -1 … 1 from face to face
    return sum(np.square(axis) for axis in np.ix_(*axes)) <= 1


def fill(shape: tuple[int, ...], boxes: np.ndarray, ellipse: bool) -> np.ndarray:
    """Labels of `shape` (H, W) or (D, H, W), uint8 or uint16, of boxes (N, 4) x0 y0 x1 y1 or (N, 6) x0 y0 z0 x1 y1 z1.

    Corner pixels belong to a box; later boxes lie over earlier ones.
    """
    segs = np.zeros(shape, label_dtype(len(boxes)))
    for k, box in enumerate(boxes):
        low, high = np.split(box, 2)                                           # x y [z]
        region = tuple(slice(int(a), int(np.ceil(b)) + 1) for a, b in zip(low[::-1], high[::-1]))
        part = segs[region]
        part[inside_ellipsoid(part.shape) if ellipse else ...] = k + 1
    return segs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, help="folder of NPZ cases, or one")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the masks")
    parser.add_argument("--shape", choices=("box", "ellipse"), default="ellipse", help="default: %(default)s")
    arguments = parser.parse_args()
    failed = 0
    try:
        paths = list_cases(arguments.input)
        if arguments.output.resolve() in {path.resolve().parent for path in paths}:
            raise ValueError(f"{arguments.output}: expected another folder for the masks than those of the cases")
        if len({path.name for path in paths}) < len(paths):
            raise ValueError(f"{arguments.input}: expected file names that differ, found {len(paths)} files and fewer names")
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(first_line(error), file=sys.stderr)
        return 1
    for path in (bar := progress(paths, len(paths), "filling")):
        try:
            case = read_case(path)
            for warning in case.warnings:
                bar.write(warning)
            shape = case.volume.shape[:3] if case.is_3d else case.image.shape[:2]
            write_segs(arguments.output / path.name, fill(shape, case.boxes, arguments.shape == "ellipse"))
        except (ValueError, OSError) as error:
            failed += 1
            bar.write(first_line(error))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
