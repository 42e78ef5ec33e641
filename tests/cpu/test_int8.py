"""8-bit storage of weights, the 8-bit encoder, and the command that makes its file."""
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medficient_mini.cpu import fast
from medficient_mini.inference.checkpoint import atomic_torch_save, load_state
from medficient_mini.cpu.int8 import (LOWEST, QuantizedChain, QuantizedConv, gelu, gelu_table, quantize,
                                       quantized_blocks, quantized_encoder, step_and_zero)
from medficient_mini.nets.efficientvit import ConvLayer, FusedMBConv, MBConv
from medficient_mini.nets.sam import build_sam
from medficient_mini.cpu.quantize import Observer, calibrate, choose_cases, gelu_range, symmetric_range
from medficient_mini.inference.packing import expand_state, pack_state, quantize_rows

needs_int8 = pytest.mark.skipif(fast.missing_operator("int8") is not None, reason="no 8-bit operators here")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def l0():
    torch.manual_seed(0)
    model = build_sam("medficientsam_l0").eval()
    for parameter in model.image_encoder.parameters():
        if parameter.ndim == 4:                       # torch's own start lets the signal die out over the layers
            torch.nn.init.normal_(parameter, std=(1.5 / parameter[0].numel()) ** 0.5)
    return model


# ---------------------------------------------------------------------------------------------------------- storage

def some_state():
    torch.manual_seed(0)
    return {"a.weight": torch.randn(96, 64, 3, 3) * torch.rand(96, 1, 1, 1), "a.bias": torch.randn(96),
            "empty.weight": torch.zeros(64, 64), "token.weight": torch.randn(4, 256), "n.num_batches_tracked": torch.tensor(3)}


def test_packing_keeps_small_tensors_and_bounds_the_error(tmp_path):
    state = some_state()
    torch.save(pack_state(state), tmp_path / "packed.pth")
    packed = torch.load(tmp_path / "packed.pth", weights_only=True)
    assert packed["a.weight"].dtype == torch.int8 and packed["a.weight.scale"].shape == (96,)
    expanded = expand_state(packed)
    assert expanded.keys() == state.keys()
    for key in ("a.bias", "token.weight", "n.num_batches_tracked", "empty.weight"):
        assert torch.equal(expanded[key], state[key])
    error = (expanded["a.weight"] - state["a.weight"]).flatten(1).norm(dim=1)
    assert (error < 0.012 * state["a.weight"].flatten(1).norm(dim=1)).all()
    # no worse than rounding to the largest weight, and better where clipping pays
    largest = state["a.weight"].flatten(1).abs().amax(1) / 127
    plain = (torch.fake_quantize_per_channel_affine(state["a.weight"], largest, torch.zeros(96), 0, -127, 127)
             - state["a.weight"]).flatten(1).norm(dim=1)
    assert (error <= plain * 1.001).all()


def test_packing_twice_loses_nothing():
    once = pack_state(some_state())
    twice = pack_state(expand_state(once))
    assert all(torch.equal(once[key], twice[key]) for key in once if once[key].dtype == torch.int8)
    assert torch.equal(quantize_rows(expand_state(once)["a.weight"], torch.ones(1))[0], once["a.weight"])


def test_an_unpacked_state_comes_back_as_it_is():
    state = some_state() | {"temperature.scale": torch.ones(1)}
    assert all(value is state[key] for key, value in expand_state(state).items()) and len(expand_state(state)) == len(state)


# ------------------------------------------------------------------------------------------------------ 8-bit pieces

def channels_last(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def test_quantize_rounds_and_saturates():
    x = channels_last(2, 5, 3, 4)
    step, zero = step_and_zero(-1.0, 1.5)
    codes = quantize(x, step, zero)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    assert ((codes.float() - zero) * step - x.clamp(-zero * step, (255 - zero) * step)).abs().max() <= step * 0.51


@pytest.mark.parametrize("lowest, highest", [(-4.0, 6.0), (-0.5, 2.0), (0.0, 3.0), (-2.0, -0.5)])
def test_gelu_table(lowest, highest):
    step, zero = step_and_zero(lowest, highest)
    table, (after_step, after_zero) = gelu_table(step, zero)
    values = (torch.arange(256) - zero) * step
    found = (torch.from_numpy(table).float() - after_zero) * after_step
    assert (found - F.gelu(values, approximate="tanh")).abs().max() <= after_step * 0.51


@needs_int8
@pytest.mark.parametrize("kernel, stride, groups", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 2, 32)])
def test_convolution_of_codes(kernel, stride, groups):
    torch.manual_seed(0)
    layer = ConvLayer(32, 32, kernel, stride, groups, act=False).eval()
    layer.norm.running_var.uniform_(0.5, 2.0)
    weight, bias = fast.fold(layer)
    integers, scale = quantize_rows(weight, torch.ones(1))
    conv = QuantizedConv(layer, 8)
    for source in (step_and_zero(-1.0, 2.0), step_and_zero(-30.0, 20.0)):     # zero is not code 0: padding must know
        codes = quantize(10 * channels_last(1, 32, 8, 8), *source)
        expected = F.conv2d((codes.float() - source[1]) * source[0], integers * scale.reshape(-1, 1, 1, 1), bias,
                            stride, kernel // 2, groups=groups)
        assert (conv(codes, source) - expected).abs().max() < 1e-5 * expected.abs().max()
        residual = channels_last(*expected.shape)
        wanted = residual + expected
        assert (conv(codes, source, residual=residual) - wanted).abs().max() < 1e-5 * expected.abs().max()
        step, zero = target = step_and_zero(float(expected.min()), float(expected.max()))
        assert ((conv(codes, source, target).float() - zero) * step - expected).abs().max() < step * 0.6


@needs_int8
@pytest.mark.parametrize("kind", [FusedMBConv, MBConv])
@torch.inference_mode()
def test_block_in_8_bits(kind):
    torch.manual_seed(0)
    block = kind(32, 32, 4).eval()
    for layer in block.children():
        if layer.conv.bias is not None:
            layer.conv.bias.zero_()                                           # so that the block scales with its input
    x, seen = channels_last(2, 32, 16, 16), {}
    hooks = [layer.act.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, args[0]))
             for name, layer in block.named_children() if layer.act is not None]
    block(x)
    for hook in hooks:
        hook.remove()
    m = x.abs().max()
    calibration = {"b.input": torch.ones(1)} | {f"b.{k}": torch.tensor([v.min() / m, v.max() / m]) for k, v in seen.items()}
    for factor in (1.0, 40.0):                                                # ranges follow the input's size
        expected = block(factor * x)
        found = QuantizedChain(block, "b", False, 16, calibration)(factor * x)
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()
        residual = (factor * x).contiguous(memory_format=torch.channels_last)
        added = QuantizedChain(block, "b", True, 16, calibration)(residual)
        assert (added - factor * x - found).abs().max() < 1e-4 * factor


# ------------------------------------------------------------------------------------------------------- calibration

def test_input_range_ends_where_the_values_do():
    torch.manual_seed(0)
    for m, expected in ((2.0, 1.0), (4.0, 0.5), (8.0, 0.25)):
        observer = Observer()
        observer.see(torch.rand(100_000) * 4 - 2, m)
        assert symmetric_range(observer).item() == pytest.approx(expected)


def test_gelu_range_is_in_multiples_of_the_input_and_stops_where_gelu_is_zero():
    torch.manual_seed(0)
    observer = Observer(gelu, LOWEST)
    for m in (1.0, 20.0):
        observer.see(torch.linspace(-5 * m, 3 * m, 10_000), m)
    low, high = gelu_range(observer).tolist()
    assert 2.4 <= high <= 3.01
    assert -4.01 <= low <= -1.5


def test_an_images_size_does_not_decide_alone():
    torch.manual_seed(0)
    observer = Observer()
    observer.see(torch.randn(10_000), 4.0)
    small = symmetric_range(observer)
    observer.see(1000 * torch.randn(10_000), 4000.0)
    assert abs(symmetric_range(observer) - small) <= 0.1


@needs_int8
@torch.inference_mode()
def test_int8_encoder_is_close(l0):
    images = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    calibration = calibrate(l0.image_encoder, images[:2])
    blocks = quantized_blocks(l0.image_encoder)
    assert {key.rpartition(".")[0] for key in calibration} == set(blocks)
    assert [key for key in calibration if key.startswith("neck.middle.op_list.0.")] == [
        "neck.middle.op_list.0.main.input", "neck.middle.op_list.0.main.spatial_conv"]
    encoder = quantized_encoder(l0.image_encoder, 128, calibration, torch.float32)
    assert sum(isinstance(module, QuantizedChain) for module in encoder.modules()) == len(blocks)
    expected = l0.image_encoder(images[2])
    assert (encoder(images[2]) - expected).norm() < 0.1 * expected.norm()
    l0.calibration = calibration
    form = fast.to_fast(l0, "int8")
    del l0.calibration
    embedding = form.image_encoder(torch.rand(1, 3, 512, 512))
    assert form.decode(embedding, torch.tensor([[9.0, 9, 90, 90]]))[0].shape == (1, 1, 256, 256)


# ----------------------------------------------------------------------------------------------------------- command

def write_case(folder: Path, name: str, shape: tuple, box: list):
    image = cv2.resize(np.random.default_rng(len(name)).integers(0, 255, (8, 8), np.uint8), shape[-1:] + shape[-2:-1])
    imgs = np.stack([image] * 3, axis=-1) if len(shape) == 2 else np.stack([image] * shape[0])
    np.savez(folder / name, imgs=imgs, boxes=np.array([box]), spacing=np.ones(3))


def test_cases_are_dealt_over_the_modalities(tmp_path):
    for i in range(6):
        write_case(tmp_path, f"2D_CT_a_{i}.npz", (20, 30), [2, 2, 9, 9])
    write_case(tmp_path, "2D_US_b_0.npz", (20, 30), [2, 2, 9, 9])
    assert [path.name for path in choose_cases(tmp_path, 3)] == ["2D_CT_a_0.npz", "2D_US_b_0.npz", "2D_CT_a_5.npz"]


@needs_int8
def test_command(l0, tmp_path):
    write_case(tmp_path, "2D_US_b_0.npz", (40, 30), [2, 2, 9, 9])
    write_case(tmp_path, "3D_CT_a_0.npz", (5, 20, 30), [2, 2, 1, 9, 9, 3])
    atomic_torch_save({"network": l0.name, "model": l0.state_dict()}, tmp_path / "w.pth")
    run = subprocess.run([sys.executable, "-m", "medficient_mini.cpu.quantize", "-w", tmp_path / "w.pth", "-i", tmp_path,
                          "-o", tmp_path / "w8.pth", "--count", "1"], capture_output=True, text=True,
                         cwd=Path(__file__).parents[2], env={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "w8.pth").stat().st_size < 0.27 * (tmp_path / "w.pth").stat().st_size
    content = torch.load(tmp_path / "w8.pth", weights_only=True)
    state = expand_state(content["model"])
    assert state.keys() == l0.state_dict().keys()
    assert all(key.rpartition(".")[0] in quantized_blocks(l0.image_encoder) for key in content["calibration"])


def test_command_refuses_another_network(tmp_path):
    atomic_torch_save({"model": build_sam("lite_medsam").state_dict()}, tmp_path / "w.pth")
    run = subprocess.run([sys.executable, "-m", "medficient_mini.cpu.quantize", "-w", tmp_path / "w.pth", "-i", tmp_path,
                          "-o", tmp_path / "w8.pth"], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 1 and not (tmp_path / "w8.pth").exists()
    assert len(run.stderr.splitlines()) == 1 and "EfficientViT" in run.stderr
