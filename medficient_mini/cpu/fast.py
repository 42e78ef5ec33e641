"""A loaded network in its form for inference on a CPU: the same results in less time.

Image encoders keep their own forward pass, but for LiteMLA and Neck of EfficientViT, which convolutions.py writes
anew; their layers are swapped for fused ones (convolutions.py) or 8-bit ones (int8.py). The mask decoder is arranged anew (decoder.py). The operators behind this are private to torch (its compiler
uses them): where one is absent, the plain network is used.
"""
import copy
import sys

import torch
import torch.nn as nn
from torch import Tensor

from ..machine import native_bf16, return_memory
from ..nets.efficientvit import EfficientViTSam
from ..nets.sam import Sam
from .convolutions import fuse
from .decoder import FastDecoder
from .int8 import swap_blocks

PRECISIONS = ("auto", "f32", "bf16", "int8")


def resolve_precision(precision: str = "auto") -> str:
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
    names = ["mkldnn._reorder_convolution_weight", "mkldnn._convolution_pointwise", "mkldnn._convolution_pointwise_"]
    if precision == "int8":
        names += ["onednn.qconv_prepack", "onednn.qconv2d_pointwise"]
        if not getattr(torch.cpu, "_is_vnni_supported", bool)():              # bool() is False
            return "8-bit dot products (VNNI) in the CPU"
    for name in names:
        library, operator = name.split(".")
        if not hasattr(getattr(torch.ops, library), operator):
            return f"torch.ops.{name}"
    return None


def to_fast(model: Sam, precision: str = "f32") -> nn.Module:
    """Give `model` (in evaluation mode; it is not changed) in its form for inference, with the same interface.

    Args:
        model: a network; for "int8" with the activation ranges of its weights in `model.calibration`.
        precision: "f32", "bf16" or "int8".
    Returns:
        a FastSam (image_encoder, decode, image_size, resize, name, parameters()); or `model` itself, with one line on
        stderr that says why, away from the CPU and where torch lacks an operator.
    Raises:
        ValueError: "int8" for a network that is no EfficientViT, or without activation ranges.
    """
    if precision == "int8":
        if not isinstance(model.image_encoder, EfficientViTSam):
            raise ValueError(f"precision int8: expected an EfficientViT network, found {model.name}")
        if not getattr(model, "calibration", None):
            raise ValueError("precision int8: these weights hold no activation ranges; make them with: "
                             "python -m medficient_mini.cpu.int8 -w WEIGHTS -i CASES -o WEIGHTS_int8.pth")
    device = next(model.parameters()).device
    lacks = missing_operator(precision) if device.type == "cpu" else f"support for {device.type}"
    if lacks is not None:
        print(f"precision {precision}: plain model used, the fast form lacks {lacks}", file=sys.stderr)
        return model
    if precision == "bf16" and not native_bf16():
        print("precision bf16: this CPU emulates it; f32 is likely faster", file=sys.stderr)
    return FastSam(model, precision)


class FastSam(nn.Module):
    """The form of a network (nets/sam.py, Sam) for inference on a CPU, with what inference asks of Sam."""

    def __init__(self, model: Sam, precision: str):
        super().__init__()
        self.name, self.image_size, self.resize, self.precision = model.name, model.image_size, model.resize, precision
        self.prompt_encoder = model.prompt_encoder                 # its parameters tell the device
        bf16 = precision == "bf16" or precision == "int8" and native_bf16()    # int8 leaves some layers in float
        dtype = torch.bfloat16 if bf16 else torch.float32
        with torch.inference_mode():
            calibration = model.calibration if precision == "int8" else None
            self.image_encoder = FastEncoder(model.image_encoder, dtype, calibration)
            self.decode = torch.inference_mode()(FastDecoder(model, dtype))


class FastEncoder(nn.Module):
    """An image encoder with fused layers: images (B, 3, S, S) float32 -> embeddings (B, 256, 64, 64) float32."""

    def __init__(self, encoder: nn.Module, dtype: torch.dtype, calibration: dict[str, Tensor] | None = None):
        """`calibration`: the activation ranges of int8.py, where the MBConv blocks, fused or not, run in 8 bits."""
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
        self.encoder = copy.deepcopy(encoder, shared)              # modules of its own on the same weights
        if calibration is not None:
            swap_blocks(self.encoder, calibration)
        fuse(self.encoder, dtype)
        self.bf16, self.packed = dtype == torch.bfloat16, False

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):        # the transformers' linear layers
            embedding = self.encoder(x.contiguous(memory_format=torch.channels_last)).float()
        if not self.packed:          # the first image has the weights packed; 100 MB of their old form are free now
            return_memory()
            self.packed = True
        return embedding
