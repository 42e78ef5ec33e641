"""A loaded network in its form for inference on a CPU: the same results in less time.

Image encoders keep their own forward pass; their layers are swapped for fused ones (convolutions.py) or 8-bit ones
(int8.py). The mask decoder is arranged anew (decoder.py). The operators behind this are private to torch, whose
compiler uses them: where one is absent, the plain network is used.
"""
import copy
import sys

import torch
import torch.nn as nn
from torch import Tensor

from ..machine import native_bf16, return_memory
from ..nets.sam import Sam
from .convolutions import fuse
from .decoder import FastDecoder
from .int8 import swap_blocks

PRECISIONS = ("auto", "f32", "bf16", "int8")
OPERATORS = ("mkldnn._reorder_convolution_weight", "mkldnn._convolution_pointwise", "mkldnn._convolution_pointwise_",
             "onednn.qconv_prepack", "onednn.qconv2d_pointwise")


def resolve_precision(precision: str) -> str:
    """Turn "auto" into "bf16" where the CPU has it, else "f32"; other names stay. ValueError for an unknown one."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: expected one of {', '.join(PRECISIONS)}, found {precision}")
    return precision if precision != "auto" else "bf16" if native_bf16() else "f32"


def missing_operator(precision: str) -> str | None:
    """Name what this torch or CPU lacks for `precision` ("f32", "bf16" or "int8"); None where it lacks nothing."""
    if not torch.backends.mkldnn.is_available():
        return "oneDNN"
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16 in oneDNN (it needs AVX-512)"
    if precision == "int8" and not getattr(torch.cpu, "_is_vnni_supported", bool)():          # bool() is False
        return "8-bit dot products (VNNI) in the CPU"
    for name in OPERATORS:
        library, operator = name.split(".")
        if not hasattr(getattr(torch.ops, library), operator):
            return f"torch.ops.{name}"
    return None


def to_fast(model: Sam, precision: str) -> nn.Module:
    """Give a network on the CPU (in evaluation mode; it is not changed) its form for inference, of the same interface.

    `precision` is "f32", "bf16" or "int8". Returns a FastSam; or `model` itself, with one line on stderr, where torch
    lacks an operator. ValueError: "int8" without `model.calibration`, the activation ranges of its weights.
    """
    if precision == "int8" and not getattr(model, "calibration", None):
        raise ValueError(f"precision int8: expected the activation ranges of an EfficientViT network, {model.name} comes "
                         "without; make them with: python -m medficient_mini.cpu.int8 -w WEIGHTS -i CASES -o FILE")
    if lacks := missing_operator(precision):
        print(f"precision {precision}: plain model used, the fast form lacks {lacks}", file=sys.stderr)
        return model
    return FastSam(model, precision)


class FastSam(nn.Module):
    """The form of a network (nets/sam.py, Sam) for inference on a CPU, with what inference asks of Sam."""

    @torch.inference_mode()
    def __init__(self, model: Sam, precision: str):
        super().__init__()
        self.name, self.image_size, self.resize = model.name, model.image_size, model.resize
        self.bf16 = precision == "bf16" or precision == "int8" and native_bf16()    # int8 leaves some layers in float
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        plain = model.image_encoder
        shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
        self.encoder = copy.deepcopy(plain, shared)                # modules of its own on the same weights
        if precision == "int8":
            swap_blocks(self.encoder, model.calibration)
        fuse(self.encoder, dtype)
        self.prompt_encoder, self.decode = model.prompt_encoder, FastDecoder(model, dtype)
        self.packed = False

    @torch.inference_mode()
    def image_encoder(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) float32 -> embeddings (B, 256, 64, 64) float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):        # the transformers' linear layers
            embedding = self.encoder(x.contiguous(memory_format=torch.channels_last)).float()
        if not self.packed:          # the first image has the weights packed; 100 MB of their old form are free now
            return_memory()
            self.packed = True
        return embedding
