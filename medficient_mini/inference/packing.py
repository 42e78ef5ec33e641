"""Weights as 8-bit integers with one scale per output channel: a quarter of the file, expanded to float32 on loading.

A packed state dict holds, for every convolution and linear weight, `key` int8 (the weight's shape) and `key.scale`
float32 (first dimension): weight = int8 · scale. Small tensors and vectors (norms, biases, tokens) stay as they are.
"""
import torch
from torch import Tensor

State = dict[str, Tensor]
SCALE = ".scale"
SMALLEST = 4096                      # Tensors with fewer numbers save nothing, and tokens are sensitive.
SHRINK = torch.linspace(1.0, 0.7, 7)         # candidate clipping points, as fractions of a channel's largest weight


def pack_state(state: State) -> State:
    """Pack a float32 state dict on the CPU as the module says; the result can be saved and read without code."""
    packed = dict(state)
    for key, value in state.items():
        if key.endswith("weight") and value.ndim > 1 and value.numel() >= SMALLEST:
            packed[key], packed[key + SCALE] = quantize_rows(value)
    return packed


def expand_state(packed: State) -> State:
    """Turn a packed state dict back into a float32 one; one that is not packed comes back unchanged."""
    state = dict(packed)
    for key, value in packed.items():
        if key + SCALE in packed:
            scale = state.pop(key + SCALE)                                                # (C,)
            state[key] = value * scale.reshape(-1, *[1] * (value.ndim - 1))
    return state


def quantize_rows(weight: Tensor, candidates: Tensor = SHRINK) -> tuple[Tensor, Tensor]:
    """Round a float weight (C, …) to int8 of the same shape, -127 to 127, with a float scale (C,).

    Each row takes the clipping point of `candidates` with the least squared error. Its largest weight becomes ±127, so
    packing what was expanded, with its own maximum (candidates [1.0]), gives the same integers again.
    """
    rows = weight.flatten(1)
    largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-12)                           # (C, 1)
    best, scale = torch.inf, largest / 127
    for shrink in candidates:
        step = largest * shrink / 127
        error = ((rows / step).round().clamp(-127, 127) * step - rows).square().sum(1, keepdim=True)
        better = error < best * (1 - 1e-6)
        best, scale = torch.where(better, error, best), torch.where(better, step, scale)
    integers = (rows / scale).round().clamp(-127, 127).to(torch.int8)
    return integers.reshape(weight.shape), scale.flatten()
