"""Masks without a network, to measure networks against: each box filled, or the ellipse (ellipsoid) in it.

    python -m medficient_mini.evaluation.baselines -i cases -o out_box --shape box
    python -m medficient_mini.evaluation.baselines -i cases -o out_ellipse --shape ellipse
"""
import sys
from pathlib import Path

import numpy as np

from ..files import exit_status, option_parser
from ..inference.npz import list_cases, read_case, write_segs
from ..show.progress import ProgressBar


def fill(shape: tuple[int, ...], boxes: np.ndarray, ellipse: bool) -> np.ndarray:
    """Return labels (H, W) or (D, H, W) of boxes (N, 4) or (N, 6), corners included; later ones lie over earlier."""
    segs = np.zeros(shape, np.int32)
    for label, box in enumerate(boxes, 1):
        high, low = np.split(box[::-1], 2)                                     # both [z] y x
        part = segs[tuple(slice(int(a), int(np.ceil(b)) + 1) for a, b in zip(low, high))]
        from_centre = np.ix_(*[(2 * np.arange(n) + 1 - n) / n for n in part.shape])        # -1 … 1 from side to side
        part[sum(np.square(axis) for axis in from_centre) <= 1 if ellipse else ...] = label
    return segs


def fill_cases(argv) -> int:
    """Do what the command line says; return how many cases failed."""
    parser, add = option_parser(__doc__)
    add("-i --input", str, "folder of NPZ cases, or one", required=True)
    add("-o --output", Path, "folder for the masks", required=True)
    add("--shape", "ellipse", "what fills the box", choices=("box", "ellipse"))
    arguments = parser.parse_args(argv)
    output, failed, written = arguments.output.resolve(), 0, set()
    paths = [path for path in list_cases(arguments.input) if output not in (path.parent.resolve() / path.name).parents]
    if not paths:                                                              # results of an earlier run are no cases
        raise ValueError(f"{arguments.output}: expected another folder than the cases'")
    for path in (bar := ProgressBar(paths, len(paths), "filling")):
        try:
            if path.name in written:
                raise ValueError(f"{path}: name: expected one of its own, found another case's")
            written.add(path.name)
            case = read_case(path)
            write_segs(arguments.output / path.name, fill(case.shape, case.boxes, arguments.shape == "ellipse"))
            lines = case.warnings
        except ValueError as error:
            lines, failed = [str(error)], failed + 1
        for line in lines:
            bar.write(line)
    return failed


def main(argv=None) -> int:
    """Run the script; return 1 if a case failed, else 0."""
    return exit_status(lambda: fill_cases(argv))


if __name__ == "__main__":
    sys.exit(main())
