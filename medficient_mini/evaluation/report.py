"""Per-case rows -> the paper's tables (MedficientSAM, Tables 4, 5, 7), as Markdown and CSV.

A row is a dict: case (file name), modality (as in the file name; with eval.py --by-source modality and data set),
is_3d, labels (number scored), dsc, nsd (fractions, None where the ground truth has no label) and, where there are
any, nsd_contour and seconds. A result is a name and its list of rows.
"""
import csv
import io
from pathlib import Path

import numpy as np

from ..files import whole_file

MODALITIES = ("CT", "MR", "PET", "US", "XRay", "Dermoscopy", "Endoscopy", "Fundus", "Microscopy",      # the paper's order
              "Mammography", "OCT")                                                 # not in its public validation set
PAPER_NAME = {"XRay": "X-Ray"}
SCORES = {"dsc": "DSC", "nsd": "NSD", "nsd_contour": "contour NSD"}
DRAWS = 10_000                       # bootstrap samples

# MedficientSAM, Table 4 (public validation set of the challenge, percent): DSC and NSD per column. Second hand: the
# paper's text was in no source at hand, so the figures are those of the copy in the README of the team that reproduced
# it (github.com/RicoLeehdu/medficientsam-reproduce; "-R" there stands for their run, it seems). Checked: the nine rows
# give the averages within 0.01, and those of L1 are the ones in the paper's abstract.
PUBLISHED_COLUMNS = ("LiteMedSAM", "Distillation", "Distillation-R", "No Augmentation", "No Augmentation-R",
                     "MedficientSAM-L1", "MedficientSAM-L1-R")
PUBLISHED = {
    "CT":         ((92.26, 94.90), (91.13, 93.75), (92.15, 94.74), (92.24, 94.71), (92.69, 95.50), (92.15, 94.80), (93.19, 95.78)),
    "MR":         ((89.63, 93.37), (85.73, 89.75), (87.87, 91.40), (87.25, 90.88), (88.54, 92.21), (86.98, 90.77), (89.51, 92.99)),
    "PET":        ((51.58, 25.17), (70.49, 54.52), (68.30, 50.17), (72.05, 56.26), (61.06, 49.13), (73.00, 58.03), (66.97, 52.52)),
    "US":         ((94.77, 96.81), (84.43, 89.29), (84.52, 89.37), (81.99, 86.74), (82.41, 87.16), (82.50, 87.24), (81.39, 86.09)),
    "XRay":       ((75.83, 80.39), (78.92, 84.64), (75.40, 80.38), (79.88, 85.73), (78.04, 83.10), (80.47, 86.23), (75.78, 80.88)),
    "Dermoscopy": ((92.47, 93.85), (92.84, 94.16), (92.54, 93.88), (94.24, 95.62), (93.71, 95.19), (94.16, 95.54), (93.17, 94.62)),
    "Endoscopy":  ((96.04, 98.11), (96.88, 98.81), (95.92, 98.16), (96.05, 98.33), (95.58, 98.07), (96.10, 98.37), (94.62, 97.26)),
    "Fundus":     ((94.81, 96.41), (94.10, 95.83), (93.85, 95.54), (94.16, 95.89), (94.27, 96.00), (94.32, 96.05), (94.16, 95.90)),
    "Microscopy": ((61.63, 65.38), (75.63, 82.15), (75.90, 82.45), (78.76, 85.22), (78.09, 84.48), (78.09, 84.47), (77.67, 84.11)),
    "average over modalities":
                  ((83.23, 82.71), (85.57, 86.99), (85.16, 86.23), (86.29, 87.71), (84.93, 86.76), (86.42, 87.95), (85.16, 86.68)),
}
# Table 5: mean seconds of a 2D and a 3D case on an Intel Core i9-10900K; L1 from the paper's abstract, LiteMedSAM from
# the copy above. The runtimes per modality (Table 7) were in no source at hand and are left out.
PUBLISHED_SECONDS = {"LiteMedSAM": (5.1, 42.6), "MedficientSAM-L1": (1.0083, 8.9585)}


# ------------------------------------------------------------------------------------------------------- averages

def summarise(rows: list[dict]) -> list[dict]:
    """One dict per modality (the paper's order, others behind), then "average over modalities", "average over cases".

    Keys: target, cases (number scored), dsc, nsd, nsd_contour, seconds; means over cases, None where there are none.
    Rows without a score do not count. The average over modalities is the paper's: the mean of the modalities' means.
    """
    rows = [row for row in rows if row["dsc"] is not None]
    found = {row["modality"] for row in rows}
    order = [m for m in MODALITIES if m in found] + sorted(found - set(MODALITIES))
    keys = [*SCORES, "seconds"]
    table = []
    for modality in order:
        group = [row for row in rows if row["modality"] == modality]
        table.append({"target": modality, "cases": len(group)} | {key: mean_of(group, key) for key in keys})
    per_modality = {key: mean_of(table, key) for key in keys} | {"seconds": None}
    table.append({"target": "average over modalities", "cases": len(rows)} | per_modality)
    table.append({"target": "average over cases", "cases": len(rows)} | {key: mean_of(rows, key) for key in keys})
    return table


def mean_of(rows, key):
    """Mean of `key` over the rows that have it, None if none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None


def mean_seconds(rows: list[dict]) -> tuple[float | None, float | None]:
    """Mean seconds of the 2D and of the 3D cases."""
    return tuple(mean_of([row for row in rows if row["is_3d"] == is_3d], "seconds") for is_3d in (False, True))


def paired_difference(a: list[dict], b: list[dict], key: str, seed: int = 0) -> tuple[int, float, float, float]:
    """Cases in both, mean of b - a over them, and its 95 % bootstrap interval (cases drawn with replacement).

    The same rows give the same numbers. NaN where no case is in both.
    """
    before = {row["case"]: row[key] for row in a if row.get(key) is not None}
    differences = np.array([row[key] - before[row["case"]] for row in sorted(b, key=lambda row: row["case"])
                            if row.get(key) is not None and row["case"] in before])
    n = len(differences)
    if not n:
        return 0, float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, n, n)].mean() for _ in range(DRAWS)]
    low, high = np.percentile(means, (2.5, 97.5))
    return n, float(differences.mean()), float(low), float(high)


# --------------------------------------------------------------------------------------------------------- markdown

def markdown(results: dict[str, list[dict]], published: bool = False, heading: str = "") -> str:
    """summary.md: scores side by side, differences, runtimes. results: name -> rows."""
    scores = [key for key in SCORES if any(row.get(key) is not None for rows in results.values() for row in rows)]
    scores = scores or ["dsc", "nsd"]
    parts = [heading, score_table(results, scores, published)]
    if published:
        parts.append("Published columns: MedficientSAM, Table 4, in percent on the challenge's public validation set: "
                     "other cases than these, and nine modalities, so compare the order of difficulty, not the digits.")
    if len(results) > 1:
        parts.append("### Differences, second minus first\n\n" + difference_table(results, scores))
    if any("seconds" in row for rows in results.values() for row in rows):
        parts.append("### Runtime, mean seconds per case\n\n" + runtime_table(results, published))
    return "\n\n".join(part for part in parts if part) + "\n"


def score_table(results, scores, published):
    """The layout of Table 4: a row per modality and two averages, for each column its scores in percent, best in bold."""
    summaries = by_target(results)
    targets = merged_targets(summaries)
    header = ["Target", "Cases"] + [f"{name} {SCORES[key]}" for name in summaries for key in scores]
    if published:
        header += [f"published: {name} {key}" for name in PUBLISHED_COLUMNS for key in ("DSC", "NSD")]
    lines = []
    for target in targets:
        found = [summary.get(target, {}) for summary in summaries.values()]
        values = [[percent(entry.get(key)) for key in scores] for entry in found]
        if published:
            values += [list(pair) + [None] * (len(scores) - 2)
                       for pair in PUBLISHED.get(target, [(None, None)] * len(PUBLISHED_COLUMNS))]
        best = [max((column[i] for column in values if column[i] is not None), default=None) for i in range(len(scores))]
        cells = []
        for k, column in enumerate(values):
            for i, value in enumerate(column[:len(scores) if k < len(found) else 2]):
                text = "–" if value is None else f"{value:.2f}"
                cells.append(f"**{text}**" if value is not None and value == best[i] and len(values) > 1 else text)
        counts = [str(entry.get("cases", 0)) for entry in found]               # one number where all have as many
        lines.append([PAPER_NAME.get(target, target), "/".join(counts[:1] if len(set(counts)) == 1 else counts)] + cells)
    return table(header, lines)


def difference_table(results, scores):
    """A line per pair of results over all cases; with two results also one per target."""
    names, lines = list(results), []
    targets = [t for t in merged_targets(by_target(results)) if not t.startswith("average")] if len(names) == 2 else []
    for i, first in enumerate(names):
        for second in names[i + 1:]:
            for target in [*targets, None]:
                pair = [[row for row in results[name] if target in (None, row["modality"])] for name in (first, second)]
                cells = []
                for key in scores:
                    n, mean, low, high = paired_difference(*pair, key)
                    cells.append(f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]" if n else "–")
                lines.append([f"{second} − {first}", PAPER_NAME.get(target, target or "all cases"), str(n)] + cells)
    return table(["Pair", "Target", "Cases in both"] + [f"{SCORES[key]} points, mean [95 % interval]" for key in scores], lines)


def runtime_table(results, published):
    """Tables 7 and 5: per modality, then the means of 2D and 3D cases."""
    summaries = by_target(results)
    means = {name: mean_seconds(rows) for name, rows in results.items()}
    header = ["Target"] + list(results) + [f"published: {name}" for name in PUBLISHED_SECONDS if published]
    lines = [[PAPER_NAME.get(target, target)] + [seconds(s.get(target, {}).get("seconds")) for s in summaries.values()]
             + ["–"] * (published * len(PUBLISHED_SECONDS))
             for target in merged_targets(summaries) if not target.startswith("average")]
    for i, kind in enumerate(("2D, mean over cases", "3D, mean over cases")):
        lines.append([kind] + [seconds(pair[i]) for pair in means.values()]
                     + [seconds(pair[i]) for pair in PUBLISHED_SECONDS.values() if published])
    note = "\n\nPublished: MedficientSAM, Table 5, measured on an Intel Core i9-10900K." if published else ""
    return table(header, lines) + note


def by_target(results):
    """{name: {target: its row of `summarise`}}."""
    return {name: {row["target"]: row for row in summarise(rows)} for name, rows in results.items()}


def merged_targets(summaries):
    """Targets of all results in the order of `summarise`."""
    found = {target for summary in summaries.values() for target in summary if not target.startswith("average")}
    return [m for m in MODALITIES if m in found] + sorted(found - set(MODALITIES)) + [
        "average over modalities", "average over cases"]


def table(header, lines):
    rows = [header, ["---"] * len(header)] + lines
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def percent(value):
    return None if value is None else round(100 * value, 2)


def seconds(value):
    return "–" if value is None else f"{value:.2f}"


# -------------------------------------------------------------------------------------------------------------- CSV

def metrics_csv(rows: list[dict]) -> str:
    """One line per case, sorted: case,modality,labels,dsc,nsd[,nsd_contour][,seconds]; fractions, empty where no score."""
    columns = ["case", "modality", "labels", "dsc", "nsd"]
    columns += [key for key in ("nsd_contour", "seconds") if any(key in row for row in rows)]
    return csv_text(columns, [[row.get(key) for key in columns] for row in sorted(rows, key=lambda row: row["case"])])


def summary_csv(results: dict[str, list[dict]]) -> str:
    """result,modality,cases,dsc,nsd,…: the numbers of summary.md as fractions; mean 2D and 3D seconds as their own rows."""
    rows_of_all = [row for rows in results.values() for row in rows]
    extra = [key for key in ("nsd_contour", "seconds") if any(key in row for row in rows_of_all)]
    lines = []
    for name, rows in results.items():
        lines += [[name, entry["target"], entry["cases"], entry["dsc"], entry["nsd"]] + [entry[key] for key in extra]
                  for entry in summarise(rows)]
        if "seconds" in extra:
            for kind, is_3d, value in zip(("2D", "3D"), (False, True), mean_seconds(rows)):
                count = sum(row["is_3d"] == is_3d and row.get("seconds") is not None for row in rows)
                lines.append([name, kind, count, None, None] + [None] * (len(extra) - 1) + [value])
    return csv_text(["result", "modality", "cases", "dsc", "nsd"] + extra, lines)


def csv_text(header, lines):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else "" if cell is None else cell for cell in line])
    return text.getvalue()


def read_seconds(folder) -> dict[str, float]:
    """efficiency.csv of a results folder -> file name: seconds, the last entry of a name; {} without that file.

    ValueError with one line where a line of it is not `name,number`.
    """
    path = Path(folder) / "efficiency.csv"
    if not path.is_file():
        return {}
    found = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.reader(file), 1):
            try:
                if line and line[0] != "case":                  # jobs that start together may write the heading twice
                    found[line[0].removesuffix(".npz") + ".npz"] = float(line[1])
            except (ValueError, IndexError):
                raise ValueError(f"{path}: line {number}: expected case,seconds, found {','.join(line)}") from None
    return found


def write_text(path, text: str) -> None:
    """Write a file whole or not at all: beside it under a temporary name, then renamed."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
