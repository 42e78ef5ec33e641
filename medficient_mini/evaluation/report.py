"""Scores of cases -> the paper's tables (MedficientSAM, Tables 4, 5, 7), as Markdown and CSV.

A row is a dict: case (file name), modality (with eval.py --by-source and data set), kind ("2D" or "3D"), labels (number
scored), dsc, nsd (fractions, None where the ground truth has no label), maybe nsd_contour and seconds. Results are a
dict, name -> list of rows.
"""
import csv
import io
from itertools import combinations

import numpy as np

from ..files import first_line
from ..inference.names import composed, patient_of
from .published import SECONDS, published_scores

# The paper's order, and behind it what is not in its public validation set.
MODALITIES = ("CT", "MR", "PET", "US", "XRay", "Dermoscopy", "Endoscopy", "Fundus", "Microscopy", "Mammography", "OCT")
AVERAGES = ("average over modalities", "average over cases")
KINDS = ("2D", "3D")
TITLE = {"dsc": "DSC", "nsd": "NSD", "nsd_contour": "contour NSD", "XRay": "X-Ray", "2D": "2D, mean over cases",
         "3D": "3D, mean over cases", None: "–"}             # what the tables print for a key, where it differs
COLUMNS = ("dsc", "nsd", "nsd_contour", "seconds")
DRAWS = 2000                         # bootstrap samples


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Average rows for each target: the modalities, the two AVERAGES of all, and the 2D and 3D cases that have a time.

    Returns {target: {"cases": number, "dsc": mean, …}} without the means of nothing; of 2D and 3D the seconds alone.
    Rows without a score count for the time only. The average over modalities is the mean of their means, as in the
    paper.
    """
    scored = [row for row in rows if row["dsc"] is not None]
    table = {target: means([row for row in scored if row["modality"] == target]) for target in modalities_of(rows)}
    table |= zip(AVERAGES, (means(table.values(), COLUMNS[:3]) | {"cases": len(scored)}, means(scored)))
    timed = [row for row in rows if row.get("seconds") is not None]
    for kind in KINDS if timed else ():
        table[kind] = means([row for row in timed if row["kind"] == kind], ["seconds"])
    return table


def means(rows, columns=COLUMNS) -> dict:
    """Count the rows and average each of their columns over those that have it, if any."""
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in columns}
    return {"cases": len(rows)} | {key: float(np.mean(values)) for key, values in found.items() if values}


def modalities_of(rows) -> list[str]:
    """List the modalities of the rows that have a score, in the paper's order, others behind."""
    found = {row["modality"] for row in rows if row["dsc"] is not None}
    return [m for m in MODALITIES if m in found] + sorted(found.difference(MODALITIES))


def columns_of(rows) -> list[str]:
    """List the columns that the rows have: contour NSD and seconds only where they were measured."""
    return ["dsc", "nsd"] + [key for key in COLUMNS[2:] if any(key in row for row in rows)]


def paired_differences(a: list[dict], b: list[dict], scores: list[str]):
    """Compare two results over the cases that have a score in both.

    Returns the number of cases, and for each score the mean of b - a over them and, given two patients or more, the
    ends of its 95 % interval. The seeded bootstrap draws whole patients: cases of one are no independent evidence.
    """
    a, b = ({row["case"]: row for row in rows if row["dsc"] is not None} for rows in (a, b))
    cases = sorted(a.keys() & b.keys())
    if not cases:
        return 0, []
    differences = np.array([[b[case][key] - a[case][key] for key in scores] for case in cases])
    estimates = [differences.mean(0)]
    names, patients = np.unique([patient_of(case) for case in cases], return_inverse=True)
    n = len(names)
    if n > 1:
        weights = np.random.default_rng(0).multinomial(n, [1 / n] * n, DRAWS)[:, patients]      # times a case is drawn
        drawn = weights @ differences / weights.sum(1, keepdims=True)
        estimates += [*np.percentile(drawn, (2.5, 97.5), axis=0)]
    return len(cases), np.transpose(estimates)


def markdown(results: dict[str, list[dict]], published: bool = False, heading: str = "") -> str:
    """Write summary.md: scores side by side, differences of each pair, runtimes."""
    summaries = {name: summarise(rows) for name, rows in results.items()}
    rows = sum(results.values(), [])
    targets, columns = modalities_of(rows), columns_of(rows)
    scores = [key for key in columns if key != "seconds"]
    parts = [heading, score_table(summaries, [*targets, *AVERAGES], scores, published)]
    if published:
        parts.append("Published columns: MedficientSAM, Table 4, in percent on the challenge's public validation set: "
                     "other cases than these, and nine modalities, so compare the order of difficulty, not the digits.")
    if len(results) > 1:
        parts += ["### Differences, second minus first",
                  difference_table(results, targets * (len(results) == 2) + [None], scores)]
    if "seconds" in columns:
        times = {name: {target: entry.get("seconds") for target, entry in summary.items()}
                 for name, summary in summaries.items()} | (SECONDS if published else {})
        lines = [[target, *(column.get(target) for column in times.values())] for target in [*targets, *KINDS]]
        parts += ["### Runtime, mean seconds per case", table(["Target", *times], lines)]
        if published:
            parts.append("Published: MedficientSAM, Table 5, measured on an Intel Core i9-10900K.")
    return "\n\n".join(parts) + "\n"


def score_table(summaries, targets, scores, published):
    """Lay out Table 4: a row per target, for each column its scores in percent, the best of a score in bold."""
    columns = {(name, key): {target: round(100 * entry[key], 2) for target, entry in summary.items() if key in entry}
               for name, summary in summaries.items() for key in scores}
    columns |= published_scores() if published else {}
    lines = []
    for target in targets:
        counts = dict.fromkeys(str(summary.get(target, {"cases": 0})["cases"]) for summary in summaries.values())
        line = [target, "/".join(counts)]
        for (_, key), values in columns.items():
            best = max(other.get(target, 0) for (_, score), other in columns.items() if score == key)
            bold = "**" * (len(columns) > len(scores) and values.get(target) == best)
            line.append(bold + cell(values.get(target)) + bold)
        lines.append(line)
    return table(["Target", "Cases"] + [f"{name} {TITLE[key]}" for name, key in columns], lines)


def difference_table(results, targets, scores):
    """Write a line per pair of results and target; the target None is all cases."""
    lines = []
    for (first, a), (second, b) in combinations(results.items(), 2):
        for target in targets:
            pair = [[row for row in rows if target in (None, row["modality"])] for rows in (a, b)]
            cases, estimates = paired_differences(*pair, scores)
            line = [f"{second} − {first}", target or "all cases", cases]
            for mean, *ends in 100 * np.array(estimates):
                limits = ", ".join(f"{end:+.2f}" for end in ends) or "–"
                line.append(f"{mean:+.2f} [{limits}]")
            lines.append(line)
    titles = [f"{TITLE[key]} points, mean [95 % interval]" for key in scores]
    return table(["Pair", "Target", "Cases in both", *titles], lines)


def table(header: list, lines: list[list]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def cell(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else TITLE.get(value, str(value))


def metrics_csv(rows: list[dict]) -> str:
    """Write case,modality,labels,dsc,nsd[,nsd_contour][,seconds], a line per case, empty where there is no score."""
    return csv_text(["case", "modality", "labels"], sorted(rows, key=lambda row: row["case"]))


def summary_csv(results: dict[str, list[dict]]) -> str:
    """Write result,modality,cases,dsc,nsd,…: the numbers of summary.md as fractions."""
    return csv_text(["result", "modality", "cases"],
                    [{"result": name, "modality": target} | entry
                     for name, rows in results.items() for target, entry in summarise(rows).items()])


def csv_text(first: list[str], lines: list[dict]) -> str:
    """Write these first columns and those of `columns_of`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, first + columns_of(lines), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in line.items()}
                     for line in lines)
    return text.getvalue()


def add_seconds(rows: list[dict], folder, problems: list[str]) -> None:
    """Give each row the `seconds` of its case in the efficiency.csv of a folder, a Path; the last of several.

    Times are decoration: what is not `name,seconds` costs a line in `problems`, nothing else.
    """
    path, seconds = folder / "efficiency.csv", {}
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            for count, line in enumerate(csv.reader(file), 1):
                try:
                    seconds[composed(line[0])] = float(line[1])
                except (IndexError, ValueError):
                    if line and line[0] != "case":           # jobs that start together may write the heading twice
                        found = ",".join(line)
                        problems.append(f"{path}: line {count}: expected case,seconds, found {found}: left out")
    except FileNotFoundError:
        return
    except (OSError, csv.Error) as error:
        problems.append(f"{path}: {first_line(error)}")
    for row in rows if seconds else ():
        row["seconds"] = seconds.get(composed(row["case"]))
