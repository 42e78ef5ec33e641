"""The EfficientViT encoder with 8-bit convolutions: unsigned 8-bit activations times signed 8-bit weights.

Inside a block (ResBlock excepted: the stem stays in float) everything is 8 bit: the block's input is quantized, each
convolution writes 8-bit numbers, GELU is a table of their 256 values, the last convolution writes float32 and adds
the residual. The stream between the blocks, linear attention, the neck's 1×1 layers and all norms stay in float.

Images differ in the size of their activations by a factor of thirty (colour against grey), so no fixed range serves
all. Each block therefore measures the largest absolute value m of its input, and the ranges inside it are multiples
of m. `calibration` (made by quantize.py, saved with the weights) holds these multiples for each block, by its name in
the state dict: `<block>.input` (1,), the input's range being ±that, and `<block>.<layer>` (lowest, highest) before
each GELU.
"""
import math

import cv2
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from .fast import Chain, FastEfficientViT, fold
from ..nets.efficientvit import EfficientViTSam, FusedMBConv, MBConv
from ..inference.packing import quantize_rows

LOWEST = -4.0                        # GELU of less is 0 (to 1e-4), so a code for it would be wasted
GELU_MIN = -0.1701                   # the least value of GELU


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh formula, as in nets/efficientvit.py."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def step_and_zero(lowest: float, highest: float) -> tuple[float, int]:
    """Scale and zero point of unsigned 8 bit over a range that is widened to hold 0."""
    lowest, highest = min(lowest, 0.0), max(highest, 1e-6)
    step = (highest - lowest) / 255
    return step, round(-lowest / step)


def gelu_table(step: float, zero: int) -> tuple[np.ndarray, tuple[float, int]]:
    """Codes with (step, zero) -> codes of their GELU: (256,) uint8, and the step and zero of these."""
    values = gelu((np.arange(256) - zero) * step)
    after = step_and_zero(GELU_MIN, values[-1])
    return np.clip(np.round(values / after[0]) + after[1], 0, 255).astype(np.uint8), after


def as_rows(x: Tensor) -> np.ndarray:
    """Channels-last (B, C, H, W) -> its memory as a numpy matrix (B·H, W·C)."""
    B, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(B * H, W * C).numpy()


def largest(x: Tensor) -> float:
    """The largest absolute value of a channels-last map, never 0."""
    return max(cv2.norm(as_rows(x), cv2.NORM_INF), 1e-6)


def quantize(x: Tensor, step: float, zero: int) -> Tensor:
    """float32 channels-last -> uint8 channels-last, rounded and saturated in one pass."""
    B, C, H, W = x.shape
    rows = as_rows(x)
    codes = cv2.addWeighted(rows, 1 / step, rows, 0.0, float(zero), dtype=cv2.CV_8U)
    return torch.from_numpy(codes).reshape(B, H, W, C).permute(0, 3, 1, 2)


class QuantizedConv(nn.Module):
    """One convolution on codes. `side`: of the input it is packed for."""

    def __init__(self, layer, side: int):
        super().__init__()
        weight, self.bias = fold(layer)
        conv, (integers, self.scales) = layer.conv, quantize_rows(weight, torch.ones(1))     # finds the stored integers
        self.geometry = (list(conv.stride), list(conv.padding), [1, 1], conv.groups)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = torch.ops.onednn.qconv_prepack(
            integers, self.scales, 1.0, 0, *self.geometry, [1, conv.in_channels, side, side])

    def forward(self, x: Tensor, source: tuple[float, int], target: tuple[float, int] | None = None,
                residual: Tensor | None = None) -> Tensor:
        """Codes with (step, zero) `source` -> codes with `target`, or float32, added to `residual`, where it is None."""
        inputs = (x, *source, self.weight, self.scales, self.zeros)
        step, zero = target or (1.0, 0)
        kind = torch.float32 if target is None else torch.uint8
        if residual is None:
            return torch.ops.onednn.qconv2d_pointwise(
                *inputs, self.bias, *self.geometry, step, zero, kind, "none", [], "")
        return torch.ops.onednn.qconv2d_pointwise.binary(                     # written into `residual`
            *inputs, residual, self.bias, *self.geometry, step, zero, kind, 1.0, 0, "sum", 1.0, "none", [], "")


class QuantizedChain(nn.Module):
    """fast.Chain in 8 bits: channels-last in, float32 channels-last out."""

    def __init__(self, block: nn.Module, name: str, shortcut: bool, side: int, calibration: dict[str, Tensor]):
        super().__init__()
        self.shortcut, self.extent, convs = shortcut, calibration[f"{name}.input"].item(), []
        self.ranges = [calibration[f"{name}.{child}"].tolist() for child, layer in block.named_children() if layer.act]
        for layer in block.children():
            convs.append(QuantizedConv(layer, side))
            side //= layer.conv.stride[0]
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        m = largest(x)
        source = step_and_zero(-self.extent * m, self.extent * m)
        y = quantize(x, *source)
        for conv, (lowest, highest) in zip(self.convs, self.ranges):
            target = step_and_zero(max(lowest * m, LOWEST), highest * m)
            y = conv(y, source, target)
            table, source = gelu_table(*target)
            rows = as_rows(y)
            cv2.LUT(rows, table, dst=rows)                                    # in place: rows are y's memory
        return self.convs[-1](y, source, residual=x if self.shortcut else None)


def quantized_blocks(encoder: EfficientViTSam) -> dict[str, nn.Module]:
    """The blocks that run in 8 bits, by name: FusedMBConv and MBConv of stages 1 to 4 and of the neck."""
    return {name: block for name, block in encoder.named_modules() if isinstance(block, (FusedMBConv, MBConv))}


def quantized_encoder(encoder: EfficientViTSam, size: int, calibration: dict[str, Tensor],
                      dtype: torch.dtype) -> FastEfficientViT:
    """`dtype`: of what stays in float inside the attention and the stem."""
    names = {block: name for name, block in quantized_blocks(encoder).items()}

    def chain(block, shortcut, side):
        if block in names:
            return QuantizedChain(block, names[block], shortcut, side, calibration)
        return Chain(block, shortcut, side, dtype)
    return FastEfficientViT(encoder, size, dtype, chain)
