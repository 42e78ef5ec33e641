"""The convolutions of an image encoder as single oneDNN calls, put in the place of the plain layers.

`fuse` walks through an encoder and swaps layers by their names: convolution, batch norm and GELU become one call with
weights packed once, and where a block adds its input to its output that sum is made inside the last convolution. The
encoder's own forward passes (nets/efficientvit.py, nets/tinyvit.py) stay what is run, but for LiteMLA and Neck, which
are written anew here: who changes those in nets/ changes them here as well. Maps are channels-last: the
256 or so channels of a pixel lie side by side in memory, as oneDNN wants them.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..nets.efficientvit import ConvLayer, LiteMLA, Neck, Residual
from ..nets.tinyvit import ConvBN


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> nn.Conv2d:
    """One convolution that does the work of `conv` and the batch norm behind it."""
    return conv if norm is None else fuse_conv_bn_eval(conv, norm)


class FusedConv(nn.Module):
    """A convolution with its batch norm folded in, and GELU or a residual sum in the same call."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, act: nn.GELU | None, dtype: torch.dtype):
        super().__init__()
        conv = fold(conv, norm)
        self.dtype = dtype
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.weight = conv.weight.detach().to(dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.post = ("none", [], "") if act is None else ("gelu", [], act.approximate)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x (B, inputs, H, W) -> (B, outputs, H/stride, W/stride) in `dtype`, channels-last.

        With `residual`, a map of the output's shape, the result is their sum, written into its memory where its type
        and layout allow.
        """
        x = x.to(self.dtype, memory_format=torch.channels_last)
        weight = self.weight
        if not weight.is_mkldnn:                   # oneDNN's best order of the weights depends on the size of the map
            weight = self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(x.shape))
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.geometry, *self.post)
        residual = residual.to(self.dtype, memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise_(
            residual, x, weight, self.bias, *self.geometry, "add", 1.0, None, [], None)


class FusedResidual(nn.Module):
    """x + block(x) for a block that is a row of convolutions; the memory of x takes the sum."""

    def __init__(self, block: nn.Module):
        super().__init__()
        *first, self.last = block.children()
        self.first = nn.Sequential(*first)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W), unchanged
        return self.last(self.first(x), x)


class FusedLiteMLA(nn.Module):
    """The LiteMLA of nets/efficientvit.py and the sum with its input; the attention itself stays in float32."""

    def __init__(self, plain: LiteMLA, dtype: torch.dtype):
        super().__init__()
        self.qkv = FusedConv(plain.qkv.conv, plain.qkv.norm, None, dtype)
        self.aggregate = nn.Sequential(*(FusedConv(conv, None, None, dtype) for conv in plain.aggreg[0]))
        self.proj = FusedConv(plain.proj.conv, plain.proj.norm, None, dtype)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W), unchanged
        qkv = self.qkv(x)                                                     # (B, 3C, H, W)
        aggregate = self.aggregate(qkv)
        with torch.autocast("cpu", enabled=False):
            out = attend(qkv, aggregate)                                      # (B, 2C, H, W)
        # Between 8-bit blocks the stream stays in float32; the convolution would round it to its own type.
        return self.proj(out, x) if x.dtype == self.proj.dtype else x + self.proj(out)


def attend(*scales: Tensor) -> Tensor:
    """ReLU linear attention on channels-last maps (B, 3C, H, W), heads of 3·32 channels: (B, 2C, H, W) float32."""
    B, channels, H, W = scales[0].shape
    heads = torch.empty(B, len(scales) * channels // 96, H * W, 96)
    for part, x in zip(heads.chunk(len(scales), dim=1), scales):
        part.copy_(x.permute(0, 2, 3, 1).reshape(B, H * W, -1, 96).transpose(1, 2))           # float32 from here on
    F.relu_(heads[..., :64])
    q, k, v = heads.chunk(3, dim=3)                                           # (B, heads, N, 32)
    out = q @ (k.transpose(2, 3) @ v)
    out /= q @ k.sum(2)[..., None] + 1e-15
    return out.transpose(1, 2).reshape(B, H, W, -1).permute(0, 3, 1, 2)


class FusedNeck(nn.Module):
    """The Neck of nets/efficientvit.py; its sum over three scales is made in place."""

    def __init__(self, neck: Neck):
        super().__init__()
        self.inputs = nn.ModuleList(op.op_list[0] for op in neck.input_ops)
        self.middle, self.output = neck.middle, neck.output_ops[0]

    def forward(self, stages: list[Tensor]) -> Tensor:     # (B, 128, h, h), (B, 256, h/2, h/2), (B, 512, h/4, h/4)
        total = None
        for conv, feature in zip(self.inputs, reversed(stages)):
            if feature.shape[-1] == 64:
                total = conv(feature, total)                                  # (B, 256, 64, 64)
            else:
                enlarged = enlarge(conv(feature))
                total = enlarged if total is None else total.add_(enlarged)
        return self.output(self.middle(total))                                # (B, 256, 64, 64)


def enlarge(x: Tensor) -> Tensor:
    """Enlarge (B, C, h, w) to 64×64, bicubic, as two matrix products: 20 times as fast as torch's interpolation."""
    (B, C, h, w), pixels = x.shape, x.permute(0, 2, 3, 1)                     # (B, h, w, C)
    rows, columns = bicubic(h).to(x.dtype), bicubic(w).to(x.dtype)            # (64, h), (64, w)
    wide = columns @ pixels.reshape(B * h, w, C)                              # (B·h, 64, C)
    return (rows @ wide.reshape(B, h, 64 * C)).reshape(B, 64, 64, C).permute(0, 3, 1, 2)


def bicubic(side: int) -> Tensor:
    """What bicubic interpolation of `side` values to 64 does, as a matrix (64, side)."""
    unit = torch.eye(side)[None, :, :, None]                                  # (1, side, side, 1)
    return F.interpolate(unit, (64, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T


def fuse(module: nn.Module, dtype: torch.dtype) -> None:
    """Swap the layers of an encoder (evaluation mode), in place and by name, for the fused forms above.

    The tensors of the plain layers are read, never written, so the encoder may share them with another.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, ConvLayer):
            setattr(module, name, FusedConv(child.conv, child.norm, child.act, dtype))
        elif isinstance(child, ConvBN):
            setattr(module, name, FusedConv(child.c, child.bn, None, dtype))
        elif isinstance(child, Residual) and isinstance(child.main, LiteMLA):
            setattr(module, name, FusedLiteMLA(child.main, dtype))
        else:
            fuse(child, dtype)
            if isinstance(child, Residual) and child.shortcut:
                setattr(module, name, FusedResidual(child.main))
            elif isinstance(child, Neck):
                setattr(module, name, FusedNeck(child))
