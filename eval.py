"""Score masks against ground truth: DSC and NSD as the challenge computes them, the paper's tables, good and bad cases.

    python eval.py -s segs -g gts                                   # metrics.csv, summary.md, summary.csv in segs
    python eval.py -s ours=segs_l1 lite=segs_lite -g gts -o scores  # side by side, with differences case by case
    python eval.py -s segs -g gts --figure pictures                 # best and worst case of each modality

Masks are NPZ files with `segs`, ground truth NPZ files with `gts` (3D: and `spacing`); they belong together by name.
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np

from medficient_mini.inference.npz import UNREADABLE, list_cases, modality_of, read_case, source_of
from medficient_mini.show.draw import compare_row, save_png
from medficient_mini.evaluation.metrics import case_scores, checked_labels
from medficient_mini.show.progress import progress
from medficient_mini.evaluation.report import markdown, metrics_csv, read_seconds, summary_csv, write_text


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-s", "--segs", required=True, nargs="+", metavar="[NAME=]FOLDER",
                        help="folders of masks, side by side")
    parser.add_argument("-g", "--gts", required=True, metavar="FOLDER", help="folder of ground truth")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR",
                        help="where the tables go (default: the first -s folder)")
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="MM", help="of NSD; pixels in 2D (default: 2)")
    parser.add_argument("--contour-nsd", action="store_true",
                        help="one more column: NSD of the contour in 2D (the challenge's counts the whole area as surface)")
    parser.add_argument("--skip-missing", action="store_true",
                        help="leave out cases without masks instead of scoring them 0")
    parser.add_argument("--published", action="store_true", help="add the columns of MedficientSAM, Table 4")
    parser.add_argument("--by-source", action="store_true",
                        help="a line per data set (CT STS: from 3D_CT_STS_004.npz), not per modality")
    parser.add_argument("--figure", type=Path, metavar="DIR", help="best and worst case of each target as pictures")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes (default: %(default)s)")
    return parser.parse_args()


def named_folders(arguments: list[str]) -> dict[str, Path]:
    """"name=folder" or "folder" (named after itself) -> {name: folder}. ValueError where a name comes twice."""
    folders = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or Path(argument).exists():
            name, folder = Path(argument).resolve().name, argument
        if name in folders or not name or "/" in name:
            raise ValueError(f"-s {argument}: expected NAME=FOLDER, a name without / of its own for each, found {name!r}")
        folders[name] = Path(folder)
    return folders


def by_name(folder, complain) -> dict[str, Path]:
    """File name -> path of all NPZ files below `folder`; a name that comes again is complained about and left out."""
    found = {}
    for path in list_cases(folder):
        if path.name in found:
            complain(f"{path}: expected each file name once, found {found[path.name]} before")
        else:
            found[path.name] = path
    return found


def read_labels(path: Path, field: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels of `field` (uint8 or uint16) and `spacing`, None without one; a file may do without images. ValueError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = list(archive)
            labels, spacing = (archive[name] if name in fields else None for name in (field, "spacing"))
    except (*UNREADABLE, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path.name}: file: expected a whole NPZ archive, found it unreadable ({reason})") from None
    if labels is None:
        raise ValueError(f"{path.name}: {field}: expected this array, found only {', '.join(fields) or 'an empty archive'}")
    try:
        return checked_labels(field, labels), spacing
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def score(job, tolerance: float, contour: bool, group=modality_of):
    """(ground truth path, masks path or None of each result) -> for each result its row or a line of complaint.

    Only the line where the ground truth itself is bad. A missing mask file counts as masks without any label. group
    names the row's target from the file name.
    """
    truth, paths = job
    try:
        gts, spacing = read_labels(truth, "gts")
        if gts.ndim == 3 and spacing is None:
            raise ValueError(f"{truth.name}: spacing: expected this array (z, y, x in mm) beside the gts of a volume")
    except (ValueError, MemoryError) as error:
        return named(truth, error)
    rows = []
    for path in paths:
        try:
            segs = np.zeros_like(gts) if path is None else read_labels(path, "segs")[0]
            row = {"case": truth.name, "modality": group(truth), "is_3d": gts.ndim == 3}
            rows.append(row | case_scores(gts, segs, spacing, tolerance, contour))
        except (ValueError, MemoryError) as error:
            rows.append(named(truth, error))
    return rows


def named(path, error):
    """The error's line with the file name in front, once."""
    line = str(error) or "out of memory"
    return line if line.startswith(path.name) else f"{path.name}: {line}"


def score_all(jobs, arguments):
    """`score` of every job, in processes where --workers says so, in order."""
    work = partial(score, tolerance=arguments.tolerance, contour=arguments.contour_nsd,
                   group=source_of if arguments.by_source else modality_of)
    if min(arguments.workers, len(jobs)) <= 1:
        return list(progress(map(work, jobs), len(jobs), "scoring"))
    with ProcessPoolExecutor(min(arguments.workers, len(jobs))) as pool:
        return list(progress(pool.map(work, jobs), len(jobs), "scoring"))


def collect(folders, truths, arguments, complain):
    """{name: rows} of all results; says what was missing, empty or wrong."""
    masks = {name: by_name(folder, complain) for name, folder in folders.items()}
    for name, found in masks.items():
        strangers = sorted(set(found) - set(truths))
        if strangers:
            complain(f"{folders[name]}: expected masks of the cases in {arguments.gts}, found {len(strangers)} without "
                     f"ground truth: {shortened(strangers)}")
        missing = sorted(set(truths) - set(found))
        if missing:
            complain(f"{folders[name]}: expected masks of {len(truths)} cases, found {len(missing)} missing "
                     f"({'left out' if arguments.skip_missing else 'scored 0'}): {', '.join(missing)}")
    jobs = [(truth, [found.get(case) for found in masks.values()]) for case, truth in sorted(truths.items())]
    results = {name: [] for name in folders}
    for (truth, paths), scored in zip(jobs, score_all(jobs, arguments)):
        if isinstance(scored, str):
            complain(scored)
            continue
        if any(isinstance(row, dict) and not row["labels"] for row in scored):
            print(f"{truth.name}: gts: no label, so there is nothing to score", file=sys.stderr)
        for name, path, row in zip(folders, paths, scored):
            if isinstance(row, str):
                complain(row if len(folders) == 1 else f"{name}: {row}")
            elif path is not None or not arguments.skip_missing:
                results[name].append(row)
    for name, rows in results.items():
        took = read_seconds(folders[name])
        for row in rows if took else []:
            row["seconds"] = took.get(row["case"])
    return results, masks


def shortened(names, most=5):
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def draw_figures(folder, rows, truths, masks, complain):
    """For each modality a PNG: best case above worst (by DSC) as image, ground truth and prediction contours (Fig. 2)."""
    rows = sorted((row for row in rows if row["dsc"] is not None and row["case"] in masks), key=lambda row: -row["dsc"])
    for modality in sorted({row["modality"] for row in rows}):
        ranked = [row for row in rows if row["modality"] == modality]
        chosen = zip(("best", "worst"), ranked[:1] + ranked[1:][-1:])
        try:
            pictures = [figure_row(row, kind, truths, masks) for kind, row in chosen]
        except ValueError as error:
            complain(f"--figure: {error}")
            continue
        width = max(picture.shape[1] for picture in pictures)
        pictures = [np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
                    for picture in pictures]
        save_png(folder / f"{modality}.png", np.vstack(pictures))


def figure_row(row, kind, truths, masks):
    """One case; of a volume the slice with the largest labelled area."""
    case = read_case(truths[row["case"]], need_boxes=False, need_gts=True)
    image, gts, segs = case.image, case.gts, read_labels(masks[row["case"]], "segs")[0]
    where = ""
    if case.is_3d:
        z = int(np.count_nonzero(gts, axis=(1, 2)).argmax())
        image, gts, segs, where = case.volume[z], gts[z], segs[z], f" slice {z}"
    scores = f"DSC {100 * row['dsc']:.1f} %, NSD {100 * row['nsd']:.1f} %"
    return compare_row(image, gts, segs, f"{kind}: {Path(row['case']).stem}{where}   {scores}")


def run(arguments) -> int:
    """Score, write, draw; the number of complaints."""
    complaints = 0

    def complain(line):
        nonlocal complaints
        complaints += 1
        print(line, file=sys.stderr)

    if not arguments.tolerance >= 0 or arguments.tolerance == float("inf"):
        raise ValueError(f"--tolerance: expected a number of mm >= 0, found {arguments.tolerance}")
    if arguments.by_source and arguments.published:
        raise ValueError("--published: the paper has no columns per data set, expected it without --by-source")
    folders = named_folders(arguments.segs)
    truths = by_name(arguments.gts, complain)
    results, masks = collect(folders, truths, arguments, complain)
    first = next(iter(folders.values()))
    output = arguments.output or (first if first.is_dir() else first.parent)
    heading = (f"## Scores on {arguments.gts}\n\nDSC and NSD in percent, NSD at a tolerance of {arguments.tolerance:g} mm "
               "(pixels in 2D). " + ("Each data set stands as a modality of its own" if arguments.by_source else
                                     "The average over modalities is the paper's")
               + "; in the average over cases every case counts alike.")
    text = markdown(results, arguments.published, heading)
    for name, rows in results.items():
        write_text(output / ("metrics.csv" if len(results) == 1 else f"metrics_{name}.csv"), metrics_csv(rows))
    write_text(output / "summary.md", text)
    write_text(output / "summary.csv", summary_csv(results))
    print(text)
    for name in results if arguments.figure else []:
        folder = arguments.figure / name if len(results) > 1 else arguments.figure
        draw_figures(folder, results[name], truths, masks[name], complain)
    return complaints


def main() -> int:
    try:
        return 1 if run(parse_arguments()) else 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
    except BrokenProcessPool:
        print("a process was killed, probably for want of memory: try fewer --workers", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
