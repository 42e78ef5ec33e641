"""eval.py as a user runs it, on tiny cases; and the tables and intervals of report.py."""
import csv
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from medficient_mini.evaluation import report
from medficient_mini.inference.npz import source_of
from medficient_mini.evaluation.metrics import case_scores

ROOT = Path(__file__).resolve().parents[2]


def evaluate(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, arguments), "--workers", "1"],
                          capture_output=True, text=True)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def square(x, y, side, label=1, shape=(40, 50)):
    labels = np.zeros(shape, np.uint8)
    labels[y:y + side, x:x + side] = label
    return labels


TRUTH = {
    "2D_CT_a.npz": square(5, 5, 20),
    "2D_CT_b.npz": np.maximum(square(5, 5, 10), square(25, 20, 12, label=3)),
    "2DBox_XRay_c.npz": square(10, 10, 15),
    "3D_MR_d.npz": np.stack([square(8, 8, 12)] * 5),
}


@pytest.fixture
def folders(tmp_path):
    """Ground truth, and masks one or four pixels to the right of it."""
    for name, labels in TRUTH.items():
        (tmp_path / "gts").mkdir(exist_ok=True)
        extra = {"spacing": np.array([3.0, 1.0, 1.0])} if labels.ndim == 3 else {}
        np.savez_compressed(tmp_path / "gts" / name, imgs=np.full(labels.shape, 90, np.uint8), gts=labels, **extra)
        for folder, shift in (("near", 1), ("far", 4)):
            (tmp_path / folder).mkdir(exist_ok=True)
            np.savez_compressed(tmp_path / folder / name, segs=np.roll(labels, shift, -1))
    return tmp_path


def test_one_result(folders):
    (folders / "near" / "efficiency.csv").write_text("case,seconds\n2D_CT_a.npz,9\n2D_CT_b.npz,2\n2D_CT_a.npz,1\n3D_MR_d.npz,8\n")
    done = evaluate("-s", folders / "near", "-g", folders / "gts", "--contour-nsd", "--figure", folders / "pictures")
    assert done.returncode == 0, done.stderr
    rows = table(folders / "near" / "metrics.csv")
    assert list(rows[0]) == ["case", "modality", "labels", "dsc", "nsd", "nsd_contour", "seconds"]
    assert [row["case"] for row in rows] == sorted(TRUTH)
    assert [row["modality"] for row in rows] == ["XRay", "CT", "CT", "MR"]
    for row in rows:
        gts = TRUTH[row["case"]]
        scores = case_scores(gts, np.roll(gts, 1, -1), (3, 1, 1), contour=True)
        assert int(row["labels"]) == scores["labels"]
        for key in ("dsc", "nsd", "nsd_contour"):
            assert row[key] == f"{scores[key]:.6f}"
    assert [row["seconds"] for row in rows] == ["", "1.000000", "2.000000", "8.000000"]

    dsc = {row["case"]: float(row["dsc"]) for row in rows}
    summary = {row["modality"]: row for row in table(folders / "near" / "summary.csv")}
    assert list(summary) == ["CT", "MR", "XRay", "average over modalities", "average over cases", "2D", "3D"]
    ct = (dsc["2D_CT_a.npz"] + dsc["2D_CT_b.npz"]) / 2
    modalities = (ct + dsc["3D_MR_d.npz"] + dsc["2DBox_XRay_c.npz"]) / 3
    assert float(summary["CT"]["dsc"]) == pytest.approx(ct, abs=2e-6) and summary["CT"]["cases"] == "2"
    assert float(summary["average over modalities"]["dsc"]) == pytest.approx(modalities, abs=2e-6)
    assert float(summary["average over cases"]["dsc"]) == pytest.approx(sum(dsc.values()) / 4, abs=2e-6)
    assert [float(summary[kind]["seconds"]) for kind in ("CT", "2D", "3D")] == [1.5, 1.5, 8]

    text = (folders / "near" / "summary.md").read_text()
    assert text.strip() in done.stdout
    assert f"| X-Ray | 1 | {100 * dsc['2DBox_XRay_c.npz']:.2f} |" in text and "| average over modalities | 4 |" in text
    assert "contour NSD" in text and "| 3D, mean over cases | 8.00 |" in text and "Differences" not in text
    sizes = {path.name: cv2.imread(str(path)).shape for path in (folders / "pictures").iterdir()}
    assert set(sizes) == {"CT.png", "MR.png", "XRay.png"}
    assert sizes["CT.png"][0] == 2 * sizes["MR.png"][0], "two CT cases: the best above the worst"


def test_results_side_by_side(folders):
    done = evaluate("-s", f"ours={folders / 'near'}", f"theirs={folders / 'far'}", "-g", folders / "gts",
                    "-o", folders / "out", "--published", "--figure", folders / "pictures", "--tolerance", "0.5")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (folders / "out").iterdir()) == [
        "metrics_ours.csv", "metrics_theirs.csv", "summary.csv", "summary.md"]
    near, far = (table(folders / "out" / f"metrics_{name}.csv") for name in ("ours", "theirs"))
    expected = case_scores(TRUTH["2D_CT_a.npz"], np.roll(TRUTH["2D_CT_a.npz"], 1, -1), tolerance=0.5)
    assert near[1]["nsd"] == f"{expected['nsd']:.6f}"
    differences = [float(b["dsc"]) - float(a["dsc"]) for a, b in zip(near, far)]
    text = (folders / "out" / "summary.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| theirs − ours | all cases | 4 |"))
    assert float(line.split(" | ")[3].split(" [")[0]) == pytest.approx(100 * np.mean(differences), abs=0.011)
    line = next(line for line in text.splitlines() if line.startswith("| theirs − ours | CT | 2 |"))
    assert float(line.split(" | ")[3].split(" [")[0]) == pytest.approx(
        100 * np.mean([d for d, row in zip(differences, near) if row["case"].startswith("2D_CT")]), abs=0.011)
    ct = next(line for line in text.splitlines() if line.startswith("| CT |")).split(" | ")
    assert len(ct) == 2 + 2 * 2 + 7 * 2 and ct[6:8] == ["92.26", "94.90"] and ct[-1].strip(" |") == "**95.78**"
    assert {row["result"] for row in table(folders / "out" / "summary.csv")} == {"ours", "theirs"}
    assert {p.name for p in (folders / "pictures").iterdir()} == {"ours", "theirs"}


def test_every_bad_input_is_one_line_and_the_rest_is_scored(folders):
    gts, segs = folders / "gts", folders / "near"
    labels = TRUTH["2D_CT_a.npz"]
    bad = {
        "2D_US_shape.npz": (dict(gts=labels), dict(segs=labels[:-1])),
        "2D_US_float.npz": (dict(gts=labels), dict(segs=labels.astype(float))),
        "2D_US_negative.npz": (dict(gts=labels), dict(segs=labels.astype(int) - 1)),
        "2D_US_object.npz": (dict(gts=labels), dict(segs=np.array([{}], object))),
        "2D_US_field.npz": (dict(gts=labels), dict(masks=labels)),
        "2D_US_gtfield.npz": (dict(imgs=labels), dict(segs=labels)),
        "3D_US_spacing.npz": (dict(gts=labels[None]), dict(segs=labels[None])),
        "3D_US_badspacing.npz": (dict(gts=labels[None], spacing=np.array([1, 0, 1])), dict(segs=labels[None])),
    }
    for name, (truth, mask) in bad.items():
        np.savez(gts / name, **truth)
        np.savez(segs / name, **mask)
    np.savez(gts / "2D_US_broken.npz", gts=labels)
    (segs / "2D_US_broken.npz").write_bytes(b"PK\3\4 half a file")
    np.savez(gts / "2D_US_empty.npz", gts=labels * 0)
    np.savez(segs / "2D_US_empty.npz", segs=labels * 0)
    np.savez(segs / "2D_US_stranger.npz", segs=labels)
    (segs / "2D_CT_b.npz").unlink()
    done = evaluate("-s", segs, "-g", gts)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    for name in [*bad, "2D_US_broken.npz", "2D_US_empty.npz", "2D_US_stranger.npz", "2D_CT_b.npz"]:
        assert sum(name in line for line in lines) == 1, (name, done.stderr)
    for name, words in {"shape": "segs: expected the shape of gts, (40, 50), found (39, 50)", "float": "segs: expected integer",
                        "negative": "found -1", "gtfield": "gts: expected this array, found only imgs",
                        "_spacing": "spacing: expected", "badspacing": "spacing: expected 3 positive", "broken": "unreadable",
                        "empty": "no label", "stranger": "without ground truth", "CT_b": "scored 0"}.items():
        assert any(name in line and words in line for line in lines), (name, done.stderr)
    rows = {row["case"]: row for row in table(segs / "metrics.csv")}
    assert set(rows) == set(TRUTH) | {"2D_US_empty.npz"}
    assert rows["2D_CT_b.npz"]["dsc"] == rows["2D_CT_b.npz"]["nsd"] == "0.000000" and rows["2D_CT_b.npz"]["labels"] == "2"
    assert (rows["2D_US_empty.npz"]["labels"], rows["2D_US_empty.npz"]["dsc"]) == ("0", "")
    summary = {row["modality"]: row for row in table(segs / "summary.csv")}
    assert "US" not in summary and summary["average over cases"]["cases"] == "4"
    assert "nan" not in (segs / "summary.md").read_text()

    done = evaluate("-s", segs, "-g", gts, "--skip-missing", "-o", folders / "out")
    assert done.returncode == 1 and "2D_CT_b.npz" in done.stderr
    assert "2D_CT_b.npz" not in {row["case"] for row in table(folders / "out" / "metrics.csv")}


@pytest.mark.parametrize("arguments, words", [
    (["-s", "none", "-g", "gts"], "none: expected a folder"),
    (["-s", "near", "-g", "void"], "void: expected .npz files"),
    (["-s", "near", "a=near", "a=far", "-g", "gts"], "-s a=far: expected NAME=FOLDER"),
    (["-s", "near", "-g", "gts", "--tolerance", "-1"], "--tolerance: expected"),
])
def test_what_cannot_be_run_is_one_line(folders, arguments, words, monkeypatch):
    (folders / "void").mkdir()
    monkeypatch.chdir(folders)
    done = evaluate(*arguments)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_processes_give_the_same(folders):
    for workers, out in (("1", "one"), ("2", "two")):
        done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "-s", str(folders / "far"), "-g", str(folders / "gts"),
                               "-o", str(folders / out), "--workers", workers], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folders / "one" / "metrics.csv").read_text() == (folders / "two" / "metrics.csv").read_text()


# ------------------------------------------------------------------------------------------------------------- report.py

def rows_of(scores):
    return [{"case": f"{i}.npz", "modality": "CT", "is_3d": False, "labels": 1, "dsc": s, "nsd": s} for i, s in enumerate(scores)]


def test_bootstrap_interval_covers_the_textbook_one():
    rng = np.random.default_rng(1)
    base = rng.random(200)
    change = rng.normal(0.05, 0.1, 200)
    n, mean, low, high = report.paired_difference(rows_of(base), rows_of(base + change)[::-1], "dsc")
    half = 1.96 * change.std(ddof=1) / np.sqrt(200)
    assert n == 200 and mean == pytest.approx(change.mean())
    assert low == pytest.approx(change.mean() - half, abs=0.1 * half) and high == pytest.approx(change.mean() + half, abs=0.1 * half)
    assert report.paired_difference(rows_of(base), rows_of(base + change), "dsc") == (n, mean, low, high)


def test_only_shared_cases_are_compared():
    a, b = rows_of([0.5, 0.6, None, 0.8]), rows_of([0.6, None, 0.7])
    assert report.paired_difference(a, b, "dsc")[:2] == (1, pytest.approx(0.1))
    assert report.paired_difference(a, [], "dsc")[0] == 0
    assert "| b − a | all cases | 0 | – | – |" in report.markdown({"a": a, "b": []})
    assert "| CT | 3/2 |" in report.markdown({"a": a, "b": b}) and "| CT | 2/3 |" in report.markdown({"b": b, "a": a})


@pytest.mark.parametrize("rows", [[], rows_of([None, None])])
def test_tables_without_any_score(rows):
    text = report.markdown({"a": rows, "b": rows})
    assert "| average over cases | 0 | – | – | – | – |" in text and "| b − a | all cases | 0 | – | – |" in text


def test_published_columns_agree_with_their_averages():
    modalities = [np.array(report.PUBLISHED[m]) for m in report.MODALITIES if m in report.PUBLISHED]
    assert len(modalities) == 9 and modalities[0].shape == (len(report.PUBLISHED_COLUMNS), 2)
    assert np.abs(np.mean(modalities, axis=0) - report.PUBLISHED["average over modalities"]).max() < 0.011


def test_bad_efficiency_file_is_named(tmp_path):
    (tmp_path / "efficiency.csv").write_text("case,seconds\na.npz,fast\n")
    with pytest.raises(ValueError, match="efficiency.csv: line 2: expected case,seconds, found a.npz,fast"):
        report.read_seconds(tmp_path)
    assert report.read_seconds(tmp_path / "none") == {}


def test_by_source(tmp_path):
    assert [source_of(name) for name in ("3D_CT_STS_004.npz", "2DBox_US_BUSI_a_b.npz", "2D_US_a.npz", "x.npz")] == [
        "CT STS", "US BUSI", "US", "unknown"]
    for folder in ("gts", "segs"):
        (tmp_path / folder).mkdir()
    for k, name in enumerate(("2D_US_BUSI_1.npz", "2D_US_HC18_1.npz", "2D_US_HC18_2.npz")):
        gts = np.zeros((20, 20), np.uint8)
        gts[5:15, 5:15] = 1
        np.savez(tmp_path / "gts" / name, gts=gts)
        np.savez(tmp_path / "segs" / name, segs=np.roll(gts, k, 0))
    assert evaluate("-s", tmp_path / "segs", "-g", tmp_path / "gts", "--by-source").returncode == 0
    assert "--published" in evaluate("-s", tmp_path / "segs", "-g", tmp_path / "gts", "--by-source", "--published").stderr
    text = (tmp_path / "segs/summary.md").read_text()
    assert "| US BUSI | 1 | 100.00 |" in text and "| US HC18 | 2 | 85.00 |" in text
