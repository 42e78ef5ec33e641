"""The convolutions of an image encoder as single oneDNN calls, put in the place of the plain layers.

Convolution, batch norm and GELU become one call with packed weights (without AVX-512 GELU follows it in float32), and a
block's sum with its input is made inside its last convolution. Encoders keep their own forward passes. Maps are
channels-last: a pixel's channels lie together.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cpu import get_cpu_capability
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..nets.efficientvit import ConvLayer, Enlarge, LiteMLA, Residual
from ..nets.tinyvit import ConvBN

PIECE = 1 << 18                      # numbers that `gelu_` brings through all of its steps at once


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> nn.Conv2d:
    """One convolution that does the work of `conv` and the batch norm behind it."""
    return conv if norm is None else fuse_conv_bn_eval(conv, norm)


class FusedConv(nn.Module):
    """A convolution with its batch norm folded in, and GELU or a residual sum in the same call."""

    def __init__(self, conv: nn.Conv2d, act: nn.GELU | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        self.packed = conv.weight.detach().to(dtype), 0                       # and the threads it is packed for
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        # Without AVX-512 oneDNN's tanh takes longer than the passes of `gelu_`, and almost as long as a convolution.
        self.gelu_after = act is not None and dtype == torch.float32 and get_cpu_capability() == "AVX2"
        self.post = ("none", [], "") if act is None or self.gelu_after else ("gelu", [], "tanh")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x (B, inputs, H, W) -> (B, outputs, H/stride, W/stride) in `dtype`, channels-last.

        The sum with a `residual` of that type is made in its memory; one of another type keeps its own.
        """
        x, (weight, threads) = x.to(self.dtype, memory_format=torch.channels_last), self.packed
        if threads != torch.get_num_threads():     # oneDNN's best order depends on the size of the map and the threads
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight.to_dense(), *self.geometry, x.shape)
            self.packed = weight, torch.get_num_threads()
        if residual is not None and residual.dtype == self.dtype:
            residual = residual.contiguous(memory_format=torch.channels_last)
            return torch.ops.mkldnn._convolution_pointwise_(
                residual, x, weight, self.bias, *self.geometry, "add", 1.0, None, [], None)
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.geometry, *self.post)
        if self.gelu_after:
            gelu_(y.permute(0, 2, 3, 1).view(-1))
        return y if residual is None else residual + y


def gelu_(x: Tensor) -> None:
    """Put GELU by the tanh formula in the place of x (N,): 0.5 x (1 + tanh u) = x sigmoid(2 u)."""
    slope = 2 * (2 / math.pi) ** 0.5
    scratch = torch.empty(PIECE)                                              # fits a cache; fresh memory is slow
    for piece in x.split(PIECE):
        u = torch.mul(piece, piece, out=scratch[:len(piece)])
        u.mul_(0.044715 * slope).add_(slope).mul_(piece)
        piece.mul_(u.sigmoid_())


class FusedResidual(nn.Module):
    """x + block(x) for a block that is a row of layers; the memory of x takes the sum."""

    def __init__(self, block: nn.Module):
        super().__init__()
        *first, self.last = block.children()
        self.first = nn.Sequential(*first)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W), unchanged
        return self.last(self.first(x), x)


class MatrixEnlarge(nn.Module):
    """The Enlarge of nets/efficientvit.py as two matrix products: 20 times as fast as torch's interpolation."""

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, h, h) -> (B, C, 64, 64)
        h = x.shape[-1]
        if h == 64:
            return x
        weights = F.interpolate(torch.eye(h)[None, None], (64, h), mode="bicubic")[0, 0].to(x.dtype)      # (64, h)
        wide = weights @ x.permute(0, 2, 3, 1)                                # (B, h, 64, C)
        return (weights @ wide.flatten(2)).unflatten(2, (64, -1)).permute(0, 3, 1, 2)


def fuse(module: nn.Module, dtype: torch.dtype) -> None:
    """Swap the layers of an encoder (evaluation mode), in place and by name, for the fused forms above.

    The tensors of the plain layers are read, never written, so the encoder may share them with another.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, ConvLayer):
            child = FusedConv(fold(child.conv, child.norm), child.act, dtype)
        elif isinstance(child, ConvBN):
            child = FusedConv(fold(child.c, child.bn), None, dtype)
        elif isinstance(child, nn.Conv2d):
            child = FusedConv(child, None, dtype)
        else:
            fuse(child, dtype)
            if isinstance(child, Residual) and child.shortcut and not isinstance(child.main, LiteMLA):
                child = FusedResidual(child.main)
            elif isinstance(child, Enlarge):
                child = MatrixEnlarge()
        setattr(module, name, child)
