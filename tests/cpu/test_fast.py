"""The inference form of every network against the plain model: embeddings, all prompt kinds, fallback."""
import pytest
import torch

from medficient_mini.cpu import fast
from medficient_mini.cpu.fast import FastSam, attend, enlarge, resolve_precision, to_fast
from medficient_mini.cpu.decoder import FastDecoder
from medficient_mini.nets.efficientvit import LiteMLA
from medficient_mini.nets.sam import build_sam

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(
    fast.missing_operator("f32") is not None, reason="this torch lacks the oneDNN operators")]
needs_bf16 = pytest.mark.skipif(fast.missing_operator("bf16") is not None or not fast.native_bf16(), reason="no native bf16")


def lively(name: str):
    """A network whose norms and biases are not the trivial ones of a fresh network, so that folding them matters."""
    torch.manual_seed(0)
    model = build_sam(name).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    return model


@pytest.fixture(scope="module")
def l0():
    return lively("medficientsam_l0")


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
@torch.inference_mode()
def embedding(l0, image):
    return l0.image_encoder(image)


def largest_difference(a, b):
    return (a - b).abs().max().item()


def test_f32_encoder_equals_the_plain_one(l0, image, embedding):
    state = {key: value.clone() for key, value in l0.state_dict().items()}
    form = to_fast(l0, "f32")
    assert isinstance(form, FastSam)
    assert (form.name, form.image_size, form.resize) == (l0.name, l0.image_size, l0.resize)
    before = image.clone()
    found = form.image_encoder(image)
    assert found.dtype == torch.float32 and found.shape == (1, 256, 64, 64)
    assert largest_difference(found, embedding) < 1e-4
    assert torch.equal(form.image_encoder(image), found)             # in-place sums leave nothing behind
    assert torch.equal(image, before)
    assert all(torch.equal(value, state[key]) for key, value in l0.state_dict().items())


@torch.inference_mode()
def test_inputs_of_another_size_and_batch(l0):
    form, x = to_fast(l0, "f32"), torch.rand(2, 3, 256, 256)
    assert largest_difference(form.image_encoder(x), l0.image_encoder(x)) < 1e-4


@needs_bf16
def test_bf16_encoder_is_close(l0, image, embedding):
    found = to_fast(l0, "bf16").image_encoder(image)
    assert found.dtype == torch.float32
    assert (found - embedding).norm() < 0.03 * embedding.norm()


@torch.inference_mode()
def test_tiny_vit():
    model = lively("lite_medsam")
    x = torch.rand(1, 3, 256, 256)
    expected = model.image_encoder(x)
    assert largest_difference(to_fast(model, "f32").image_encoder(x), expected) < 1e-4
    if fast.missing_operator("bf16") is None and fast.native_bf16():
        assert (to_fast(model, "bf16").image_encoder(x) - expected).norm() < 0.05 * expected.norm()


def prompts():
    torch.manual_seed(2)
    corner = torch.rand(3, 2) * 200
    boxes = torch.cat([corner, corner + 50 + torch.rand(3, 2) * 200], dim=1)
    points = (torch.rand(3, 2, 2) * 512, torch.tensor([[1, 0], [1, 1], [1, -1]]))
    masks = torch.randn(3, 1, 256, 256)
    return {"boxes": dict(boxes=boxes), "boxes, three masks": dict(boxes=boxes, multimask=True),
            "points": dict(points=points, multimask=True), "all": dict(boxes=boxes, points=points, masks=masks),
            "masks": dict(masks=masks), "one box": dict(boxes=boxes[:1])}


@pytest.mark.parametrize("kind", prompts())
@torch.inference_mode()
def test_decoder_equals_the_plain_one(l0, embedding, kind):
    prompt = prompts()[kind]
    expected, expected_iou = l0.decode(embedding, **prompt)
    found, iou = FastDecoder(l0, torch.float32)(embedding, **prompt)
    assert found.shape == expected.shape and largest_difference(found, expected) < 1e-3
    assert iou.shape == expected_iou.shape and largest_difference(iou, expected_iou) < 1e-4


@pytest.mark.parametrize("masks", [False, True])
@torch.inference_mode()
def test_prompts_of_several_images(l0, embedding, masks):
    several = torch.cat([embedding, embedding.flip(3)])
    prompt = dict(boxes=prompts()["boxes"]["boxes"], image_index=torch.tensor([1, 0, 1]))
    if masks:
        prompt["masks"] = prompts()["masks"]["masks"]
    expected, _ = l0.decode(several, **prompt)
    found, _ = FastDecoder(l0, torch.float32)(several, **prompt)
    assert largest_difference(found, expected) < 1e-3


@needs_bf16
@torch.inference_mode()
def test_bf16_decoder_is_close(l0, embedding):
    expected, _ = l0.decode(embedding, prompts()["boxes"]["boxes"])
    found, _ = FastDecoder(l0, torch.bfloat16)(embedding, prompts()["boxes"]["boxes"])
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_linear_attention_on_channels_last_maps():
    maps = [torch.randn(2, 192, 5, 4).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    expected = LiteMLA.attend(torch.cat(maps, dim=1).reshape(2, 4, 96, 20)).reshape(2, 128, 5, 4)
    assert largest_difference(attend(*maps), expected) < 1e-5


@pytest.mark.parametrize("side", [8, 16, 32])
def test_enlargement_is_bicubic_interpolation(side):
    x = torch.randn(2, 3, side, side)
    expected = torch.nn.functional.interpolate(x, (64, 64), mode="bicubic", align_corners=False)
    assert largest_difference(enlarge(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


def test_fallback_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(fast, "missing_operator", lambda precision: "torch.ops.mkldnn._convolution_pointwise")
    model = build_sam("lite_medsam").eval()
    assert to_fast(model, "f32") is model
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "_convolution_pointwise" in message


def test_a_missing_operator_is_noticed(monkeypatch):
    class Library:
        _reorder_convolution_weight = _convolution_pointwise = None           # but not _convolution_pointwise_
    monkeypatch.setattr(torch.ops, "mkldnn", Library)
    assert fast.missing_operator("f32") == "torch.ops.mkldnn._convolution_pointwise_"


@pytest.mark.parametrize("native, expected", [(True, "bf16"), (False, "f32")])
def test_auto_precision_follows_the_cpu(monkeypatch, native, expected):
    monkeypatch.setattr(fast, "native_bf16", lambda: native)
    assert resolve_precision("auto") == expected
    assert resolve_precision("f32") == "f32"
    with pytest.raises(ValueError, match="--precision"):
        resolve_precision("fp8")


def test_int8_asks_for_calibrated_weights(l0):
    with pytest.raises(ValueError, match="medficient_mini.cpu.quantize"):
        to_fast(l0, "int8")
    with pytest.raises(ValueError, match="EfficientViT"):
        to_fast(build_sam("lite_medsam").eval(), "int8")
