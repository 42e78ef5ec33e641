"""`infer.py` on NPZ cases, in this process with a stand-in network, but for what only a process of its own can show."""
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import BrightSam, squares

import infer
from medficient_mini.nets.sam import build_sam
from medficient_mini.userfiles import results

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "medficient_mini" / "demo"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words, code=0) -> (stdout, lines of stderr that are no progress) of infer.py; run.loaded: calls so far."""
    def load_model(*arguments):
        run.loaded.append(arguments)
        return BrightSam()

    def run(*words, code=0):
        capsys.readouterr()
        assert infer.main([*map(str, words)]) == code
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if not line.startswith("segmenting")]

    run.loaded = []
    monkeypatch.setattr(infer, "load_model", load_model)
    return run


@pytest.fixture
def cases(tmp_path):
    """Two images, of one object and of two that are nested (the inner box first), and a volume of three slices."""
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "2D_US_a.npz", imgs=squares((60, 90), [(20, 40, 30, 70)]), boxes=[[25, 15, 75, 45]])
    np.savez(tmp_path / "in" / "2D_US_b.npz", imgs=squares((64, 64), [(8, 56, 8, 56)]),
             boxes=[[24, 24, 40, 40], [4, 4, 60, 60]])
    np.savez(tmp_path / "in" / "3D_CT_c.npz", imgs=np.stack([squares((64, 64), [(20, 44, 20, 44)])] * 3),
             boxes=[[16, 16, 0, 48, 48, 2]])
    return tmp_path / "in"


def stored(path, name="segs"):
    with np.load(path, allow_pickle=False) as file:
        return file[name] if name in file.files else None


def rows(folder):
    with open(folder / "efficiency.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_folder_end_to_end_then_resumed_then_in_parts(cases, tmp_path, run):
    out, err = run("-i", cases, "-o", tmp_path / "out", "--overlay", tmp_path / "pictures")
    assert out.startswith("3 segmented, 0 skipped as finished, 0 failed") and out.count("\n") == 1 and not err
    truth = squares((60, 90), [(20, 40, 30, 70)]) > 0
    found = stored(tmp_path / "out" / "2D_US_a.npz")
    assert found.dtype == np.uint8 and ((found == 1) != truth).mean() < 0.05
    assert stored(tmp_path / "out" / "3D_CT_c.npz").any((1, 2)).tolist() == [True] * 3
    assert all((tmp_path / "pictures" / f"{path.stem}.png").stat().st_size > 1000 for path in cases.glob("*.npz"))
    assert [row[0] for row in rows(tmp_path / "out")] == ["case", "2D_US_a.npz", "2D_US_b.npz", "3D_CT_c.npz"]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}
    run.loaded.clear()
    assert "0 segmented, 3 skipped as finished" in run("-i", cases, "--out", tmp_path / "out")[0]
    assert not run.loaded                                                    # finished cases need no network
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}
    for k in (1, 2, 3):
        assert f"part {k}/3: 1 of 3 cases" in run("-i", cases, "-o", tmp_path / "parts", "--part", f"{k}/3")[0]
    for name in before:
        assert (stored(tmp_path / "parts" / name) == stored(tmp_path / "out" / name)).all()


def test_a_share_is_taken_from_torchrun_alone(cases, tmp_path, run, monkeypatch):  # fault 11
    """Fault 11: RANK and WORLD_SIZE left in the environment made a plain run do a part of the cases."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert "part 1/1: 3 of 3 cases" in run("-i", cases, "-o", tmp_path / "all")[0]
    for name, value in (("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert "part 2/3: 1 of 3 cases" in run("-i", cases, "-o", tmp_path / "rank")[0]
    assert [path.name for path in (tmp_path / "rank").glob("*.npz")] == ["2D_US_b.npz"]


def test_finished_cases_are_drawn_from_their_masks(cases, tmp_path, run):  # fault 10
    """Fault 10: --overlay on finished cases drew nothing."""
    run("-i", cases, "-o", tmp_path / "out")
    out, err = run("-i", cases, "-o", tmp_path / "out", "--overlay", tmp_path / "pictures")
    assert "0 segmented, 3 skipped" in out and not err
    run("-i", cases, "-o", tmp_path / "other", "--overlay", tmp_path / "at_once")
    for picture in (tmp_path / "at_once").glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "pictures" / picture.name).read_bytes()


def test_what_made_a_result_decides_whether_it_is_finished(cases, tmp_path, run):  # fault 37
    """Fault 37: other boxes, weights or options left the old masks as finished."""
    common = ("-i", cases, "-o", tmp_path / "out")
    run(*common)
    assert "2D_US_a.npz: done again: other overlap" in run(*common, "--overlap", "later")[0]
    assert "0 segmented, 3 skipped" in run(*common, "--overlap", "later")[0]
    torch.save({}, tmp_path / "w.pth")
    assert "3 segmented, 0 skipped" in run(*common, "--overlap", "later", "--weights", tmp_path / "w.pth")[0]
    assert "done again: other weights, other overlap" in run(*common)[0]
    np.savez(cases / "2D_US_a.npz", imgs=squares((60, 90), [(20, 40, 30, 70)]), boxes=[[0, 0, 35, 45]])
    out, _ = run(*common)
    assert "2D_US_a.npz: done again: other input" in out and "1 segmented, 2 skipped" in out
    assert stored(tmp_path / "out" / "2D_US_a.npz")[:, 40:].max() == 0
    np.savez(tmp_path / "out" / "2D_US_b.npz", segs=np.zeros((64, 64), np.uint8))           # of an earlier version
    (tmp_path / "out" / "3D_CT_c.npz").write_bytes(b"torn")
    out, _ = run(*common)
    assert out.count("done again: the result does not say what made it") == 2 and "2 segmented, 1 skipped" in out


def test_objects_that_lose_their_masks_are_named(cases, tmp_path, run):
    """Issue 20: a box whose object ended with no pixel was nobody's business. Fault 38: nor was an empty result."""
    np.savez(cases / "2D_US_d.npz", imgs=squares((64, 64), [(8, 20, 8, 20)]), boxes=[[4, 4, 24, 24], [40, 40, 60, 60]])
    out, err = run("-i", cases, "-o", tmp_path / "out", "--overlap", "later")
    assert len(err) == 2 and err[0].startswith("2D_US_b.npz: label 1: 256 of the 256 pixels")
    assert err[1] == "2D_US_d.npz: label 2: nothing found"
    lost = {row[0]: row[2] for row in rows(tmp_path / "out")}
    assert lost["2D_US_a.npz"] == "" and f"2D_US_b.npz: {lost['2D_US_b.npz']}" == err[0]
    out, err = run("-i", cases, "-o", tmp_path / "default")
    assert err == ["2D_US_d.npz: label 2: nothing found"]
    assert np.unique(stored(tmp_path / "default" / "2D_US_b.npz")).tolist() == [0, 1, 2]


def test_separate_masks_of_objects_that_overlap(cases, tmp_path, run):
    np.savez(cases / "3D_CT_d.npz", imgs=np.stack([squares((64, 64), [(6, 58, 6, 58)])] * 2),
             boxes=[[4, 4, 0, 60, 60, 1], [9, 9, 0, 30, 30, 1]])
    run("-i", cases, "-o", tmp_path / "out", "--separate")
    masks = stored(tmp_path / "out" / "2D_US_b.npz", "masks")
    assert masks.dtype == bool and masks.shape == (2, 64, 64)
    assert masks[:, 30, 30].tolist() == [True, True] and masks[:, 10, 10].tolist() == [False, True]
    assert stored(tmp_path / "out" / "2D_US_a.npz", "masks") is None
    bits = stored(tmp_path / "out" / "3D_CT_d.npz", "bits")
    masks = np.unpackbits(bits, axis=0, count=2, bitorder="little")
    assert bits.shape == (1, 2, 64, 64)
    assert masks[:, 1, 20, 20].tolist() == [1, 1] and masks[:, 1, 50, 50].tolist() == [1, 0]


def test_bad_cases_cost_one_line_each_and_the_others_go_on(cases, tmp_path, run, monkeypatch):
    (cases / "2D_MR_a.npz").write_bytes(b"not a zip file")
    np.savez(cases / "2D_MR_b.npz", imgs=np.zeros((9, 9), np.uint8))
    np.savez(cases / "2D_MR_d.npz", imgs=np.zeros((9, 9), np.uint8), boxes=np.zeros((0, 4)))
    (cases / "sub").mkdir()
    shutil.copy(cases / "2D_US_a.npz", cases / "sub")                                       # the same result
    out, err = run("-i", cases, "-o", tmp_path / "out", code=1)
    assert "4 segmented, 0 skipped as finished, 3 failed" in out
    assert [line.split(": ")[0].split("/")[-1] for line in err] == ["2D_US_a.npz", "2D_MR_a.npz", "2D_MR_b.npz"]
    assert not stored(tmp_path / "out" / "2D_MR_d.npz").any()


@pytest.mark.parametrize("room", ["segment_image", "write"])
def test_an_unexpected_error_costs_one_case(cases, tmp_path, run, monkeypatch, room):  # fault 14
    """Fault 14: an error of a kind that nobody had thought of ended the batch. Fault 41: it is one line."""
    right = getattr(infer, room)

    def wrong(*arguments, **options):
        if any(getattr(argument, "shape", None) in ((60, 90), (60, 90, 3)) for argument in arguments):
            raise AssertionError("broken\nin\nlines")
        return right(*arguments, **options)

    monkeypatch.setattr(infer, room, wrong)
    out, err = run("-i", cases, "-o", tmp_path / "out", code=1)
    assert err == ["2D_US_a.npz: broken"] and "2 segmented, 0 skipped as finished, 1 failed" in out


def test_no_result_waits_to_be_written(cases, tmp_path, run, monkeypatch):  # fault 18
    """Fault 18: where writing is slow, all results waited in memory; now those of the workers at most."""
    for name in "defgh":
        shutil.copy(cases / "2D_US_a.npz", cases / f"2D_US_{name}.npz")
    segmented, written, waiting, right = [], [], [], infer.segment_image
    monkeypatch.setattr(infer, "segment_image", lambda *a, **o: segmented.append(1) or right(*a, **o))
    monkeypatch.setattr(infer, "write", lambda *_: time.sleep(0.02) or written.append(1)
                        or waiting.append(len(segmented) - len(written)) or ([], []))
    run("-i", cases, "-o", tmp_path / "out")
    assert len(written) == 8 and max(waiting) <= infer.workers_on(torch.device("cpu"))


def test_names_with_commas_and_quotes_in_the_table(cases, tmp_path, run):  # fault 9
    """Fault 9: they broke efficiency.csv."""
    shutil.copy(cases / "2D_US_a.npz", cases / '2D_US_"x", y.npz')
    run("-i", cases, "-o", tmp_path / "out")
    assert '2D_US_"x", y.npz' in [row[0] for row in rows(tmp_path / "out")]
    assert all(len(row) == 3 for row in rows(tmp_path / "out"))


def test_options_reach_the_network(cases, tmp_path, run, monkeypatch):
    seen = []

    def segment_volume(model, volume, boxes, drawn_slice, propagation, **options):
        options["progress"](1, 3)
        seen.append((boxes[:, 5].tolist(), propagation, options["overlap"]))
        return results.Composition(volume.shape, 1)

    monkeypatch.setattr(infer, "segment_volume", segment_volume)
    run("-i", cases / "3D_CT_c.npz", "-o", tmp_path / "out")
    run("-i", cases / "3D_CT_c.npz", "-o", tmp_path / "out", "--z-exclusive", "--propagation", "published",
        "--overlap", "later", "--precision", "f32", "--device", "cuda", "--threads", 1)
    assert seen == [([2], "sections", "inside"), ([1], "published", "later")]
    assert run.loaded == [("l1", None, "cpu", "auto"), ("l1", None, "cuda", "f32")]


@pytest.mark.parametrize("words, expected", [
    (["-i", "absent", "-o", "out"], "absent"), (["-i", DEMO, "-o", "out", "--weights", "absent.pth"], "absent.pth"),
    (["-i", DEMO, "-o", "out", "--part", "4/3"], "--part"), (["-i", DEMO, "-o", DEMO], "another folder"),
    (["-i", DEMO, "-o", "file"], "file"), (["-i", DEMO, "-o", "out", "--threads", "0"], "--threads: expected"),
    (["-i", DEMO, "-o", "out", "--device", "banana"], "--device: expected"),
    (["-i", DEMO, "-o", "out", "--window", "lung"], "--axis, --series, --window: expected boxes of your own"),
    (["-i", DEMO, "-o", "out", "--box", 1, 2, 3, 4, "--z-exclusive"], "--z-exclusive: expected NPZ cases")])
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, run, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    _, err = run(*words, code=1)
    assert len(err) == 1 and expected in err[0]


@pytest.mark.parametrize("device, expected", [("cuda", "precision int8: expected with the CPU alone, found device cuda"),
                                              ("banana", "banana")])
def test_a_precision_beside_a_gpu_is_refused(tmp_path, capsys, device, expected):  # fault 12
    """Fault 12: --precision was ignored with --device cuda."""
    words = ["-i", str(DEMO), "-o", str(tmp_path / "out"), "--device", device, "--precision", "int8"]
    assert infer.main(words) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("segmenting")]
    assert len(err) == 1 and expected in err[0]


def test_a_link_is_an_input_where_it_lies(cases, tmp_path, run):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "2D_US_a.npz"
    link.symlink_to(cases / "2D_US_a.npz")
    _, err = run("-i", link, "-o", tmp_path / "links", code=1)
    assert len(err) == 1 and "another folder" in err[0] and link.is_symlink()
    assert "1 segmented" in run("-i", tmp_path / "links", "-o", cases)[0] and link.is_symlink()


def test_results_below_the_input_are_no_cases(cases, run):
    one = cases / "2D_US_a.npz"
    assert "1 segmented" in run("-i", one, "-o", cases / "out")[0]
    assert "1 segmented" in run("-i", one, "-o", cases.parent)[0]
    assert "2 segmented, 1 skipped" in run("-i", cases, "-o", cases / "out", "--overlay", cases / "pictures")[0]
    out, _ = run("-i", cases, "-o", cases / "out", "--overlay", cases / "pictures")
    assert "0 segmented, 3 skipped" in out and out.startswith("3 files in ") and "left out: results, not cases" in out


@pytest.mark.parametrize("weights", ["l1", "l0"])
def test_the_shipped_weights_find_the_demo_objects(tmp_path, one_thread, weights):
    """The package's own weights, through the whole way, against the truth in the demo cases; of the volume 3 slices."""
    shutil.copytree(DEMO, tmp_path / "in", ignore=shutil.ignore_patterns("3D*"))
    with np.load(DEMO / "3D_CT_demo.npz") as whole:
        boxes = whole["boxes"].copy()
        boxes[:, [2, 5]] = np.clip(boxes[:, [2, 5]].astype(int) - 9, 0, 2)
        np.savez(tmp_path / "in" / "3D_CT_demo.npz", imgs=whole["imgs"][9:12], gts=whole["gts"][9:12], boxes=boxes)
    assert infer.main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--weights", weights]) == 0
    for path in (tmp_path / "in").glob("*.npz"):
        truth, segs = stored(path, "gts"), stored(tmp_path / "out" / path.name)
        for label in np.unique(truth[truth > 0]):
            dsc = 2 * ((segs == label) & (truth == label)).sum() / ((segs == label).sum() + (truth == label).sum())
            assert dsc > 0.9, (path.name, label, dsc)            # 0.939 to 0.987 when it was written


def test_neither_torchvision_nor_scipy_is_imported():
    code = "import sys, infer; print([name for name in ('torchvision', 'scipy', 'nibabel', 'SimpleITK') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stderr


def test_a_killed_run_leaves_whole_files(tmp_path):
    torch.manual_seed(0)
    torch.save(build_sam("medficientsam_l0").state_dict(), tmp_path / "l0.pth")
    (tmp_path / "in").mkdir()
    for k in range(50):
        np.savez(tmp_path / "in" / f"2D_US_{k}.npz", imgs=squares((30, 40), [(5, 20, 5, 20)]), boxes=[[3, 3, 22, 22]])

    def finished():
        return [path for path in (tmp_path / "out").glob("*.npz") if not path.name.startswith(".")]

    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "--weights", tmp_path / "l0.pth", "--threads", "1"]
    run = subprocess.Popen([sys.executable, ROOT / "infer.py", *words], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while run.poll() is None and not finished() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and 0 < len(finished()) < 50           # killed in mid-run, not after it
    assert all(stored(path).shape == (30, 40) for path in finished())


def test_a_name_that_is_no_text_and_a_console_of_few_characters(cases, tmp_path, run, monkeypatch):
    """Fault 41: the line about a case failed where the console cannot show it."""
    name = os.fsdecode(b"2D_US_lat\xe9in.npz")
    np.savez(cases / name, imgs=np.zeros((9, 9), np.uint8), boxes=[[1, 1, 5, 5]])
    assert run("-i", cases / name, "-o", tmp_path / "out")[1] == ["2D_US_lat\\udce9in.npz: label 1: nothing found"]
    (cases / name).rename(cases / "2D_US_é.npz")
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert infer.main(["-i", str(cases / "2D_US_é.npz"), "-o", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("wrong", ["overlay", "efficiency.csv"])
def test_decoration_costs_no_masks(cases, tmp_path, run, wrong):  # fault 9
    """Fault 9 in infer.py: a picture or a table that could not be written took the masks with it."""
    (tmp_path / "file").write_text("a file where the folder should be")
    folder = tmp_path / "file" if wrong == "overlay" else tmp_path / "pictures"
    if wrong == "efficiency.csv":
        (tmp_path / "out" / "efficiency.csv").mkdir(parents=True)
    out, err = run("-i", cases / "2D_US_a.npz", "-o", tmp_path / "out", "--overlay", folder, code=1)
    assert "1 segmented, 0 skipped as finished, 0 failed" in out and stored(tmp_path / "out" / "2D_US_a.npz").any()
    assert len(err) == 1 and err[0].startswith("2D_US_a.npz: ") and wrong in err[0]
    assert (tmp_path / "pictures" / "2D_US_a.png").exists() == (wrong != "overlay")
    assert (tmp_path / "out" / "efficiency.csv").is_file() == (wrong == "overlay")


def test_a_case_that_fails_now_says_that_its_masks_are_old(cases, tmp_path, run):
    """Fault 37: the masks of other boxes stayed without a word."""
    run("-i", cases / "2D_US_a.npz", "-o", tmp_path / "out")
    np.savez(cases / "2D_US_a.npz", imgs=np.zeros((60, 90), np.uint8), boxes=[[9, 9, 5, 5]])
    _, err = run("-i", cases / "2D_US_a.npz", "-o", tmp_path / "out", code=1)
    assert len(err) == 1 and "boxes: expected" in err[0] and "2D_US_a.npz holds the masks of an earlier run" in err[0]


@pytest.mark.parametrize("rank, world", [("5", "4"), ("-1", "4"), ("", "4"), ("a", "4"), ("0", "0")])
def test_a_share_that_is_none(cases, tmp_path, run, monkeypatch, rank, world):  # fault 11
    """Fault 11: it made a run do nothing, or the cases of another."""
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    _, err = run("-i", cases, "-o", tmp_path / "out", code=1)
    assert len(err) == 1 and err[0].startswith("RANK, WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE, found ")
