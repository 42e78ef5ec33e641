"""Volumes: boxes (N, 6) -> masks, slice by slice. `segment_volume` is the way in.

The default prompts each slice anew, the published propagation (`propagate`) only the middle one.
"""
import numpy as np
import torch
from torch import Tensor

from .geometry import box_of_mask, boxes_to_network, enlarged_logits, logits_to_mask, scaled_size
from .predictor import decode_boxes, encode, label_dtype

PROPAGATIONS = ("sections", "published")
OVERLAPS = ("higher", "later")
LITE_MEDSAM_LOOSENED = 3             # network pixels, LiteMedSAM's inference script


def segment_volume(model, volume: np.ndarray, boxes: np.ndarray, start: np.ndarray | None = None,
                   propagation: str = "sections", overlap: str = "higher", cache_mb: float = 1024) -> np.ndarray:
    """uint8 (D, H, W[, 3]) and boxes (N, 6) x0 y0 z0 x1 y1 z1, all inclusive -> labels (D, H, W) uint8 or uint16.

    Boxes may be of any numeric type and lie within the volume. ValueError for other words than these:
    propagation "sections": a person's box bounds the object in every slice, and an object narrows towards its ends.
    So each slice is prompted with `section_boxes`, midway between the given box and the cross-section of the
    ellipsoid in it, and its mask is clipped to the given box. No slice depends on another: nothing drifts, and a
    slice where the network sees nothing stays empty. "published": see `propagate`.
    start: int (N,), the slices that the boxes were drawn on, where the objects are largest; else the middle ones.
    overlap: a voxel that several objects claim goes to the "higher" logit, or to the "later" box as the authors have
    it ("published" always does). cache_mb: for "published". Box k gives label k.
    """
    if propagation not in PROPAGATIONS or overlap not in OVERLAPS:
        raise ValueError(f"propagation, overlap: expected one of {PROPAGATIONS} and of {OVERLAPS}, found "
                         f"{propagation!r} and {overlap!r}")
    boxes = np.asarray(boxes, np.float64).reshape(-1, 6)
    if propagation == "published":
        return propagate(model, volume, boxes, start, cache_mb)
    depth, height, width = volume.shape[:3]
    segs = np.zeros((depth, height, width), label_dtype(len(boxes)))
    first, last = boxes[:, 2], boxes[:, 5]
    low = np.clip(np.floor(boxes[:, [1, 0]]), 0, None).astype(int)                            # (N, 2) y0 x0
    high = np.clip(np.ceil(boxes[:, [4, 3]]) + 1, 0, None).astype(int)                        # (N, 2) y1 x1, half open
    for z in range(depth):
        objects = np.flatnonzero((first <= z) & (z <= last))
        if not len(objects):
            continue
        prompts = section_boxes(boxes[objects], z, start if start is None else start[objects])
        prompts = boxes_to_network(prompts, height, width, model.image_size)
        highest = np.zeros((height, width), np.float32)
        for k, logits in zip(objects, decode_boxes(model, encode(model, volume[z]), prompts)):
            region = tuple(slice(a, b) for a, b in zip(low[k], high[k]))
            logits = enlarged_logits(logits, height, width, model.image_size, region)
            claimed = logits > highest[region]
            segs[z][region][claimed] = k + 1
            if overlap == "higher":
                highest[region][claimed] = logits[claimed]
    return segs


def section_boxes(boxes: np.ndarray, z: int, start: np.ndarray | None = None) -> np.ndarray:
    """float64 boxes (N, 6) that reach slice z -> their prompts (N, 4) x0 y0 x1 y1 there, in pixels of the volume.

    Midway between the given box and that of the cross-section at z of the ellipsoid inscribed in it (two halves of
    different height where `start`, the slice of the largest section, is not the middle one).
    """
    first, last = boxes[:, 2], boxes[:, 5]
    largest = (first + last) / 2 if start is None else start
    reach = np.where(z > largest, last - largest, largest - first) + 0.5     # to the outer face of the end slice
    scale = (1 + np.sqrt(np.clip(1 - ((z - largest) / reach) ** 2, 0, 1))) / 2
    middle, half = (boxes[:, :2] + boxes[:, 3:5]) / 2, (boxes[:, 3:5] - boxes[:, :2]) / 2
    return np.hstack([middle - scale[:, None] * half, middle + scale[:, None] * half])


# ------------------------------------------------------------------------------------------- as published

class Embeddings:
    """Embeddings of the slices of one volume, each computed once while `cache_mb` allows.

    Slices are visited upward, then downward, so when memory is short the lowest kept slice, needed last, goes first.
    """

    def __init__(self, model, volume: np.ndarray, cache_mb: float):
        self.model, self.volume = model, volume
        self.limit = int(cache_mb * 2**20) // (256 * 64 * 64 * 4)
        self.kept: dict[int, Tensor] = {}

    def get(self, z: int, keep: bool) -> Tensor:
        """(1, 256, 64, 64) of slice z; `keep` it for a later visit."""
        embedding = self.kept.pop(z, None)
        if embedding is None:
            embedding = encode(self.model, self.volume[z])
        if keep and self.limit > 0:
            if len(self.kept) >= self.limit:
                del self.kept[min(self.kept)]
            self.kept[z] = embedding
        return embedding


def next_prompt(model, mask: np.ndarray, default: Tensor) -> Tensor:
    """The prompt (4,) in network pixels for the neighbour slice: the box of this slice's mask, `default` if empty."""
    box = box_of_mask(mask)
    if box is None:
        return default
    size = model.image_size
    prompt = boxes_to_network(box[None], *mask.shape, size)[0]
    if model.name == "lite_medsam":
        prompt = prompt + LITE_MEDSAM_LOOSENED * torch.tensor([-1.0, -1.0, 1.0, 1.0])
        height, width = scaled_size(*mask.shape, size)
        prompt = torch.minimum(prompt.clamp(min=0), torch.tensor([width, height, width, height], dtype=torch.float32))
    return prompt


def propagate(model, volume: np.ndarray, boxes: np.ndarray, start: np.ndarray | None = None,
              cache_mb: float = 1024) -> np.ndarray:
    """The published propagation (LiteMedSAM's and MedficientSAM's inference scripts); arguments of `segment_volume`.

    The middle slice (z0 + z1) // 2 is prompted with the box, every further slice, up to z1 and down to z0, with the
    box of its neighbour's mask; where masks overlap, the later box wins. All boxes that wait for a slice are decoded
    as one batch on one embedding; at most `cache_mb` MB of embeddings are kept.
    """
    depth, height, width = volume.shape[:3]
    segs = np.zeros((depth, height, width), label_dtype(len(boxes)))
    if not len(boxes):
        return segs
    first, last = boxes[:, 2].astype(int), boxes[:, 5].astype(int)
    middle = (first + last) // 2 if start is None else start
    defaults = boxes_to_network(boxes[:, [0, 1, 3, 4]], height, width, model.image_size)     # (N, 4)
    embeddings = Embeddings(model, volume, cache_mb)
    upward, downward = defaults.clone(), defaults.clone()     # each object's prompt for its next slice

    def visit(z: int, objects: np.ndarray, prompts: Tensor, keep: bool) -> None:
        logits = decode_boxes(model, embeddings.get(z, keep), prompts[objects])              # (n, 256, 256)
        for k, one in zip(objects, logits):
            mask = logits_to_mask(one[None], height, width, model.image_size)[0]
            segs[z][mask & (segs[z] <= k)] = k + 1            # a later box has the higher label
            prompts[k] = next_prompt(model, mask, defaults[k])
            if z == middle[k]:
                downward[k] = prompts[k]

    for z in range(middle.min(), last.max() + 1):
        objects = np.flatnonzero((middle <= z) & (z <= last))
        if len(objects):
            visit(z, objects, upward, keep=bool(((first <= z) & (z < middle)).any()))
    for z in range(middle.max() - 1, first.min() - 1, -1):
        objects = np.flatnonzero((first <= z) & (z < middle))
        if len(objects):
            visit(z, objects, downward, keep=False)
    return segs
