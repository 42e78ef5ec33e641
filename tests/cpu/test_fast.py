"""The fast form of the networks against the plain one: small pieces, a whole encoder at 128 pixels, the decoder."""
import pytest
import torch
from torch import nn

from medficient_mini.cpu import convolutions, fast
from medficient_mini.cpu.convolutions import MatrixEnlarge, fuse
from medficient_mini.cpu.decoder import FastDecoder
from medficient_mini.cpu.fast import FastSam, resolve_precision, to_fast
from medficient_mini.nets.efficientvit import Backbone, EfficientViTBlock, FusedMBConv, MBConv, ResBlock, Residual
from medficient_mini.nets.sam import build_sam
from medficient_mini.nets.tinyvit import Stage

pytestmark = pytest.mark.usefixtures("one_thread")
needs_operators = pytest.mark.skipif(fast.missing_operator("f32") is not None, reason="torch lacks the oneDNN operators")
DTYPES = [(torch.float32, 1e-5)]
if fast.missing_operator("bf16") is None and fast.native_bf16():
    DTYPES.append((torch.bfloat16, 0.03))


def lively(module):
    """Norms and biases that are not the trivial ones of a fresh network, so that folding them matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    return module.eval()


@pytest.fixture(scope="module")
def l0():
    return lively(build_sam("medficientsam_l0"))


def error(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


@needs_operators
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [
    lambda: Residual(ResBlock(32)), lambda: Residual(FusedMBConv(32, 32, 4)), lambda: Residual(MBConv(32, 32, 4)),
    lambda: Residual(MBConv(32, 64, 4, stride=2), shortcut=False), lambda: EfficientViTBlock(32, 2)])
@torch.inference_mode()
def test_blocks_in_any_memory_layout(block, layout):                          # fault 6, its brothers in float
    plain = lively(block())
    x = torch.randn(2, 32, 8, 8)
    expected = plain(x)
    fused = nn.Sequential(plain)
    fuse(fused, torch.float32)
    for threads in (1, 1, 2, 1):     # packed at the first call, and for another number: else f32 is half as fast
        torch.set_num_threads(threads)
        assert error(fused(x.clone(memory_format=layout)), expected) < 1e-5
        assert all(layer.packed[1] == threads for layer in fused.modules() if isinstance(layer, convolutions.FusedConv))
    assert error(fused(x[:1, :, :6, :4].contiguous()), block_of(fused, x)) < 1e-5


def block_of(fused, x):
    """The same block on a part of the map that lies channels-last; weights were packed for another size."""
    return fused(x[:1, :, :6, :4].clone(memory_format=torch.channels_last))


@needs_operators
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])                    # GELU after the convolution, or within
@torch.inference_mode()
def test_encoder_equals_the_plain_one(l0, capability, monkeypatch):
    monkeypatch.setattr(convolutions, "get_cpu_capability", lambda: capability)
    state = {key: value.clone() for key, value in l0.state_dict().items()}
    x = torch.rand(1, 3, 64, 64)
    before, form = x.clone(), to_fast(l0, "f32").image_encoder
    found = form(x)
    assert found.dtype == torch.float32 and found.shape == (1, 256, 64, 64)
    assert error(found, l0.image_encoder(x)) < 1e-5
    assert torch.equal(form(x), found) and torch.equal(x, before)             # in-place sums leave nothing behind
    assert all(torch.equal(value, state[key]) for key, value in l0.state_dict().items())


@needs_operators
@pytest.mark.parametrize("part, channels", [
    (lambda: Stage(2), 160), (lambda: Backbone((1, 0, 0, 0, 0)).stages[0], 3), (lambda: EfficientViTBlock(64, 2), 64)],
    ids=["TinyViT", "stem", "attention"])
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@torch.inference_mode()
def test_parts_of_the_networks_in_both_types(dtype, tolerance, part, channels):
    part, x = lively(part()), torch.rand(1, channels, 32, 32)
    expected = part(x)
    form = nn.Sequential(part)
    fuse(form, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert error(form(x), expected) < tolerance


@pytest.mark.parametrize("count", [5, convolutions.PIECE + 7])
def test_gelu_in_place(count):
    x = 4 * torch.randn(count)
    expected = nn.functional.gelu(x, approximate="tanh")
    convolutions.gelu_(x)
    assert torch.allclose(x, expected, atol=2e-6)


@pytest.mark.parametrize("side", [8, 32])
def test_enlargement_is_bicubic_interpolation(side):
    x = torch.randn(2, 3, side, side)
    expected = torch.nn.functional.interpolate(x, (64, 64), mode="bicubic", align_corners=False)
    assert error(MatrixEnlarge()(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


# ----------------------------------------------------------------------------------------------------------- decoder

BOXES = torch.tensor([[10.0, 20, 90, 110], [60, 5, 300, 250], [200, 220, 490, 500]])
POINTS = (torch.tensor([[[30.0, 40], [9, 9]], [[80, 90], [70, 60]], [[300, 400], [0, 0]]]),
          torch.tensor([[1, 0], [1, 1], [1, -1]]))
MASKS = torch.randn(3, 1, 256, 256, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prompt", [
    dict(boxes=BOXES[:1]), dict(points=POINTS, multimask=True), dict(boxes=BOXES, points=POINTS, masks=MASKS),
    dict(boxes=BOXES, image_index=torch.tensor([1, 0, 1])),
    dict(masks=MASKS, image_index=torch.tensor([1, 0, 1]))], ids=["box", "points", "all", "images", "masks of images"])
@torch.inference_mode()
def test_decoder_equals_the_plain_one(l0, embedding, prompt):
    if "image_index" in prompt:
        embedding = torch.cat([embedding, embedding.flip(3)])
    expected, expected_iou = l0.decode(embedding, **prompt)
    found, iou = FastDecoder(l0, torch.float32)(embedding, **prompt)
    assert found.shape == expected.shape and iou.shape == expected_iou.shape
    assert error(found, expected) < 1e-4 and error(iou, expected_iou) < 1e-4


@pytest.mark.skipif(len(DTYPES) == 1, reason="no native bf16")
@torch.inference_mode()
def test_decoder_in_bf16_is_close(l0, embedding):
    found, _ = FastDecoder(l0, torch.bfloat16)(embedding, BOXES)
    assert found.dtype == torch.float32
    assert error(found, l0.decode(embedding, BOXES)[0]) < 0.05


@torch.inference_mode()
def test_decoder_takes_any_number_of_boxes(l0, embedding):                    # fault 18
    decoder = FastDecoder(l0, torch.float32)
    many, _ = decoder(embedding, BOXES.repeat(3, 1))
    assert error(many[-3:], decoder(embedding, BOXES)[0]) < 1e-4


# ----------------------------------------------------------------------------------------- choice and fallback

@needs_operators
def test_to_fast_keeps_the_interface(l0):
    form = to_fast(l0, "f32")
    assert isinstance(form, FastSam)
    assert (form.name, form.image_size, form.resize) == (l0.name, l0.image_size, l0.resize)
    assert next(form.parameters()).device.type == "cpu"


def test_fallback_is_the_plain_model_and_one_line(l0, monkeypatch, capsys):
    monkeypatch.setattr(fast, "missing_operator", lambda precision: "torch.ops.mkldnn._convolution_pointwise")
    assert to_fast(l0, "f32") is l0
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "_convolution_pointwise" in message


def test_a_missing_operator_is_noticed(monkeypatch):
    class Library:
        _reorder_convolution_weight = _convolution_pointwise = None           # but not _convolution_pointwise_
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Library)
    assert fast.missing_operator("f32") == "torch.ops.mkldnn._convolution_pointwise_"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast.missing_operator("f32") == "oneDNN"


@pytest.mark.parametrize("native, expected", [(True, "bf16"), (False, "f32")])
def test_auto_precision_follows_the_cpu(monkeypatch, native, expected):
    monkeypatch.setattr(fast, "native_bf16", lambda: native)
    assert resolve_precision("auto") == expected and resolve_precision("f32") == "f32"
    with pytest.raises(ValueError, match="--precision"):
        resolve_precision("fp8")


def test_int8_asks_for_calibrated_weights(l0):
    with pytest.raises(ValueError, match="medficient_mini.cpu.int8"):
        to_fast(l0, "int8")
