"""A stand-in network for pipeline tests: what is brighter than half inside the box is the object."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F


PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"


class BrightSam(torch.nn.Module):
    """The interface of Sam that the pipeline uses, deterministic and fast; `encoded` counts the slices it saw."""
    name, image_size, resize = "medficientsam_l0", 512, "bilinear"

    def __init__(self, name: str = "medficientsam_l0"):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.name, self.inputs = name, []

    @property
    def encoded(self):
        return len(self.inputs)

    def image_encoder(self, x):                                               # (B, 3, 512, 512)
        self.inputs.extend([x.shape] * len(x))                                # unlike +=, safe with several workers
        return F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 64).expand(-1, 256, -1, -1)

    def decode(self, embedding, boxes=None, points=None, masks=None, image_index=None, multimask=False):
        bright = F.interpolate(embedding[:, :1], (256, 256), mode="bilinear") - 0.5           # (1, 1, 256, 256)
        centre = (torch.arange(256) + 0.5) * 2
        x0, y0, x1, y1 = (boxes.reshape(-1, 4, 1, 1) + torch.tensor([0, 0, 1, 1]).reshape(4, 1, 1)).unbind(1)
        inside = (centre[None] > x0) & (centre[None] < x1) & (centre[:, None] > y0) & (centre[:, None] < y1)
        logits = torch.where(inside[:, None], bright, torch.tensor(-1.0))                     # (N, 1, 256, 256)
        return logits.repeat(1, 3 if multimask else 1, 1, 1), torch.full((len(boxes), 3 if multimask else 1), 0.9)


def fast_or_skip(model):
    """The f32 inference form of a network; the test is skipped where torch lacks the operators for it."""
    from medficient_mini.cpu.fast import FastSam, to_fast
    fast = to_fast(model, "f32")
    if not isinstance(fast, FastSam):
        pytest.skip("this torch lacks the oneDNN operators")
    return fast


def squares(shape, places):
    """uint8 image of `shape` with bright squares (y0, y1, x0, x1), half open."""
    image = np.zeros(shape, np.uint8)
    for y0, y1, x0, x1 in places:
        image[y0:y1, x0:x1] = 255
    return image


def deterministic_sam(name: str, seed: int):
    """A network with the recorded outputs' weights, of ../shared/parity."""
    from medficient_mini.nets.sam import build_sam
    sys.path.insert(0, str(PARITY))
    import weights
    shapes = json.loads((PARITY / "keys.json").read_text())[name]
    model = build_sam(name).eval()
    model.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in weights.fill(shapes, seed).items()})
    return model
