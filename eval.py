"""Score masks against ground truth: DSC and NSD as the challenge computes them, the paper's tables, good and bad cases.

    python eval.py -s segs -g gts                                   # metrics.csv, summary.md, summary.csv in segs
    python eval.py -s ours=segs_l1 lite=segs_lite -g gts -o scores  # side by side, with differences case by case
    python eval.py -s segs -g gts --figure pictures                 # best and worst case of each modality

Masks are NPZ files with `segs`, ground truth NPZ files with `gts` (3D: and `spacing`); they belong together by name.
A mask file that is missing, unreadable or of another shape scores 0.
"""
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from medficient_mini.evaluation.metrics import case_scores
from medficient_mini.evaluation.report import add_seconds, markdown, metrics_csv, summary_csv
from medficient_mini.files import exit_status, first_line, option_parser, whole_file
from medficient_mini.inference.names import composed
from medficient_mini.inference.npz import list_cases, modality_of, read_case, read_labels
from medficient_mini.show.draw import compare_row, save_png
from medficient_mini.show.progress import ProgressBar


def parse_arguments(argv):
    parser, add = option_parser(__doc__)
    add("-s --segs", str, "folders of masks, side by side", required=True, nargs="+", action="extend",
        metavar="[NAME=]FOLDER")
    add("-g --gts", str, "folder of ground truth", required=True, metavar="FOLDER")
    add("-o --output", Path, "where the tables go (default: the first -s folder)", metavar="DIR")
    add("--tolerance", 2.0, "of NSD; pixels in 2D", metavar="MM")
    add("--contour-nsd", False,
        "one more column: NSD of the contour in 2D (the challenge's counts the whole area as surface)")
    add("--skip-missing", False, "leave out cases without masks instead of scoring them 0")
    add("--published", False, "add the columns of MedficientSAM, Table 4")
    add("--by-source", False, "a line per data set (CT STS of 3D_CT_STS_004.npz), not per modality")
    add("--figure", Path, "best and worst case of each target as pictures", metavar="DIR")
    add("--workers --threads", min(8, os.cpu_count()), "processes", metavar="N")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.tolerance < float("inf"):
        raise ValueError(f"--tolerance: expected a number of mm >= 0, found {arguments.tolerance}")
    if arguments.by_source and arguments.published:
        raise ValueError("--published: the paper has no columns per data set, expected it without --by-source")
    return arguments


def main(argv=None) -> int:
    """Run the script with these arguments (default: the command line's); return the exit status."""
    return exit_status(lambda: evaluate(parse_arguments(argv)))


def evaluate(arguments) -> int:
    """Score, write the tables, draw; return how many things were wrong with the input."""
    folders, problems, hints = named_folders(arguments.segs), [], []
    masks = {name: files_by_name(folder, problems) for name, folder in folders.items()}
    results = {folder.resolve() for folder in folders.values()} - {Path(arguments.gts).resolve()}
    truths = files_by_name(arguments.gts, problems, results)
    without = "cases without masks, " + ("left out" if arguments.skip_missing else "scored 0")
    for name, found in masks.items():
        for names, what in ((found.keys() - truths.keys(), "files without ground truth"),
                            (truths.keys() - found.keys(), without)):
            if names:
                problems.append(f"{name}: expected masks of all cases and of no others, found {len(names)} {what}: "
                                f"{', '.join(sorted(names))}")
    output = arguments.output or next(iter(folders.values()))
    output.mkdir(parents=True, exist_ok=True)                # before the work, not after it

    results, tables = {name: [] for name in folders}, {}
    for rows, wrong, odd in score_all(masks, truths, arguments):
        for name, row in rows.items():
            results[name].append(row)
        problems += wrong
        hints += odd
    single = len(results) == 1
    for name, rows in results.items():
        add_seconds(rows, folders[name], problems)
        tables["metrics.csv" if single else f"metrics_{name}.csv"] = metrics_csv(rows)
    average = ("Each data set stands as a modality of its own" if arguments.by_source else
               "The average over modalities is the paper's")
    heading = (f"## Scores on {arguments.gts}\n\nDSC and NSD in percent, NSD at a tolerance of {arguments.tolerance:g} "
               f"mm (pixels in 2D). {average}; in the average over cases every case counts alike.")
    tables |= {"summary.csv": summary_csv(results), "summary.md": markdown(results, arguments.published, heading)}
    for name, text in tables.items():
        with whole_file(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    print(tables["summary.md"])
    for name, rows in results.items() if arguments.figure else ():
        draw_figures(arguments.figure / (name * (not single)), rows, problems)
    for line in problems + hints:
        print(line, file=sys.stderr)
    return len(problems)


def named_folders(arguments):
    """Return {name: folder} of "name=folder" and "folder", named after itself. ValueError where a name comes twice."""
    folders = {}
    for argument in arguments:
        is_folder = "=" not in argument or Path(argument).exists()
        name, _, folder = ("", "", argument) if is_folder else argument.partition("=")
        name = name or Path(folder).resolve().name
        if name in folders or "/" in name:
            raise ValueError(f"-s {argument}: expected NAME=FOLDER, each with a name of its own without /, found "
                             f"{name!r}")
        folders[name] = Path(folder)
    return folders


def files_by_name(folder, problems, without=frozenset()):
    """Return {composed file name: path} of a folder's NPZ files, those below folders of `without` left out.

    Each name that recurs costs a line in `problems`.
    """
    found = {}
    for path in list_cases(Path(folder).absolute()):                           # "." would name no modality
        if without.isdisjoint((path.parent.resolve() / path.name).parents):
            first = found.setdefault(composed(f"{path.stem}.npz"), path)
            if first != path:
                problems.append(f"{path}: expected each file name once, found {first} before")
    return found


def score_all(masks, truths, arguments):
    """Do `score` for every case, in processes where --workers says so."""
    paths = [{name: found.get(case) for name, found in masks.items()} for case in truths]
    with ProcessPoolExecutor(max(1, arguments.workers)) as pool:        # without a job it starts no process
        run = pool.map if arguments.workers > 1 else map
        scored = run(partial(score, arguments=arguments), truths.values(), paths)
        return list(ProgressBar(scored, len(truths), "scoring"))


def score(truth, masks, arguments):
    """Score one case of all results: {name: row as in report.py}, lines about bad files, lines that only hint.

    `masks` is {name of the result: path or None}; rows also hold the paths `truth` and `masks`. Where the ground truth
    is bad there are none.
    """
    rows, wrong, hints = {}, [], []
    try:
        gts, spacing_mm = read_labels(truth, "gts")
        for name, path in masks.items():
            if path is None and arguments.skip_missing:
                continue
            try:
                segs = read_labels(path, "segs")[0] if path else np.zeros_like(gts)
                if segs.shape != gts.shape:
                    raise ValueError(f"{path.name}: segs: expected the shape of gts, {gts.shape}, found {segs.shape}")
            except ValueError as error:
                wrong.append(f"{error}: scored 0 in {name}")
                segs, path = np.zeros_like(gts), None
            modality = modality_of(truth, arguments.by_source)
            row = dict(case=truth.name, modality=modality, kind=f"{gts.ndim}D", truth=truth, masks=path)
            rows[name] = row | case_scores(gts, segs, spacing_mm, arguments.tolerance, arguments.contour_nsd)
            if rows[name]["dsc"] == 0 and segs.any() and not np.intersect1d(gts, segs).any():
                hints.append(f"{truth.name}: segs: expected labels of the ground truth (the largest is {gts.max()}), "
                             f"found none of them in {name} (the largest is {segs.max()})")
        if not gts.any():
            hints.append(f"{truth.name}: gts: no label, so there is nothing to score")
        elif gts.max() == 255 and (others := gts[gts < 255].max(initial=0)) in range(1, 254):
            hints.append(f"{truth.name}: gts: label 255 beside labels up to {others} is scored as an object like "
                         "them; where it marks pixels to be ignored, set them to 0")
    except Exception as error:       # whatever it is, it costs this case alone
        wrong.append(f"{truth.name}: {first_line(error).removeprefix(truth.name + ': ')}")
    return rows, wrong, hints


def draw_figures(folder, rows, problems):
    """Save a PNG per target, best case above worst (by DSC), a volume by its slice with the largest labelled area.

    Image, ground truth and prediction stand side by side (Fig. 2). What cannot be drawn costs a line in `problems`.
    """
    rows = sorted((row for row in rows if row["masks"] and row["labels"]), key=lambda row: -row["dsc"])
    for target in sorted({row["modality"] for row in rows}):
        cases, pictures = [row for row in rows if row["modality"] == target], []
        try:
            for kind, row in zip(("best", "worst"), cases[::max(1, len(cases) - 1)]):
                case = read_case(row["truth"], need_boxes=False, need_gts=True)
                layers = [case.pixels, case.gts, read_labels(row["masks"], "segs")[0]]
                if case.is_3d:
                    z = np.count_nonzero(case.gts, axis=(1, 2)).argmax()
                    layers = [layer[z] for layer in layers]
                caption = f"{kind}: DSC {100 * row['dsc']:.1f} %, NSD {100 * row['nsd']:.1f} %   {row['case']}"
                pictures.append(compare_row(*layers, caption))
            save_png(folder / f"{target}.png", np.vstack(pictures))
        except Exception as error:   # a picture is decoration
            problems.append(f"--figure: {target}: {first_line(error)}")


if __name__ == "__main__":
    sys.exit(main())
