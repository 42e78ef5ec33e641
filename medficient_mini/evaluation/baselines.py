"""Masks without a network, to measure networks against: each box filled, or the ellipse (ellipsoid) in it.

    python -m medficient_mini.evaluation.baselines -i cases -o out_box --shape box
    python -m medficient_mini.evaluation.baselines -i cases -o out_ellipse --shape ellipse
"""
import argparse
import sys
from pathlib import Path

import numpy as np

from ..files import first_line
from ..inference.npz import list_cases, read_case, write_segs
from ..show.progress import ProgressBar


def inside_ellipsoid(shape: tuple[int, ...]) -> np.ndarray:
    """Return a bool array of `shape`: voxel centres in the ellipsoid (2D: ellipse) that touches all of its faces."""
    axes = [(2 * np.arange(n) + 1 - n) / n for n in shape]                     # -1 … 1 from face to face
    return sum(np.square(axis) for axis in np.ix_(*axes)) <= 1


def fill(shape: tuple[int, ...], boxes: np.ndarray, ellipse: bool) -> np.ndarray:
    """Return labels (H, W) or (D, H, W) of boxes (N, 4) x0 y0 x1 y1 or (N, 6) x0 y0 z0 x1 y1 z1.

    Corner pixels belong to a box; later boxes lie over earlier ones.
    """
    segs = np.zeros(shape, np.int32)
    for label, box in enumerate(boxes, 1):
        low, high = np.split(box[::-1], 2)[::-1]                               # [z] y x
        part = segs[tuple(slice(int(a), int(np.ceil(b)) + 1) for a, b in zip(low, high))]
        part[inside_ellipsoid(part.shape) if ellipse else ...] = label
    return segs


def main(argv=None) -> int:
    """Run the script; return 1 if a case failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, help="folder of NPZ cases, or one")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the masks")
    parser.add_argument("--shape", choices=("box", "ellipse"), default="ellipse", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        paths = [path.resolve() for path in list_cases(arguments.input)]
        outputs = {arguments.output.resolve() / path.name for path in paths}
        if outputs.intersection(paths) or len(outputs) < len(paths):
            raise ValueError(f"{arguments.output}: expected another folder than the cases' and names that differ")
    except (ValueError, OSError) as error:
        print(first_line(error), file=sys.stderr)
        return 1
    failed = False
    for path in (bar := ProgressBar(paths, len(paths), "filling")):
        try:
            case = read_case(path)
            for warning in case.warnings:
                bar.write(warning)
            write_segs(arguments.output / path.name, fill(case.shape, case.boxes, arguments.shape == "ellipse"))
        except Exception as error:   # of this case alone
            failed = True
            bar.write(f"{path.name}: {first_line(error).removeprefix(path.name + ': ')}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
