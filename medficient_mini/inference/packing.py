"""Weights as 8-bit integers with one scale per output channel: a quarter of the file, expanded to float32 on loading.

A packed state dict holds, for every convolution and linear weight, `key` int8 (the weight's shape) and `key.scale`
float32 (first dimension): weight = int8 · scale. Small tensors and vectors (norms, biases, tokens) stay as they are.
Packing what was expanded gives the same integers again, so nothing is lost by saving twice.
"""
import torch
from torch import Tensor

SCALE = ".scale"
SMALLEST = 4096                      # tensors with fewer numbers stay float32: they save nothing and tokens are sensitive
SHRINK = torch.linspace(1.0, 0.7, 7)          # candidate clipping points, as fractions of a channel's largest weight


def pack_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float state dict -> packed state dict on the CPU (see the module), loadable with weights_only=True."""
    packed = {}
    for key, value in state.items():
        value = value.detach().cpu()
        if not value.is_floating_point() or value.ndim < 2 or value.numel() < SMALLEST or not key.endswith("weight"):
            packed[key] = value
        else:
            packed[key], packed[key + SCALE] = quantize_rows(value.float())
    return packed


def expand_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packed state dict -> float32 state dict; one that is not packed comes back unchanged."""
    return {key: expand_rows(value, packed[key + SCALE]) if key + SCALE in packed else value
            for key, value in packed.items() if not (key.endswith(SCALE) and key.removesuffix(SCALE) in packed)}


def quantize_rows(weight: Tensor, candidates: Tensor = SHRINK) -> tuple[Tensor, Tensor]:
    """(C, …) float -> int8 of the same shape and scale (C,), symmetric, -127 … 127.

    Each row takes the clipping point of `candidates` with the least squared error. Its largest weight always becomes
    ±127, which is why quantizing an expanded weight with its own maximum (candidates [1.0]) finds the same integers.
    """
    rows = weight.flatten(1)
    largest = rows.abs().amax(1).clamp(min=1e-12)
    best = torch.full_like(largest, torch.inf)
    scale = largest / 127
    for shrink in candidates.tolist():
        candidate = largest * shrink / 127
        error = ((rows / candidate[:, None]).round().clamp(-127, 127) * candidate[:, None] - rows).square().sum(1)
        better = error < best * (1 - 1e-6)
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    integers = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return integers.reshape(weight.shape), scale


def expand_rows(integers: Tensor, scale: Tensor) -> Tensor:
    """int8 (C, …) and scale (C,) -> float32 of the same shape."""
    return integers * scale.reshape(-1, *[1] * (integers.ndim - 1))        # int8 · float32 is float32, in one pass
