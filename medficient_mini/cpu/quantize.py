"""Weights to 8 bits, with the activation ranges that the 8-bit encoder needs.

    python -m medficient_mini.cpu.quantize -w weights.pth -i cases -o weights_int8.pth

The file is a quarter of the float one, serves every precision (it expands to float32) and is what
`infer.py --precision int8` asks for. A few dozen images, dealt evenly over the modalities, are enough.
"""
import argparse
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..inference.npz import list_cases, modality_of, read_case
from ..inference.checkpoint import atomic_torch_save, load_model
from .int8 import LOWEST, gelu, quantized_blocks, step_and_zero
from ..inference.geometry import to_network
from ..nets.efficientvit import EfficientViTSam
from ..show.progress import progress
from ..inference.packing import pack_state

SAMPLES = 16384                      # values looked at of each activation map
BINS = 512
FRACTIONS = np.linspace(1.0, 0.2, 17)          # of the extremes: candidate clipping points


class Observer:
    """Values of one activation over the calibration images, and the 8-bit range, in multiples of m, that loses least.

    m is the largest absolute input of the block on that image (see fast_int8.py). `function` is what follows, and
    values below `floor` are as good as `floor`.
    """

    def __init__(self, function=lambda x: x, floor: float = -np.inf):
        self.function, self.floor, self.seen = function, floor, []

    def see(self, x: Tensor, m: float) -> None:
        flat = x.detach().reshape(-1).clamp(min=self.floor)
        counts, edges = np.histogram(flat[torch.randint(len(flat), (SAMPLES,))].numpy(), BINS)
        centres = ((edges[1:] + edges[:-1]) / 2)[counts > 0]
        self.seen.append((m, centres, counts[counts > 0]))

    def loss(self, low: float, high: float) -> float:
        """Mean over the images of the squared error relative to the square of the true values."""
        total = 0.0
        for m, values, counts in self.seen:
            step, zero = step_and_zero(max(low * m, self.floor), high * m)
            codes = np.clip(np.round(values / step) + zero, 0, 255)
            after = self.function(values)
            error = self.function((codes - zero) * step) - after
            total += (counts * error**2).sum() / max((counts * after**2).sum(), 1e-12)
        return total / len(self.seen)

    def extremes(self) -> tuple[float, float]:
        return min(v.min() / m for m, v, _ in self.seen), max(v.max() / m for m, v, _ in self.seen)


def symmetric_range(observer: Observer) -> Tensor:
    """(1,): the range of a block's input is ± this."""
    return torch.tensor([min(FRACTIONS, key=lambda f: observer.loss(-f, f))], dtype=torch.float32)


def gelu_range(observer: Observer) -> Tensor:
    """(2,): lowest and highest before GELU."""
    lowest, highest = observer.extremes()
    highest = max(highest, 1e-3)
    high = min(FRACTIONS, key=lambda f: observer.loss(lowest, f * highest)) * highest         # one after the other:
    low = min(FRACTIONS, key=lambda f: observer.loss(f * lowest, high)) * lowest              # they hardly interact
    return torch.tensor([low, high], dtype=torch.float32)


@torch.inference_mode()
def calibrate(encoder: EfficientViTSam, inputs: list[Tensor]) -> dict[str, Tensor]:
    """What fast_int8.quantized_encoder asks for, from float weights and network inputs (1, 3, S, S)."""
    torch.manual_seed(0)
    outer, inner, hooks, m = {}, {}, [], {}

    def see_input(name, x):
        m[name] = max(x.abs().max().item(), 1e-6)
        outer.setdefault(f"{name}.input", Observer()).see(x, m[name])
    for name, block in quantized_blocks(encoder).items():
        hooks.append(block.register_forward_pre_hook(lambda module, args, name=name: see_input(name, args[0])))
        for child, layer in block.named_children():
            if layer.act is not None:
                observer = inner[f"{name}.{child}"] = Observer(gelu, LOWEST)
                hooks.append(layer.act.register_forward_pre_hook(
                    lambda module, args, observer=observer, name=name: observer.see(args[0], m[name])))
    for x in progress(inputs, len(inputs), "activation ranges"):
        encoder(x)
    for hook in hooks:
        hook.remove()
    return ({key: symmetric_range(observer) for key, observer in outer.items()}
            | {key: gelu_range(observer) for key, observer in inner.items()})


def choose_cases(folder: str, count: int) -> list[Path]:
    """`count` cases dealt evenly over the modalities, evenly spaced within each."""
    groups: dict[str, list[Path]] = {}
    for path in list_cases(folder):
        groups.setdefault(modality_of(path.name), []).append(path)
    share = -(-count // len(groups))
    spaced = ([group[i] for i in np.linspace(0, len(group) - 1, min(share, len(group))).astype(int)]
              for group in groups.values())
    return [path for row in zip_longest(*spaced) for path in row if path is not None][:count]


def network_input(path: Path, size: int) -> Tensor:
    """(1, 3, size, size) of a case; of a volume, the middle slice of its first box."""
    case = read_case(path)
    image = case.image
    if case.is_3d:
        image = case.volume[int(case.boxes[0, 2] + case.boxes[0, 5]) // 2 if len(case.boxes) else len(case.volume) // 2]
    return to_network(image, size)[None]


def run(arguments) -> None:
    model = load_model(arguments.weights, arguments.decoder_weights)
    if not isinstance(model.image_encoder, EfficientViTSam):
        raise ValueError(f"{arguments.weights}: 8 bits: expected an EfficientViT network, found {model.name}")
    inputs = [network_input(path, model.image_size) for path in choose_cases(arguments.input, arguments.count)]
    atomic_torch_save({"network": model.name, "model": pack_state(model.state_dict()),
                       "calibration": calibrate(model.image_encoder, inputs)}, arguments.output)
    before, after = (Path(path).stat().st_size / 1e6 for path in (arguments.weights, arguments.output))
    print(f"{arguments.output}: {after:.1f} MB (from {before:.1f} MB), ranges of {len(inputs)} images")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-w", "--weights", required=True, help="checkpoint of an EfficientViT network")
    parser.add_argument("--decoder-weights", help="checkpoint whose prompt encoder and mask decoder complete a bare encoder")
    parser.add_argument("-i", "--input", required=True, help="folder of NPZ cases to calibrate on")
    parser.add_argument("-o", "--output", required=True, type=Path, help="file to write")
    parser.add_argument("--count", type=int, default=44, help="images to calibrate on")
    try:
        run(parser.parse_args())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
