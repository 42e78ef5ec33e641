"""Every script on the corpus of odd_inputs.py: one line for each bad file, a result for each good one, no traceback."""
from dataclasses import replace
from pathlib import Path

import odd_inputs
import pytest
import torch
from fakes import BrightSam

import eval as eval_script
import infer
import train_distill
import train_finetune
from medficient_mini.inference.npz import write_segs
from medficient_mini.nets import efficientvit
from medficient_mini.nets.sam import NETWORKS, build_sam


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of odd files, and the field that is wrong in each of them, "" in the good ones."""
    folder = tmp_path_factory.mktemp("corpus") / "cases"
    return folder, {name: odd_inputs.fault_of(name) for name in odd_inputs.make(folder)}


def complaints(capsys, names):
    """File name -> lines of stderr that name it; every line that says "expected" must be one line about one file."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return {name: [line for line in text.splitlines() if name in line and "expected" in line] for name in names}


def test_infer(corpus, tmp_path, capsys, monkeypatch):
    folder, faults = corpus
    monkeypatch.setattr(infer, "load_model", lambda *_, **__: BrightSam())
    assert infer.main(["-i", str(folder), "-o", str(tmp_path)]) == 1
    found = complaints(capsys, faults)
    for name, fault in faults.items():
        done = (tmp_path / f"{Path(name).stem}.npz").exists()
        if fault in ("imgs", "boxes", "file"):
            assert not done and found[name], name
        elif not fault:
            assert done, name


def test_eval(corpus, tmp_path, capsys):
    folder, faults = corpus
    write_segs(tmp_path / "segs" / "2D_CT_grey.npz", odd_inputs.image()["gts"])
    assert eval_script.main(["-s", str(tmp_path / "segs"), "-g", str(folder), "-o", str(tmp_path), "--workers", "1"]) == 1
    found = complaints(capsys, faults)
    scored = (tmp_path / "metrics.csv").read_text()
    assert "2D_CT_grey.npz,CT,2,1.0" in scored
    for name, fault in faults.items():
        if fault in ("gts", "file"):
            assert found[name] and name not in scored, name


@pytest.mark.parametrize("script", [train_finetune, train_distill])
def test_training(script, corpus, tmp_path, capsys, monkeypatch):
    folder, faults = corpus
    monkeypatch.setitem(efficientvit.DEPTHS, "l0", (0, 0, 0, 0, 1))
    monkeypatch.setitem(NETWORKS, "medficientsam_l0", replace(NETWORKS["medficientsam_l0"], image_size=64))
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(build_sam("medficientsam_l0").state_dict(), weights)
    options = ["--data", folder, "--out", tmp_path / "run", "--cache", tmp_path / "cache", "--bs", 1, "--steps", 1,
               "--samples-per-epoch", 1, "--val-limit", 1, "--workers", 0, "--device", "cpu", "--amp", "off"]
    if script is train_finetune:
        options += ["--weights", weights]
    else:
        options += ["--teacher", weights, "--student", "l0", "--decoder-weights", weights, "--mask-loss", 1]
    monkeypatch.setattr(train_distill, "STATISTICS_SLICES", 1)
    status = script.main([str(option) for option in options])
    found = complaints(capsys, faults)
    for name, fault in faults.items():
        needed = script is train_finetune or "gts-missing" not in name         # stage 1 does without labels
        if name in odd_inputs.wrong_headers() and fault in ("imgs", "gts", "file") and needed:
            assert found[name], name                       # told before the training, from the headers
        elif not fault:
            assert not found[name], name
    # A wrong number among the pixels shows when the file is read: stage 2 reads all labels first, stage 1 may not.
    assert status == 0 or any(found[name] for name in odd_inputs.wrong_numbers())
