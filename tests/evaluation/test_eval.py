"""eval.py on tiny cases, in this process."""
import csv
import io
import os
import sys
import unicodedata

import cv2
import numpy as np
import pytest

import eval as script
from medficient_mini.evaluation.metrics import case_scores


@pytest.fixture
def evaluate(capsys):
    """Run the script; its exit status, standard output and the lines on standard error but the progress bar's."""
    def run(*arguments):
        status = script.main([*map(str, arguments), *([] if "--workers" in arguments else ["--workers", "1"])])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, [line for line in captured.err.splitlines() if not line.startswith("scoring ")]
    return run


def table(path, key):
    with open(path, newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def square(x, y, side, label=1, shape=(40, 50)):
    labels = np.zeros(shape, np.uint8)
    labels[y:y + side, x:x + side] = label
    return labels


LABELS = square(5, 5, 20)
TRUTH = {
    "2D_CT_a.npz": LABELS,
    "2D_CT_b.npz": np.maximum(square(5, 5, 10), square(25, 20, 12, label=3)),
    "2DBox_XRay_c.npz": square(10, 10, 15),
    "3D_MR_d.npz": np.stack([square(8, 8, 12)] * 5),
}


@pytest.fixture
def folders(tmp_path):
    """Ground truth, and masks one or four pixels to the right of it."""
    for folder in ("gts", "near", "far"):
        (tmp_path / folder).mkdir()
    for name, labels in TRUTH.items():
        extra = {"spacing": np.array([3.0, 1.0, 1.0])} if labels.ndim == 3 else {}
        np.savez(tmp_path / "gts" / name, imgs=np.full(labels.shape, 90, np.uint8), gts=labels, **extra)
        for folder, shift in (("near", 1), ("far", 4)):
            np.savez(tmp_path / folder / name, segs=np.roll(labels, shift, -1))
    return tmp_path


def test_one_result(folders, evaluate):
    (folders / "near" / "efficiency.csv").write_text(
        "case,seconds\n2D_CT_a.npz,9\n2D_CT_b.npz,2\n2D_CT_a.npz,1\n3D_MR_d.npz,8\n")
    status, output, errors = evaluate("-s", folders / "near", "-g", folders / "gts", "--contour-nsd",
                                      "--figure", folders / "pictures")
    assert (status, errors) == (0, [])
    rows = table(folders / "near" / "metrics.csv", "case")
    assert list(rows) == sorted(TRUTH) and [row["modality"] for row in rows.values()] == ["XRay", "CT", "CT", "MR"]
    for name, row in rows.items():
        scores = case_scores(TRUTH[name], np.roll(TRUTH[name], 1, -1), (3, 1, 1), contour=True)
        assert list(row) == ["case", "modality", "labels", "dsc", "nsd", "nsd_contour", "seconds"]
        assert int(row["labels"]) == scores["labels"]
        assert all(row[key] == f"{scores[key]:.6f}" for key in ("dsc", "nsd", "nsd_contour"))
    assert [row["seconds"] for row in rows.values()] == ["", "1.000000", "2.000000", "8.000000"]

    dsc = {name: float(row["dsc"]) for name, row in rows.items()}
    summary = table(folders / "near" / "summary.csv", "modality")
    assert list(summary) == ["CT", "MR", "XRay", "average over modalities", "average over cases", "2D", "3D"]
    ct = (dsc["2D_CT_a.npz"] + dsc["2D_CT_b.npz"]) / 2
    modalities = (ct + dsc["3D_MR_d.npz"] + dsc["2DBox_XRay_c.npz"]) / 3
    assert float(summary["CT"]["dsc"]) == pytest.approx(ct, abs=2e-6) and summary["CT"]["cases"] == "2"
    assert float(summary["average over modalities"]["dsc"]) == pytest.approx(modalities, abs=2e-6)
    assert float(summary["average over cases"]["dsc"]) == pytest.approx(sum(dsc.values()) / 4, abs=2e-6)
    assert [float(summary[kind]["seconds"]) for kind in ("CT", "2D", "3D")] == [1.5, 1.5, 8]

    text = (folders / "near" / "summary.md").read_text()
    assert text.strip() in output
    assert f"| X-Ray | 1 | {100 * dsc['2DBox_XRay_c.npz']:.2f} |" in text and "| average over modalities | 4 |" in text
    assert "contour NSD" in text and "| 3D, mean over cases | 8.00 |" in text and "Differences" not in text
    sizes = {path.name: cv2.imread(str(path)).shape for path in (folders / "pictures").iterdir()}
    assert set(sizes) == {"CT.png", "MR.png", "XRay.png"}
    assert sizes["CT.png"][0] == 2 * sizes["MR.png"][0], "two CT cases: the best above the worst"


def test_results_side_by_side(folders, evaluate):
    status, _, errors = evaluate("-s", f"ours={folders / 'near'}", f"theirs={folders / 'far'}", "-g", folders / "gts",
                                 "-o", folders / "out", "--published", "--figure", folders / "pictures",
                                 "--tolerance", 0.5)
    assert (status, errors) == (0, [])
    assert sorted(p.name for p in (folders / "out").iterdir()) == [
        "metrics_ours.csv", "metrics_theirs.csv", "summary.csv", "summary.md"]
    near, far = (table(folders / "out" / f"metrics_{name}.csv", "case") for name in ("ours", "theirs"))
    expected = case_scores(LABELS, np.roll(LABELS, 1, -1), tolerance_mm=0.5)
    assert near["2D_CT_a.npz"]["nsd"] == f"{expected['nsd']:.6f}"
    differences = {name: float(far[name]["dsc"]) - float(near[name]["dsc"]) for name in near}
    lines = (folders / "out" / "summary.md").read_text().splitlines()
    for target, cases in (("all cases | 4", list(TRUTH)), ("CT | 2", ["2D_CT_a.npz", "2D_CT_b.npz"])):
        line = next(line for line in lines if line.startswith(f"| theirs − ours | {target} |"))
        mean = 100 * np.mean([differences[case] for case in cases])
        assert float(line.split(" | ")[3].split(" [")[0]) == pytest.approx(mean, abs=0.011)
    ct = next(line for line in lines if line.startswith("| CT |")).split(" | ")
    assert len(ct) == 2 + 2 * 2 + 7 * 2 and ct[6:8] == ["92.26", "94.90"] and ct[-1].strip(" |") == "**95.78**"
    assert set(table(folders / "out" / "summary.csv", "result")) == {"ours", "theirs"}
    assert {p.name for p in (folders / "pictures").iterdir()} == {"ours", "theirs"}


def test_every_bad_input_is_one_line_and_the_rest_is_scored(folders, evaluate):
    gts, segs = folders / "gts", folders / "near"
    bad_masks = {                                                  # fault 22: these score 0, as missing ones do
        "2D_US_shape.npz": (dict(segs=LABELS[:-1]), "segs: expected the shape of gts, (40, 50), found (39, 50)"),
        "2D_US_float.npz": (dict(segs=LABELS.astype(float)), "segs: expected integer labels"),
        "2D_US_negative.npz": (dict(segs=LABELS.astype(int) - 1), "found -1"),
        "2D_US_object.npz": (dict(segs=np.array([{}], object)), "segs: expected numbers, found Python objects"),
        "2D_US_field.npz": (dict(masks=LABELS), "segs: expected this array"),
        "2D_US_axes.npz": (dict(segs=np.stack([LABELS] * 2)), "segs: expected"),
    }
    bad_truth = {
        "2D_US_gtfield.npz": (dict(imgs=LABELS), "gts: expected this array, found only imgs"),
        "3D_US_spacing.npz": (dict(gts=LABELS[None]), "spacing: expected 3 positive numbers in mm, found none"),
        "3D_US_badspacing.npz": (dict(gts=LABELS[None], spacing=np.ones((9, 40))), "spacing: expected"),     # fault 41
    }
    for name, (mask, _) in bad_masks.items():
        np.savez(gts / name, gts=LABELS)
        np.savez(segs / name, **mask)
    for name, (truth, _) in bad_truth.items():
        np.savez(gts / name, **truth)
        np.savez(segs / name, segs=LABELS if name.startswith("2") else LABELS[None])
    np.savez(gts / "2D_US_broken.npz", gts=LABELS)
    np.savez_compressed(segs / "2D_US_broken.npz", segs=LABELS)
    (segs / "2D_US_broken.npz").write_bytes((segs / "2D_US_broken.npz").read_bytes()[:-40])
    np.savez(gts / "2D_US_empty.npz", gts=LABELS * 0)
    np.savez(segs / "2D_US_empty.npz", segs=LABELS * 0)
    np.savez(segs / "2D_US_stranger.npz", segs=LABELS)
    (segs / "2D_CT_b.npz").unlink()
    status, _, lines = evaluate("-s", segs, "-g", gts)
    assert status == 1
    expected = {name: words for name, (_, words) in (bad_masks | bad_truth).items()}
    expected |= {"2D_US_broken.npz": "unreadable", "2D_US_empty.npz": "no label", "2D_CT_b.npz": "scored 0",
                 "2D_US_stranger.npz": "without ground truth"}
    assert len(lines) == len(expected)
    for name, words in expected.items():
        assert sum(name in line and words in line for line in lines) == 1, (name, lines)
    rows = table(segs / "metrics.csv", "case")
    assert set(rows) == {*TRUTH, *bad_masks, "2D_US_broken.npz", "2D_US_empty.npz"}
    for name in ["2D_CT_b.npz", "2D_US_broken.npz", *bad_masks]:
        assert rows[name]["dsc"] == rows[name]["nsd"] == "0.000000", name
        assert any(name in line and "scored 0" in line for line in lines)
    assert rows["2D_CT_b.npz"]["labels"] == "2"
    assert (rows["2D_US_empty.npz"]["labels"], rows["2D_US_empty.npz"]["dsc"]) == ("0", "")
    summary = table(segs / "summary.csv", "modality")
    assert summary["US"]["cases"] == "7" and float(summary["US"]["dsc"]) == 0
    assert summary["average over cases"]["cases"] == "11" and "nan" not in (segs / "summary.md").read_text()

    status, _, lines = evaluate("-s", segs, "-g", gts, "--skip-missing", "-o", folders / "out")
    rows = table(folders / "out" / "metrics.csv", "case")
    assert status == 1 and any("2D_CT_b.npz" in line and "left out" in line for line in lines)
    assert "2D_CT_b.npz" not in rows, "missing is left out"
    assert rows["2D_US_broken.npz"]["dsc"] == "0.000000", "unreadable is not"


def test_fault_9_decoration_costs_no_table(folders, evaluate):
    """Times that cannot be read and pictures that cannot be written cost a line each."""
    (folders / "near" / "efficiency.csv").write_text(
        'case,seconds\n2D_US_a"b,c.npz,1.2\n2D_CT_a.npz,fast\n2D_CT_b.npz\n\n'
        '2D_CT_b.npz,2\n3D_MR_d.npz,-\n"x""y,z.npz",3\n')
    (folders / "pictures").write_text("a file where the folder should be")
    status, _, lines = evaluate("-s", folders / "near", "-g", folders / "gts", "--figure", folders / "pictures")
    assert status == 1
    for words in ("line 2: expected case,seconds", "line 3:", "line 4:", "line 7:",
                  "--figure: CT", "--figure: MR", "--figure: XRay"):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert len(lines) == 7
    rows = table(folders / "near" / "metrics.csv", "case")
    assert [row["seconds"] for row in rows.values()] == ["", "", "2.000000", ""]
    (folders / "near" / "efficiency.csv").unlink()
    (folders / "near" / "efficiency.csv").mkdir()
    status, _, lines = evaluate("-s", folders / "near", "-g", folders / "gts")
    assert status == 1 and len(lines) == 1 and "efficiency.csv" in lines[0]


def test_fault_9_names_with_quote_and_comma(folders, evaluate):
    name = '2D_US_a"b,c.npz'
    np.savez(folders / "gts" / name, gts=LABELS)
    np.savez(folders / "near" / name, segs=LABELS)
    with open(folders / "near" / "efficiency.csv", "w", newline="") as file:
        csv.writer(file).writerows([["case", "seconds", "lost"], [name, 3, "box 1"]])
    assert evaluate("-s", folders / "near", "-g", folders / "gts")[0] == 0
    assert table(folders / "near" / "metrics.csv", "case")[name]["seconds"] == "3.000000"


def test_fault_23_labels_without_a_counterpart_are_named(folders, evaluate):
    np.savez(folders / "gts" / "2D_CT_a.npz", gts=LABELS * 255)
    status, _, lines = evaluate("-s", folders / "near", "-g", folders / "gts")
    assert len(lines) == 1
    assert lines[0].startswith("2D_CT_a.npz: segs: expected labels of the ground truth (the largest is 255), found")
    assert table(folders / "near" / "metrics.csv", "case")["2D_CT_a.npz"]["dsc"] == "0.000000"
    np.savez(folders / "near" / "2D_CT_a.npz", segs=square(30, 30, 5, label=255))
    assert evaluate("-s", folders / "near", "-g", folders / "gts")[2] == [], "apart, but of the same label"


def test_fault_14_an_unexpected_error_costs_its_case(folders, evaluate, monkeypatch):
    def broken(gts, *arguments):
        if gts.ndim == 3:
            raise cv2.error("something\nunexpected")
        return case_scores(gts, *arguments)

    monkeypatch.setattr(script, "case_scores", broken)
    status, _, lines = evaluate("-s", folders / "near", "-g", folders / "gts")
    assert (status, lines) == (1, ["3D_MR_d.npz: something"])
    assert set(table(folders / "near" / "metrics.csv", "case")) == set(TRUTH) - {"3D_MR_d.npz"}


@pytest.mark.parametrize("arguments, words", [
    (["-s", "none", "-g", "gts"], "none: expected a folder"),
    (["-s", "near", "-g", "void"], "void: expected "),
    (["-s", "near", "a=near", "a=far", "-g", "gts"], "-s a=far: expected NAME=FOLDER"),
    (["-s", "near", "-g", "gts", "--tolerance", "-1"], "--tolerance: expected"),
    (["-s", "near", "-g", "gts", "--by-source", "--published"], "--published: "),
    (["-s", "near", "-g", "gts", "-o", "gts/2D_CT_a.npz"], "2D_CT_a.npz"),
])
def test_what_cannot_be_run_is_one_line(folders, evaluate, arguments, words, monkeypatch):
    (folders / "void").mkdir()
    monkeypatch.chdir(folders)
    status, _, lines = evaluate(*arguments)
    assert status == 1 and len(lines) == 1 and words in lines[0]


def test_processes_give_the_same(folders, evaluate):
    for option, count, out in (("--workers", 1, "one"), ("--threads", 2, "two")):
        assert evaluate("-s", folders / "far", "-g", folders / "gts", "-o", folders / out, option, count)[0] == 0
    assert (folders / "one" / "metrics.csv").read_text() == (folders / "two" / "metrics.csv").read_text()


def test_by_source(tmp_path, evaluate):
    for folder in ("gts", "segs"):
        (tmp_path / folder).mkdir()
    for k, name in enumerate(("2D_US_BUSI_1.npz", "2D_US_HC18_1.npz", "2D_US_HC18_2.npz")):
        np.savez(tmp_path / "gts" / name, gts=square(5, 5, 10))
        np.savez(tmp_path / "segs" / name, segs=np.roll(square(5, 5, 10), k, 0))
    assert evaluate("-s", tmp_path / "segs", "-g", tmp_path / "gts", "--by-source")[0] == 0
    text = (tmp_path / "segs/summary.md").read_text()
    assert "| US BUSI | 1 | 100.00 |" in text and "| US HC18 | 2 | 85.00 |" in text


ODD_NAME = os.fsdecode(b"2D_US_lat\xe9in.npz")                     # a file name that is no UTF-8


def test_fault_41_a_name_that_is_no_text_costs_no_table(folders, evaluate):
    np.savez(folders / "gts" / ODD_NAME, imgs=LABELS, gts=LABELS)
    np.savez(folders / "near" / ODD_NAME, segs=LABELS)
    (folders / "near" / "efficiency.csv").write_bytes(b"case,seconds\n2D_US_lat\xe9in.npz,3\n")
    words = ("-s", folders / "near", "-g", folders / "gts", "--figure", folders / "pictures")
    assert evaluate(*words)[::2] == (0, []) and (folders / "pictures" / "US.png").exists()
    text = (folders / "near" / "metrics.csv").read_text(errors="surrogateescape")
    assert f"{ODD_NAME},US,1,1.000000,1.000000,3.000000" in text
    (folders / "near" / ODD_NAME).unlink()
    assert "2D_US_lat\\udce9in.npz" in evaluate("-s", folders / "near", "-g", folders / "gts")[2][0]


def test_fault_41_a_console_of_few_characters_costs_no_table(folders, evaluate, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    evaluate("-s", folders / "near", f"b={folders / 'far'}", "-g", folders / "gts")
    sys.stdout.flush()
    assert b"\\u2212" in sys.stdout.buffer.getvalue(), "the minus of a difference"


def test_accents_of_one_and_of_two_characters_are_the_same_name(folders, evaluate):
    np.savez(folders / "gts" / unicodedata.normalize("NFC", "2D_US_é.npz"), gts=LABELS)
    np.savez(folders / "near" / unicodedata.normalize("NFD", "2D_US_é.npz"), segs=LABELS)
    (folders / "near" / "efficiency.csv").write_text(unicodedata.normalize("NFD", "case,seconds\n2D_US_é.npz,3\n"))
    assert evaluate("-s", folders / "near", "-g", folders / "gts")[::2] == (0, [])
    assert table(folders / "near" / "metrics.csv", "case")["2D_US_é.npz"]["seconds"] == "3.000000"


def test_fault_23_a_label_to_ignore_is_hinted_at(folders, evaluate):
    labels = np.maximum(LABELS, square(30, 30, 5, label=255))
    np.savez(folders / "gts" / "2D_CT_a.npz", gts=labels)
    status, _, lines = evaluate("-s", folders / "near", "-g", folders / "gts")
    assert status == 0 and len(lines) == 1 and lines[0].startswith("2D_CT_a.npz: gts: label 255 beside labels up to 1")
    np.savez(folders / "gts" / "2D_CT_a.npz", gts=np.full_like(LABELS, 255))               # nothing beside it: an object
    status, _, lines = evaluate("-s", folders / "near", "-g", folders / "gts")
    assert status == 0 and [line.partition(" of ")[0] for line in lines] == ["2D_CT_a.npz: segs: expected labels"]


def test_folders_and_names_are_found_as_they_are_given(folders, evaluate, monkeypatch):
    """Capital endings, results below the ground truth, "=" in a folder's name, -s twice, and "." as a folder."""
    (folders / "gts" / "2D_CT_a.npz").rename(folders / "gts" / "2D_CT_a.NPZ")
    (folders / "near").rename(folders / "gts" / "lr=0.1")
    monkeypatch.chdir(folders / "gts")
    status, _, lines = evaluate("-s", "near=lr=0.1", "-s", folders / "far", "-g", ".", "-o", folders / "scores")
    assert (status, lines) == (0, [])
    rows = [table(folders / "scores" / f"metrics_{name}.csv", "case") for name in ("near", "far")]
    assert all(len(row) == len(TRUTH) and all(float(line["dsc"]) > 0.5 for line in row.values()) for row in rows)


def test_the_folder_is_the_modality_of_other_names(tmp_path, evaluate, monkeypatch):
    (tmp_path / "Cells").mkdir()
    np.savez(tmp_path / "Cells" / "a.npz", imgs=LABELS, gts=LABELS, segs=LABELS)
    monkeypatch.chdir(tmp_path / "Cells")
    assert evaluate("-s", ".", "-g", ".")[0] == 0 and table("metrics.csv", "case")["a.npz"]["modality"] == "Cells"
