"""8-bit convolutions for the EfficientViT encoders: calibrated on a few images, converted, and run.

    python -m medficient_mini.cpu.int8 -w weights.pth -i cases -o weights_int8.pth

The file is a quarter of the float one and serves every precision. Four images of each modality are enough.

Inside the MBConv and fused MBConv blocks everything has 8 bits: the block's input is rounded to unsigned codes, each
convolution (signed weights) writes codes, GELU is a table of their 256 values, and the last convolution writes float32
and adds the residual. All else stays in float.

Activations differ in size by a factor of thirty between images (colour against grey), so a block's ranges are multiples
of the largest absolute value m of its input. They are the calibration, saved beside the weights by the block's name:
`<block>.input` (1,), the input's range being ± that; `<block>.<layer>` (2,), lowest and highest value before each GELU.
"""
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..files import exit_status, option_parser, whole_file
from ..inference.checkpoint import load_model
from ..inference.geometry import to_network
from ..inference.npz import list_cases, modality_of, read_case
from ..inference.packing import pack_state, quantize_rows
from ..nets.efficientvit import ConvLayer, EfficientViTSam, FusedMBConv, MBConv, Residual
from ..show.progress import ProgressBar
from .convolutions import fold

LOWEST, GELU_MIN = -4.0, -0.1701     # GELU of less than LOWEST is 0 (to 1e-4); and GELU's least value
SAMPLES, BINS = 16384, 512           # values looked at of each activation map, and the bins that count them
FRACTIONS = np.linspace(1.0, 0.2, 17)          # candidate clipping points, as fractions of the extremes
Scale = tuple[float, int]            # step and zero of codes: value = (code - zero) · step


def gelu(x):
    """GELU of an array by the tanh formula, as nets/efficientvit.py has it."""
    return F.gelu(torch.from_numpy(x), approximate="tanh").numpy()


def scale_of(lowest: float, highest: float) -> Scale:
    """The scale of 256 codes over a range, which is widened to hold 0."""
    lowest, highest = min(lowest, 0.0), max(highest, 1e-6)
    step = (highest - lowest) / 255
    return step, round(-lowest / step)


def gelu_table(step, zero):
    """The codes of GELU for each of the 256 codes of a scale: (256,) uint8, and the scale of the result."""
    values = gelu((np.arange(256) - zero) * step)
    after = scale_of(GELU_MIN, values[-1])
    return np.clip(np.round(values / after[0]) + after[1], 0, 255).astype(np.uint8), after


def as_rows(x: Tensor) -> np.ndarray:
    """A channels-last map (B, C, H, W) as a matrix (B·H·W, C) for OpenCV, in the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1]).numpy()


class QuantizedConv(nn.Module):
    """One convolution (with its batch norm) on codes."""

    def __init__(self, layer: ConvLayer):
        super().__init__()
        conv = fold(layer.conv, layer.norm)
        self.geometry, self.bias = (conv.stride, conv.padding, conv.dilation, conv.groups), conv.bias.detach()
        # One candidate, no clipping: weights that were packed in 8 bits give their stored integers again.
        self.weight, self.scales = quantize_rows(conv.weight.detach(), torch.ones(1))
        self.zeros = torch.zeros(len(self.bias), dtype=torch.int32)

    def forward(self, x: Tensor, source: Scale, target: Scale | None = None, residual: Tensor | None = None) -> Tensor:
        """Convolve codes x (B, inputs, H, W) uint8 of scale `source`, channels-last: (B, outputs, H/stride, W/stride).

        Gives codes of scale `target`, or float32 where that is None, then added to a `residual`, in its memory.
        """
        weight = self.weight
        if not weight.is_mkldnn:                   # oneDNN's best order of the weights depends on the size of the map
            weight = self.weight = torch.ops.onednn.qconv_prepack(
                weight, self.scales, 1.0, 0, *self.geometry, x.shape)
        convolve, addend, how = torch.ops.onednn.qconv2d_pointwise, [], []
        if residual is not None:
            convolve, addend, how = convolve.binary, [residual], [1.0, 0, "sum", 1.0]
        output = (1.0, 0, torch.float32) if target is None else (*target, torch.uint8)
        return convolve(x, *source, weight, self.scales, self.zeros, *addend, self.bias, *self.geometry, *output, *how,
                        "none", [], "")


class QuantizedBlock(nn.Module):
    """A Residual of nets/efficientvit.py with its block in 8 bits; `ranges` is its calibration, in its order."""

    def __init__(self, plain: Residual, ranges: list):
        super().__init__()
        self.shortcut, ((self.extent,), *self.ranges) = plain.shortcut, ranges
        self.convs = nn.ModuleList(QuantizedConv(layer) for layer in plain.main.children())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) float -> (B, outputs, H/stride, W/stride) float32; a float32 input takes the sum itself."""
        x = x.to(torch.float32, memory_format=torch.channels_last)
        rows, y = as_rows(x), torch.empty_like(x, dtype=torch.uint8)
        m = max(cv2.norm(rows, cv2.NORM_INF), 1e-6)
        step, zero = scale = scale_of(-self.extent * m, self.extent * m)
        cv2.addWeighted(rows, 1 / step, rows, 0, zero, as_rows(y), cv2.CV_8U)          # it rounds and saturates
        for conv, (lowest, highest) in zip(self.convs, self.ranges):
            before = scale_of(max(lowest * m, LOWEST), highest * m)
            y = conv(y, scale, before).contiguous(memory_format=torch.channels_last)
            rows, (table, scale) = as_rows(y), gelu_table(*before)
            cv2.LUT(rows, table, rows)
        return self.convs[-1](y, scale, residual=x if self.shortcut else None)


def swap_blocks(encoder: EfficientViTSam, calibration: dict[str, Tensor]) -> None:
    """Put QuantizedBlocks, in place and by name, where `encoder` has the Residuals that the calibration is of."""
    for name in {key.rpartition(".main.")[0] for key in calibration}:
        ranges = [value.tolist() for key, value in calibration.items() if key.startswith(f"{name}.main.")]
        encoder.set_submodule(name, QuantizedBlock(encoder.get_submodule(name), ranges))


class Observer:
    """Watches what goes into a module over the calibration images and finds the range of 8 bits that loses least.

    Without `entry` that is a block's input, whose largest absolute value m is the unit of all ranges. With the block's
    `entry` it goes into GELU: errors count after it, and values below LOWEST not at all.
    """

    def __init__(self, module: nn.Module, entry=None):
        self.entry, self.floor = entry, LOWEST if entry else -np.inf
        self.seen = []               # of each image: m, the centres of the bins (BINS,), the values in each (BINS,)
        self.hook = module.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        """Count a random sample of the values that go into the module."""
        values = inputs[0].flatten()
        m = self.entry.seen[-1][0] if self.entry else max(values.abs().max().item(), 1e-6)
        sample = values[torch.randint(len(values), (SAMPLES,))].clamp(min=self.floor)
        counts, edges = np.histogram(sample, BINS)
        self.seen.append((m, (edges[1:] + edges[:-1]) / 2, counts))

    def loss(self, low, high):
        """Squared error of codes over low · m … high · m relative to the values' squares, summed over the images."""
        after, total = gelu if self.entry else np.asarray, 0.0
        for m, values, counts in self.seen:
            step, zero = scale_of(max(low * m, self.floor), high * m)
            codes, true = np.clip(np.round(values / step) + zero, 0, 255), after(values)
            error = after((codes - zero) * step) - true
            total += counts @ error**2 / max(counts @ true**2, 1e-12)
        return total

    def best_range(self):
        """Find the range of least loss, in multiples of m: [± this] for a block's input, else [lowest, highest]."""
        if self.entry is None:
            return [min(FRACTIONS, key=lambda f: self.loss(-f, f))]
        lowest = min(values[0] / m for m, values, _ in self.seen)
        highest = max(values[-1] / m for m, values, _ in self.seen)
        high = min(FRACTIONS, key=lambda f: self.loss(lowest, f * highest)) * highest
        low = min(FRACTIONS, key=lambda f: self.loss(f * lowest, high)) * lowest    # the two ends hardly interact
        return [low, high]


@torch.inference_mode()
def calibrate(encoder: EfficientViTSam, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The activation ranges of a float encoder over network inputs (1, 3, S, S); see the module for their names."""
    torch.manual_seed(0)                                       # of the samples that observers take
    observers = {}
    for name, block in encoder.named_modules():
        if isinstance(block, (FusedMBConv, MBConv)):
            entry = observers[f"{name}.input"] = Observer(block)
            *inner, _ = block.named_children()                 # no GELU follows the last layer
            observers |= {f"{name}.{child}": Observer(layer.act, entry) for child, layer in inner}
    for x in ProgressBar(inputs, len(inputs), "activation ranges"):
        encoder(x)
    for observer in observers.values():
        observer.hook.remove()
    return {name: torch.tensor(observer.best_range(), dtype=torch.float32) for name, observer in observers.items()}


def network_inputs(folder: str, count: int, size: int) -> list[Tensor]:
    """Network inputs (1, 3, size, size) of `count` cases of each modality, evenly spaced; of volumes the middle slice."""
    groups, inputs = {}, []
    for path in list_cases(folder):
        groups.setdefault(modality_of(path), []).append(path)
    for group in groups.values():
        for i in np.linspace(0, len(group) - 1, min(count, len(group)), dtype=int):
            case = read_case(group[i], need_boxes=False)
            image = case.pixels[len(case.pixels) // 2] if case.is_3d else case.pixels
            inputs.append(to_network(image, size)[None])
    return inputs


def write_checkpoint(argv) -> None:
    """Write an 8-bit checkpoint as the command line says. ValueError where the weights or cases do not serve."""
    parser, add = option_parser(__doc__)
    add("-w --weights", str, "checkpoint of an EfficientViT network", required=True)
    add("--decoder-weights", str, "checkpoint whose decoder completes a bare encoder")
    add("-i --input", str, "folder of NPZ cases to calibrate on", required=True)
    add("-o --output", Path, "file to write", required=True)
    add("--count", 4, "cases of each modality to calibrate on")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise ValueError(f"--count: expected a number above 0, found {arguments.count}")
    model = load_model(arguments.weights, arguments.decoder_weights)
    if not isinstance(model.image_encoder, EfficientViTSam):
        raise ValueError(f"{arguments.weights}: int8: expected an EfficientViT network, found {model.name}")
    inputs = network_inputs(arguments.input, arguments.count, model.image_size)
    content = {"network": model.name, "model": pack_state(model.state_dict()),
               "calibration": calibrate(model.image_encoder, inputs)}
    with whole_file(arguments.output) as temporary:
        torch.save(content, temporary)
    print(f"{arguments.output}: activation ranges of {len(inputs)} images")


def main(argv=None) -> int:
    """Run the command line; return 1, with a line on stderr, where it failed."""
    return exit_status(lambda: write_checkpoint(argv))


if __name__ == "__main__":
    sys.exit(main())
