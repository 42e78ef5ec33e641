"""`infer.py` as a user runs it: on demo cases, with deterministic weights in a file of the test's own."""
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

import infer as script
from medficient_mini.nets.sam import build_sam

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "medficient_mini" / "demo"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "l0.pth"
    torch.save(build_sam("medficientsam_l0").state_dict(), path)
    return path


@pytest.fixture
def cases(tmp_path):
    """Two images and a volume of five slices."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("2D_US_demo.npz", "2D_Microscopy_demo.npz"):
        shutil.copy(DEMO / name, folder)
    with np.load(DEMO / "3D_CT_demo.npz") as volume:
        boxes = volume["boxes"].copy()
        boxes[:, 2], boxes[:, 5] = [0, 1, 2], [3, 4, 2]
        np.savez_compressed(folder / "3D_CT_short.npz", imgs=volume["imgs"][8:13], boxes=boxes, spacing=volume["spacing"])
    return folder


def infer(*arguments, code=0):
    run = subprocess.run([sys.executable, ROOT / "infer.py", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    return run


def segs(path):
    with np.load(path) as file:
        return file["segs"]


def test_a_folder_end_to_end_then_resumed_then_in_parts(cases, weights, tmp_path):
    out = tmp_path / "out"
    run = infer("-i", cases, "-o", out, "--weights", weights, "--overlay", tmp_path / "pictures", "--threads", 2)     # rounding depends on the threads
    assert "3 segmented, 0 skipped as finished, 0 failed" in run.stdout
    for path in cases.glob("*.npz"):
        with np.load(path) as case:
            shape = case["imgs"].shape[:2] if path.name.startswith("2D") else case["imgs"].shape
            found = segs(out / path.name)
            assert found.shape == shape and found.dtype == np.uint8
            assert set(np.unique(found)) <= set(range(len(case["boxes"]) + 1))
        assert (tmp_path / "pictures" / f"{path.stem}.png").stat().st_size > 1000
    rows = (out / "efficiency.csv").read_text().split()
    assert rows[0] == "case,seconds" and len(rows) == 4

    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    run = infer("-i", cases, "-o", out, "--weights", weights)
    assert "0 segmented, 3 skipped as finished" in run.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}

    for k in (1, 2, 3):
        infer("-i", cases, "-o", tmp_path / "parts", "--weights", weights, "--threads", 2, "--part", f"{k}/3")
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.npz")) == sorted(before)
    for name in before:
        assert (segs(tmp_path / "parts" / name) == segs(out / name)).all()


def test_bad_cases_cost_one_line_each_and_the_others_go_on(cases, weights, tmp_path):
    (cases / "2D_MR_a.npz").write_bytes(b"not a zip file")
    np.savez(cases / "2D_MR_b.npz", imgs=np.zeros((9, 9), np.uint8))
    np.savez(cases / "2D_MR_c.npz", imgs=np.zeros((9, 9), np.uint8), boxes=np.array([[20, 20, 30, 30]]))
    np.savez(cases / "2D_MR_d.npz", imgs=np.zeros((9, 9), np.uint8), boxes=np.zeros((0, 4)))
    run = infer("-i", cases, "-o", tmp_path / "out", "--weights", weights, code=1)
    for name in "abc":
        assert sum(f"2D_MR_{name}.npz" in line for line in run.stderr.splitlines()) == 1
    assert not segs(tmp_path / "out" / "2D_MR_d.npz").any()
    assert len(list((tmp_path / "out").glob("*.npz"))) == 4 and "3 failed" in run.stdout


@pytest.mark.parametrize("arguments, expected", [
    (["-i", "absent", "-o", "out"], "absent"),
    (["-i", DEMO, "-o", "out", "--weights", "absent.pth"], "absent.pth"),
    (["-i", DEMO, "-o", "out", "--part", "4/3"], "--part"),
])
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    run = infer(*arguments, code=1)
    assert expected in run.stderr and len(run.stderr.strip().splitlines()) == 1


def test_an_output_that_is_a_file_and_neither_torchvision_nor_scipy_imported(cases, weights, tmp_path):
    (tmp_path / "file").write_text("")
    run = infer("-i", cases, "-o", tmp_path / "file", "--weights", weights, code=1)
    assert "file" in run.stderr
    code = ("import sys; sys.argv = ['infer.py']; sys.path.insert(0, sys.argv[0] or '.'); import infer;"
            "print([m for m in ('torchvision', 'scipy') if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr


def inside(monkeypatch, *arguments):
    """infer.py in this process, which spares the seconds of importing torch."""
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments)])
    return script.main()


@pytest.mark.parametrize("name", ["medficientsam_l1", "medficientsam_l2", "medsam_vit_b", "lite_medsam"])
def test_every_network_takes_images_and_volumes(tmp_path, monkeypatch, name):
    torch.manual_seed(0)
    torch.save(build_sam(name).state_dict(), tmp_path / "w.pth")
    rng = np.random.default_rng(0)
    image, volume = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8), rng.integers(0, 255, (2, 30, 20), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "2D_US_a.npz", imgs=image, boxes=np.array([[5, 5, 30, 30]], np.uint8))
    np.savez(tmp_path / "in" / "3DBox_CT_b.npz", imgs=volume, boxes=np.array([[2, 3, 0, 15, 25, 1]]))
    assert inside(monkeypatch, "-i", tmp_path / "in", "-o", tmp_path / "out", "--weights", tmp_path / "w.pth") == 0
    assert segs(tmp_path / "out" / "2D_US_a.npz").shape == (40, 60)
    assert segs(tmp_path / "out" / "3DBox_CT_b.npz").shape == (2, 30, 20)


def test_a_bare_encoder_with_a_decoder_from_another_file(tmp_path, monkeypatch, weights):
    state = torch.load(weights, weights_only=True)
    encoder = {key: value for key, value in state.items() if key.startswith("image_encoder.")}
    torch.save({"network": "medficientsam_l0", "model": encoder}, tmp_path / "distilled.pt")
    case = DEMO / "2D_US_demo.npz"
    for out, words in (("a", ["--weights", weights]), ("b", ["--weights", tmp_path / "distilled.pt", "--decoder-weights", weights])):
        assert inside(monkeypatch, "-i", case, "-o", tmp_path / out, *words) == 0
    assert (segs(tmp_path / "a" / case.name) == segs(tmp_path / "b" / case.name)).all()


def test_half_open_boxes_ranks_and_overwriting(cases, tmp_path, monkeypatch, weights):
    out, volume = tmp_path / "out", cases / "3D_CT_short.npz"
    common = ["-o", out, "--weights", weights]
    seen, given = [], []

    def segment_volume(model, volume, boxes, start=None, **options):
        seen.append(boxes[:, 5].tolist())
        given.append(options)
        return np.zeros(volume.shape, np.uint8)

    monkeypatch.setattr(script, "segment_volume", segment_volume)
    assert inside(monkeypatch, "-i", volume, *common) == 0
    assert inside(monkeypatch, "-i", volume, *common) == 0                   # finished: skipped
    assert inside(monkeypatch, "-i", volume, *common, "--overwrite", "--z-exclusive") == 0
    assert seen == [[3, 4, 2], [2, 3, 2]]
    words = ["--propagation", "published", "--overlap", "later", "--cache-mb", "7"]
    assert inside(monkeypatch, "-i", volume, *common, "--overwrite", *words) == 0
    assert given[1:] == [dict(propagation="sections", overlap="higher", cache_mb=1024),
                         dict(propagation="published", overlap="later", cache_mb=7)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert inside(monkeypatch, "-i", cases, "-o", tmp_path / "rank", "--weights", weights) == 0
    assert [p.name for p in (tmp_path / "rank").glob("*.npz")] == ["2D_US_demo.npz"]


def test_outputs_never_become_inputs_nor_replace_them(cases, tmp_path, monkeypatch, weights, capsys):
    assert inside(monkeypatch, "-i", cases, "-o", cases, "--weights", weights) == 1
    assert "another folder" in capsys.readouterr().err
    assert inside(monkeypatch, "-i", cases / "2D_US_demo.npz", "-o", cases / "out", "--weights", weights) == 0
    assert inside(monkeypatch, "-i", cases / "2D_US_demo.npz", "-o", cases.parent, "--weights", weights) == 0
    assert "1 segmented" in capsys.readouterr().out.splitlines()[-1]
    for arguments in (["--device", "nonsense"], ["--threads", "-1"]):
        assert inside(monkeypatch, "-i", cases, "-o", tmp_path / "x", "--weights", weights, *arguments) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_killed_run_leaves_whole_files(cases, weights, tmp_path):
    def finished():
        return [path for path in (tmp_path / "out").glob("*.npz") if not path.name.startswith(".")]

    run = subprocess.Popen([sys.executable, ROOT / "infer.py", "-i", cases, "-o", tmp_path / "out", "--weights", weights],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while run.poll() is None and not finished() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert finished() and all(segs(path).ndim in (2, 3) for path in finished())
