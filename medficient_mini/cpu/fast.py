"""A loaded network -> its CPU inference form: same results, less time. Everything works without it.

EfficientViT encoders: batch norm folded into the convolutions, each convolution one oneDNN call with GELU or the
residual sum inside and weights packed once, channels-last throughout, bicubic enlargement as two small matrix
products. The decoder is fast_decoder.py, the 8-bit encoder fast_int8.py. The two vision transformers keep their own
attention; TinyViT's convolutions are fused in the same way.

The oneDNN operators are private to torch (its compiler uses them): where one is absent, the plain model is returned.
"""
import copy
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .decoder import FastDecoder
from ..machine import native_bf16
from ..nets.efficientvit import ConvLayer, EfficientViTSam, LiteMLA
from ..nets.sam import Sam
from ..nets.tinyvit import ConvBN, MBConv, TinyViT

PRECISIONS = ("auto", "f32", "bf16", "int8")


def resolve_precision(precision: str = "auto") -> str:
    """"auto" -> "bf16" where the CPU has it, else "f32"; the others as they are. ValueError for anything else."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: expected one of {', '.join(PRECISIONS)}, found {precision}")
    return precision if precision != "auto" else "bf16" if native_bf16() else "f32"


def missing_operator(precision: str) -> str | None:
    """What this torch or CPU lacks for `precision`, None where it lacks nothing."""
    if not torch.backends.mkldnn.is_available():
        return "oneDNN"
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16 in oneDNN (it needs AVX-512)"
    names = ["mkldnn._reorder_convolution_weight", "mkldnn._convolution_pointwise", "mkldnn._convolution_pointwise_"]
    if precision == "int8":
        names += ["onednn.qconv_prepack", "onednn.qconv2d_pointwise"]
        if not getattr(torch.cpu, "_is_vnni_supported", bool)():
            return "8-bit dot products (VNNI) in the CPU"
    for name in names:
        library, operator = name.split(".")
        if not hasattr(getattr(torch.ops, library), operator):
            return f"torch.ops.{name}"
    return None


def to_fast(model: Sam, precision: str = "f32"):
    """`model` (evaluation mode, not changed) in a form for inference with the same interface: image_encoder, decode,
    image_size, resize, name, parameters().

    precision: "f32", "bf16" or "int8". int8 needs weights from medficient_mini.cpu.quantize, whose activation ranges
    are in `model.calibration`; ValueError without them. Away from the CPU, or where torch lacks an operator, `model`
    itself comes back and one line on stderr says so.
    """
    device = next(model.parameters()).device
    lacks = missing_operator(precision) if device.type == "cpu" else f"support for {device.type}"
    if lacks is None and precision == "bf16" and not native_bf16():
        print("precision bf16: this CPU emulates it; f32 is likely faster", file=sys.stderr)
    if precision == "int8":
        if not isinstance(model.image_encoder, EfficientViTSam):
            raise ValueError(f"precision int8: expected an EfficientViT network, found {model.name}")
        if not getattr(model, "calibration", None):
            raise ValueError("precision int8: these weights hold no activation ranges; make them with: "
                             "python -m medficient_mini.cpu.quantize -w WEIGHTS -i CASES -o WEIGHTS_int8.pth")
    if lacks is not None:
        print(f"precision {precision}: plain model used, the fast form lacks {lacks}", file=sys.stderr)
        return model
    return FastSam(model, precision)


class FastSam(nn.Module):
    def __init__(self, model: Sam, precision: str):
        super().__init__()
        self.name, self.image_size, self.resize, self.precision = model.name, model.image_size, model.resize, precision
        self.prompt_encoder = model.prompt_encoder                  # registered for parameters(): they tell the device
        bf16 = precision == "bf16" or precision == "int8" and native_bf16()    # int8 leaves some layers in float
        dtype = torch.bfloat16 if bf16 else torch.float32
        with torch.inference_mode():
            if not isinstance(model.image_encoder, EfficientViTSam):
                self.image_encoder = FastTransformer(model.image_encoder, model.image_size, dtype)
            elif precision == "int8":
                from .int8 import quantized_encoder
                self.image_encoder = quantized_encoder(model.image_encoder, model.image_size, model.calibration, dtype)
            else:
                self.image_encoder = FastEfficientViT(model.image_encoder, model.image_size, dtype)
            self.decode = torch.inference_mode()(FastDecoder(model, dtype))


def fold(layer: ConvLayer) -> tuple[Tensor, Tensor]:
    """Weight and bias of convolution and batch norm together."""
    conv = layer.conv if layer.norm is None else fuse_conv_bn_eval(layer.conv, layer.norm)
    bias = torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias
    return conv.weight.detach(), bias.detach()


class FusedConv(nn.Module):
    """Convolution + batch norm + GELU or residual sum in one call. `side`: of the input it is packed for."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, gelu: str | None, side: int,
                 dtype: torch.dtype):
        """gelu: "tanh" or "none", as torch names the two formulas; None for no activation."""
        super().__init__()
        self.geometry = (list(conv.padding), list(conv.stride), [1, 1], conv.groups)
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.to(dtype), *self.geometry, [1, conv.in_channels, side, side])
        self.bias = None if bias is None else bias.to(dtype)
        self.post = ("gelu", [], gelu) if gelu else ("none", [], "")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:   # channels-last
        x = x.to(self.dtype)
        if residual is None or residual.dtype != self.dtype:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, *self.post)
            return y if residual is None else residual.add_(y)
        return torch.ops.mkldnn._convolution_pointwise_(                      # written into `residual`
            residual, x, self.weight, self.bias, *self.geometry, "add", 1.0, None, [], None)


def fused(layer: ConvLayer, side: int, dtype: torch.dtype) -> FusedConv:
    return FusedConv(layer.conv, *fold(layer), layer.act and layer.act.approximate, side, dtype)


class Chain(nn.Module):
    """The convolutions of a ResBlock, FusedMBConv or MBConv in a row; the input is added, in place, if `shortcut`."""

    def __init__(self, block: nn.Module, shortcut: bool, side: int, dtype: torch.dtype):
        super().__init__()
        self.shortcut, convs = shortcut, []
        for layer in block.children():
            convs.append(fused(layer, side, dtype))
            side //= layer.conv.stride[0]
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = conv(y)
        return self.convs[-1](y, x if self.shortcut else None)


class FastLiteMLA(nn.Module):
    """nets.efficientvit.LiteMLA and its residual; the attention itself stays in float32."""

    def __init__(self, attention: LiteMLA, side: int, dtype: torch.dtype):
        super().__init__()
        self.qkv = fused(attention.qkv, side, dtype)
        self.aggregate = nn.Sequential(*(FusedConv(conv, conv.weight.detach(), None, None, side, dtype)
                                         for conv in attention.aggreg[0]))
        self.proj = fused(attention.proj, side, dtype)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W) channels-last
        qkv = self.qkv(x)                                                     # (B, 3C, H, W)
        return self.proj(attend(qkv, self.aggregate(qkv)), x)     # (B, C, H, W)


def attend(*scales: Tensor) -> Tensor:
    """ReLU linear attention on channels-last maps (B, 3C, H, W), heads of 3·32 channels -> (B, 2C, H, W) float32."""
    B, channels, H, W = scales[0].shape
    heads = torch.empty(B, len(scales) * channels // 96, H * W, 96)
    for part, x in zip(heads.chunk(len(scales), dim=1), scales):
        part.copy_(x.permute(0, 2, 3, 1).reshape(B, H * W, -1, 96).transpose(1, 2))           # float32 from here on
    F.relu_(heads[..., :64])
    q, k, v = heads.chunk(3, dim=3)                                           # (B, heads, N, 32)
    out = q @ (k.transpose(2, 3) @ v)
    out /= q @ k.sum(2)[..., None] + 1e-15
    return out.transpose(1, 2).reshape(B, H, W, -1).permute(0, 3, 1, 2)


class FastEfficientViT(nn.Module):
    """nets.efficientvit.EfficientViTSam for channels-last inference in `dtype`, packed for inputs of `size` pixels.

    `chain(block, shortcut, side)` makes the form of a row of convolutions (fast_int8.py brings its own).
    """

    def __init__(self, encoder: EfficientViTSam, size: int, dtype: torch.dtype, chain=None):
        super().__init__()
        chain = chain or (lambda block, shortcut, side: Chain(block, shortcut, side, dtype))
        self.dtype, side, stages = dtype, size, []
        for stage in encoder.backbone.stages:
            ops = []
            for op in stage.op_list:
                if isinstance(op, ConvLayer):                                 # the first layer
                    ops.append(fused(op, side, dtype))
                    side //= 2
                elif hasattr(op, "context_module"):
                    ops.append(FastLiteMLA(op.context_module.main, side, dtype))
                    ops.append(chain(op.local_module.main, True, side))
                else:
                    ops.append(chain(op.main, op.shortcut, side))
                    side //= 1 if op.shortcut else 2
            stages.append(nn.Sequential(*ops))
        self.stages = nn.ModuleList(stages)
        neck = encoder.neck
        self.inputs = nn.ModuleList(fused(op.op_list[0], size // s, dtype) for op, s in zip(neck.input_ops, (32, 16, 8)))
        self.middle = nn.Sequential(*(chain(op.main, True, 64) for op in neck.middle.op_list))
        self.output = fused(neck.output_ops[0].op_list[0], 64, dtype)
        self.norm = copy.deepcopy(encoder.norm)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:                                   # (B, 3, S, S)
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        stages = []
        for stage in self.stages:
            x = stage(x)
            stages.append(x)
        total = None
        for conv, feature in zip(self.inputs, reversed(stages[2:])):
            if feature.shape[-1] == 64:
                total = conv(feature, total)                                  # (B, 256, 64, 64)
            else:
                enlarged = enlarge(conv(feature))
                total = enlarged if total is None else total.add_(enlarged)
        return self.norm(self.output(self.middle(total)))                     # (B, 256, 64, 64) float32


def enlarge(x: Tensor) -> Tensor:
    """(B, C, h, w) channels-last -> (B, C, 64, 64), bicubic, as two matrix products."""
    (B, C, h, w), pixels = x.shape, x.permute(0, 2, 3, 1)                     # (B, h, w, C)
    rows, columns = bicubic(h).to(x.dtype), bicubic(w).to(x.dtype)            # (64, h), (64, w)
    wide = columns @ pixels.reshape(B * h, w, C)                              # (B·h, 64, C)
    return (rows @ wide.reshape(B, h, 64 * C)).reshape(B, 64, 64, C).permute(0, 3, 1, 2)


def bicubic(side: int) -> Tensor:
    """(64, side): what bicubic interpolation of `side` values to 64 does, as a matrix."""
    return F.interpolate(torch.eye(side)[None, :, :, None], (64, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T


class FastTransformer(nn.Module):
    """TinyViT or ViT: batch norm folded, TinyViT's convolutional parts fused, channels-last, products in `dtype`."""

    def __init__(self, encoder: nn.Module, size: int, dtype: torch.dtype):
        super().__init__()
        encoder = copy.deepcopy(encoder)
        if isinstance(encoder, TinyViT):
            fuse_tiny_vit(encoder, size, dtype)
        for module in encoder.modules():
            if isinstance(module, ConvBN):                                    # those between attention and MLP
                module.c, module.bn = fuse_conv_bn_eval(module.c, module.bn), nn.Identity()
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)
        self.encoder, self.dtype = encoder.to(memory_format=torch.channels_last), dtype

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.encoder(x).float()


def fuse_tiny_vit(encoder: TinyViT, side: int, dtype: torch.dtype) -> None:
    """Put fused forms in the place of the patch embedding, the MBConv blocks and the patch merging."""
    encoder.patch_embed = GeluChain(encoder.patch_embed.seq[::2], False, side, dtype)
    for stage in encoder.layers:
        stage.blocks = nn.ModuleList(GeluChain(block.children(), True, side, dtype) if isinstance(block, MBConv) else block
                                     for block in stage.blocks)
        if stage.downsample is not None:
            stage.downsample = GeluChain(stage.downsample.children(), False, side, dtype)
            side //= stage.downsample.stride


class GeluChain(nn.Module):
    """TinyViT's ConvBN layers in a row with GELU between them; MBConv adds its input and takes GELU once more."""

    def __init__(self, layers, shortcut: bool, side: int, dtype: torch.dtype):
        super().__init__()
        layers, self.shortcut, self.stride, convs = list(layers), shortcut, 1, []
        for layer in layers:
            conv = fuse_conv_bn_eval(layer.c, layer.bn)
            convs.append(FusedConv(conv, conv.weight.detach(), conv.bias.detach(), None if layer is layers[-1] else "none",
                                   side // self.stride, dtype))
            self.stride *= conv.stride[0]
        self.convs = nn.Sequential(*convs)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W) channels-last
        return F.gelu(self.convs[-1](self.convs[:-1](x), x)) if self.shortcut else self.convs(x)
