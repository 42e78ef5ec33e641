"""8 bits: storage, the pieces of the running form, calibration, and the command that makes the file."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medficient_mini.cpu import fast
from medficient_mini.cpu.convolutions import fold
from medficient_mini.cpu.int8 import (LOWEST, Observer, QuantizedBlock, QuantizedConv, calibrate,
                                      gelu_table, main, network_inputs, scale_of)
from medficient_mini.inference.packing import expand_state, pack_state, quantize_rows
from medficient_mini.nets.efficientvit import ConvLayer, FusedMBConv, MBConv, Residual
from medficient_mini.nets.sam import build_sam

pytestmark = pytest.mark.usefixtures("one_thread")
needs_int8 = pytest.mark.skipif(fast.missing_operator("int8") is not None, reason="no 8-bit operators here")


@pytest.fixture(scope="module")
def l0():
    torch.manual_seed(0)
    model = build_sam("medficientsam_l0").eval()
    for parameter in model.image_encoder.parameters():
        if parameter.ndim == 4:                       # torch's own start lets the signal die out over the layers
            torch.nn.init.normal_(parameter, std=(1.5 / parameter[0].numel()) ** 0.5)
    return model


def channels_last(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------- storage

def some_state():
    torch.manual_seed(0)
    return {"a.weight": torch.randn(96, 64, 3, 3) * torch.rand(96, 1, 1, 1), "a.bias": torch.randn(96),
            "s.scale": torch.ones(1),
            "empty.weight": torch.zeros(64, 64),
            "token.weight": torch.randn(4, 256), "n.num_batches_tracked": torch.tensor(3)}


def test_packing_keeps_small_tensors_and_bounds_the_error(tmp_path):
    state = some_state()
    torch.save(pack_state(state), tmp_path / "packed.pth")
    packed = torch.load(tmp_path / "packed.pth", weights_only=True)
    assert packed["a.weight"].dtype == torch.int8 and packed["a.weight.scale"].shape == (96,)
    expanded = expand_state(packed)
    assert expanded.keys() == state.keys()
    assert all(torch.equal(expanded[key], state[key]) for key in state if key != "a.weight")
    error = (expanded["a.weight"] - state["a.weight"]).flatten(1).norm(dim=1)
    assert (error < 0.012 * state["a.weight"].flatten(1).norm(dim=1)).all()
    # no worse than rounding to the largest weight
    largest = state["a.weight"].flatten(1).abs().amax(1) / 127
    plain = (torch.fake_quantize_per_channel_affine(state["a.weight"], largest, torch.zeros(96), 0, -127, 127)
             - state["a.weight"]).flatten(1).norm(dim=1)
    assert (error <= plain * 1.001).all()


def test_packing_twice_loses_nothing():
    once = pack_state(some_state())
    twice = pack_state(expand_state(once))
    assert all(torch.equal(once[key], twice[key]) for key in once if once[key].dtype == torch.int8)
    assert torch.equal(quantize_rows(expand_state(once)["a.weight"], torch.ones(1))[0], once["a.weight"])


# ------------------------------------------------------------------------------------------------------ 8-bit pieces

@pytest.mark.parametrize("lowest, highest", [(-4.0, 6.0), (-0.5, 2.0), (0.0, 3.0), (-2.0, -0.5)])
def test_gelu_table(lowest, highest):
    step, zero = scale_of(lowest, highest)
    table, (after_step, after_zero) = gelu_table(step, zero)
    values = (torch.arange(256) - zero) * step
    found = (torch.from_numpy(table).float() - after_zero) * after_step
    assert (found - F.gelu(values, approximate="tanh")).abs().max() <= after_step * 0.51


def coded(x, step, zero):
    return (x / step + zero).round().clamp(0, 255).to(torch.uint8)


@needs_int8
@pytest.mark.parametrize("kernel, stride, groups", [(1, 1, 1), (3, 2, 1), (3, 2, 32)])
def test_convolution_of_codes(kernel, stride, groups):
    torch.manual_seed(0)
    layer = ConvLayer(32, 32, kernel, stride, groups, act=False).eval()
    layer.norm.running_var.uniform_(0.5, 2.0)
    folded = fold(layer.conv, layer.norm)
    integers, scale = quantize_rows(folded.weight.detach(), torch.ones(1))
    conv = QuantizedConv(layer)
    for source in (scale_of(-1.0, 2.0), scale_of(-30.0, 20.0)):               # zero is not code 0: padding must know
        codes = coded(10 * channels_last(1, 32, 8, 8), *source)
        expected = F.conv2d((codes.float() - source[1]) * source[0], integers * scale.reshape(-1, 1, 1, 1),
                            folded.bias.detach(), stride, kernel // 2, groups=groups)
        assert (conv(codes, source) - expected).abs().max() < 1e-5 * expected.abs().max()
        residual = channels_last(*expected.shape)
        wanted = residual + expected
        assert (conv(codes, source, residual=residual) - wanted).abs().max() < 1e-5 * expected.abs().max()
        step, zero = target = scale_of(float(expected.min()), float(expected.max()))
        assert ((conv(codes, source, target).float() - zero) * step - expected).abs().max() < step * 0.6


def block_and_ranges(kind, shortcut):
    torch.manual_seed(0)
    plain, x, seen = Residual(kind(32, 32, 4), shortcut).eval(), channels_last(2, 32, 16, 16), {}
    for layer in plain.main.children():
        if layer.conv.bias is not None:
            layer.conv.bias.detach().zero_()                                  # so that the block scales with its input
    hooks = [layer.act.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, args[0]))
             for name, layer in plain.main.named_children() if layer.act is not None]
    plain(x)
    for hook in hooks:
        hook.remove()
    m = x.abs().max()
    return plain, x, [[1.0], *([float(v.min() / m), float(v.max() / m)] for v in seen.values())]


@needs_int8
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("kind", [FusedMBConv, MBConv])
@torch.inference_mode()
def test_block_in_8_bits(kind, shortcut):
    plain, x, ranges = block_and_ranges(kind, shortcut)
    for factor in (1.0, 40.0):                                                # ranges follow the input's size
        expected = plain(factor * x)
        found = QuantizedBlock(plain, ranges)((factor * x).contiguous(memory_format=torch.channels_last))
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()


@needs_int8
@torch.inference_mode()
def test_an_input_beyond_its_range_saturates():
    plain, x, ranges = block_and_ranges(FusedMBConv, False)
    expected = plain(x.clamp(-0.3 * x.abs().max(), 0.3 * x.abs().max()))
    found = QuantizedBlock(plain, [[0.3], *ranges[1:]])(x)
    assert (found - expected).norm() < 0.05 * expected.norm()


@needs_int8
@pytest.mark.parametrize("where", ["input", "inside"])
@torch.inference_mode()
def test_gelu_is_kept_in_any_memory_layout(where):                            # fault 6
    plain, x, ranges = block_and_ranges(FusedMBConv, True)
    block, expected = QuantizedBlock(plain, ranges), plain(x)
    if where == "inside":                                                     # a convolution that writes contiguous maps
        forward = block.convs[0].forward
        block.convs[0].forward = lambda *arguments: forward(*arguments).contiguous()
    found = block(x.contiguous() if where == "input" else x.clone())
    assert (found - expected).norm() < 0.05 * expected.norm()


# ------------------------------------------------------------------------------------------------------- calibration

def observe(images, entries=None):
    """An Observer that saw these images' values, of blocks whose input was `entries`, and the range it chose."""
    torch.manual_seed(0)
    block, act = torch.nn.Identity(), torch.nn.Identity()
    observer = Observer(act, Observer(block) if entries else None)
    for i, image in enumerate(images):
        if entries:
            block(entries[i])
        act(image)
    return observer.best_range()


def test_input_range_leaves_out_what_is_rare():
    assert observe([torch.rand(100_000) * 4 - 2])[0] == pytest.approx(1.0)
    outlier = torch.cat([torch.rand(100_000) * 4 - 2, torch.full((20,), 3.0)])
    assert observe([outlier])[0] == pytest.approx(2 / 3, abs=0.06)


def test_gelu_range_is_in_multiples_of_the_input_and_stops_where_gelu_is_zero():
    images = [torch.linspace(-5 * m, 3 * m, 10_000) for m in (1.0, 20.0)]
    low, high = observe(images, [torch.tensor([0.0, -m]) for m in (1.0, 20.0)])
    assert 2.4 <= high <= 3.01
    assert LOWEST - 0.01 <= low <= -1.5


def test_an_images_size_does_not_decide_alone():
    image = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    small = observe([image])[0]
    assert abs(observe([image, 1000 * image.flip(0)])[0] - small) <= 0.1


def blocks(model):
    return {name for name, module in model.image_encoder.named_modules() if isinstance(module, (FusedMBConv, MBConv))}


@needs_int8
@torch.inference_mode()
def test_encoder_in_8_bits_is_close(l0):
    new, *seen = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    l0.calibration = calibrate(l0.image_encoder, seen)
    form = fast.to_fast(l0, "int8")
    assert sum(isinstance(module, QuantizedBlock) for module in form.modules()) == len(blocks(l0))
    expected = l0.image_encoder(new)
    assert (form.image_encoder(new) - expected).norm() < 0.1 * expected.norm()


# ----------------------------------------------------------------------------------------------------------- command

def write_case(path, image):
    box = [2, 2, 9, 9] if image.shape[-1] == 3 else [2, 2, 1, 9, 9, 3]
    np.savez(path, imgs=image, boxes=np.array([box]), spacing=np.ones(3))


def test_cases_are_dealt_over_the_modalities(tmp_path, monkeypatch):
    monkeypatch.setattr("medficient_mini.cpu.int8.to_network", lambda image, size: torch.tensor(image.max() + size))
    for i in range(6):
        write_case(tmp_path / f"2D_CT_a_{i}.npz", np.full((20, 30, 3), i, np.uint8))
    write_case(tmp_path / "2D_US_b_0.npz", np.full((20, 30, 3), 9, np.uint8))
    write_case(tmp_path / "3D_MR_c_0.npz", np.arange(20, 25, dtype=np.uint8).repeat(600).reshape(5, 20, 30))
    assert [x.item() for x in network_inputs(tmp_path, 2, 100)] == [100, 105, 109, 122]      # 22: the middle slice


def test_command(l0, tmp_path, capsys, monkeypatch):
    write_case(tmp_path / "3D_CT_a_0.npz", np.full((5, 20, 30), 90, np.uint8))
    torch.save({"network": l0.name, "model": l0.state_dict()}, tmp_path / "w.pth")
    monkeypatch.setattr("medficient_mini.cpu.int8.to_network", lambda image, size: torch.rand(3, 64, 64))
    arguments = ["-w", str(tmp_path / "w.pth"), "-i", str(tmp_path), "-o", str(tmp_path / "w8.pth")]
    assert main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "w8.pth").stat().st_size < 0.27 * (tmp_path / "w.pth").stat().st_size
    content = torch.load(tmp_path / "w8.pth", weights_only=True)
    assert expand_state(content["model"]).keys() == l0.state_dict().keys()
    assert {key.rpartition(".")[0] for key in content["calibration"]} == blocks(l0)


def test_command_refuses_another_network(tmp_path, capsys, monkeypatch):
    model = SimpleNamespace(name="lite_medsam", image_encoder=torch.nn.Identity())
    monkeypatch.setattr("medficient_mini.cpu.int8.load_model", lambda *files: model)
    assert main(["-w", "w.pth", "-i", str(tmp_path), "-o", str(tmp_path / "w8.pth")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "EfficientViT" in error and not (tmp_path / "w8.pth").exists()
    assert main(["-w", "w.pth", "-i", str(tmp_path), "-o", str(tmp_path / "w8.pth"), "--count", "0"]) == 1
    assert capsys.readouterr().err == "--count: expected a number above 0, found 0\n"
