"""Volumes: boxes (N, 6) become labels, slice by slice. `segment_volume` is the way in.

By default every slice is prompted anew; the published propagation prompts the middle slice alone, and each further one
with its neighbour's mask. README.md beside this file compares them.
"""
import numpy as np
import torch
from torch import Tensor

from .boxes import as_array
from .compose import OVERLAPS, Composition, compose
from .geometry import box_of_mask, boxes_to_network, logits_to_mask, scaled_size
from .predictor import checked_boxes, checked_pixels, decode_boxes, encode

PROPAGATIONS = ("sections", "published")
LITE_MEDSAM_LOOSENED = 3             # network pixels, LiteMedSAM's inference script


class Stopped(Exception):
    """Raised by `segment_volume` where its `should_stop` answered yes; nothing is returned or written."""


def segment_volume(model, volume: np.ndarray, boxes: np.ndarray, drawn_slice: np.ndarray | None = None,
                   propagation: str = PROPAGATIONS[0], overlap: str = OVERLAPS[0], cache_mb: float = 1024, *,
                   progress=None, should_stop=None, details: bool = False,
                   separate: bool = False) -> np.ndarray | Composition:
    """Segment the objects in boxes of a volume: labels (D, H, W), where box k gives label k, counted from 1.

    With propagation "sections" each slice is prompted with `section_boxes`, midway between the given box and the
    cross-section of the ellipsoid in it: a person's box bounds the object in every slice, and an object narrows
    towards its ends. The masks are clipped to the given box. No slice depends on another, so nothing drifts, and a
    slice where the network sees nothing stays empty. For "published" see `propagate`.

    Args:
        model: what `load_model` returns.
        volume: uint8 (D, H, W) or (D, H, W, 3).
        boxes: (N, 6) x0 y0 z0 x1 y1 z1 in its voxels, all inclusive.
        drawn_slice: int (N,), the slices that the boxes were drawn on, where the objects are largest; None: the
            middle ones.
        propagation: one of PROPAGATIONS.
        overlap: one of OVERLAPS, who gets a voxel that several objects claim: see `compose`. "published" always
            gives it to the later box.
        cache_mb: with "published", the most memory that embeddings may take, in MB.
        progress: called as progress(done, total) after each slice.
        should_stop: called without arguments before each slice; where it returns true, Stopped is raised.
        details: return the whole Composition: labels, sizes and what was lost.
        separate: let the Composition keep each object's own mask as well.

    Raises:
        ValueError: one line, for another volume or option, or boxes that `check_boxes` refuses.
        Stopped: as `should_stop` wanted.
    """
    volume = checked_pixels(volume, 3)
    boxes = checked_boxes(boxes, volume.shape[:3])
    if propagation not in PROPAGATIONS:
        raise ValueError(f"propagation: expected one of {', '.join(PROPAGATIONS)}, found {propagation!r}")
    if drawn_slice is not None:
        drawn_slice = as_array(drawn_slice, "drawn_slice")
        if drawn_slice.shape != boxes.shape[:1] or drawn_slice.dtype.kind not in "iuf" or not (
                (drawn_slice >= boxes[:, 2]) & (drawn_slice <= boxes[:, 5]) & (drawn_slice % 1 == 0)).all():
            raise ValueError(f"drawn_slice: expected a whole number within each of {len(boxes)} boxes, "
                             f"found {drawn_slice.tolist()}")
    found = Composition(volume.shape[:3], len(boxes), separate)
    if propagation == "published":
        propagate(found, model, volume, boxes, drawn_slice, cache_mb, progress, should_stop)
    else:
        segment_sections(found, model, volume, boxes, drawn_slice, overlap, progress, should_stop)
    return found if details else found.labels


def watched(visits: list, progress, should_stop):
    """Give the visits of slices one by one, and tell and ask the caller of `segment_volume` at each."""
    for done, visit in enumerate(visits):
        if should_stop is not None and should_stop():
            raise Stopped(f"stopped after {done} of {len(visits)} slices")
        yield visit
        if progress is not None:
            progress(done + 1, len(visits))


def segment_sections(found: Composition, model, volume, boxes, drawn_slice, overlap, progress, should_stop) -> None:
    """Segment every slice on its own; arguments of `segment_volume`."""
    height, width = volume.shape[1:3]
    flat = boxes[:, [0, 1, 3, 4]]
    visits = [(z, np.flatnonzero((boxes[:, 2] <= z) & (z <= boxes[:, 5]))) for z in range(len(volume))]
    for z, objects in watched([visit for visit in visits if len(visit[1])], progress, should_stop):
        prompts = section_boxes(boxes[objects], z, None if drawn_slice is None else drawn_slice[objects])
        prompts = boxes_to_network(prompts, height, width, model.image_size)
        logits = decode_boxes(model, encode(model, volume[z]), prompts)          # (n, 256, 256)
        compose(found, objects, logits, flat[objects], model.image_size, overlap, z)


def section_boxes(boxes: np.ndarray, z: int, drawn_slice: np.ndarray | None = None) -> np.ndarray:
    """Make the prompts (N, 4) x0 y0 x1 y1 on slice z of boxes (N, 6) that reach it, float64 in pixels of the volume.

    Each is midway between the given box and the box round the cross-section at z of the ellipsoid inscribed in it:
    two halves of different height where `drawn_slice`, the slice of the largest section, is not the middle one.
    """
    first, last = boxes[:, 2], boxes[:, 5]
    largest = (first + last) / 2 if drawn_slice is None else drawn_slice
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
        """Return the embedding (1, 256, 64, 64) of slice z, and `keep` it for a later visit."""
        embedding = self.kept.pop(z, None)
        if embedding is None:
            embedding = encode(self.model, self.volume[z])
        if keep and self.limit > 0:
            if len(self.kept) >= self.limit:
                del self.kept[min(self.kept)]
            self.kept[z] = embedding
        return embedding


def next_prompt(model, mask: np.ndarray, default: Tensor) -> Tensor:
    """Return the neighbour slice's prompt (4,) in network pixels: the box of this mask (H, W), `default` if empty."""
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


def propagate(found: Composition, model, volume, boxes, drawn_slice, cache_mb: float, progress, should_stop) -> None:
    """Segment by the published propagation (LiteMedSAM's and MedficientSAM's scripts); arguments of `segment_volume`.

    The middle slice (z0 + z1) // 2 is prompted with the box; every further slice, up to z1 and down to z0, with the
    box of its neighbour's mask. Where masks overlap, the later box wins. All boxes that wait for a slice are decoded
    as one batch on one embedding.
    """
    height, width = volume.shape[1:3]
    first, last = boxes[:, 2].astype(int), boxes[:, 5].astype(int)
    middle = (first + last) // 2 if drawn_slice is None else drawn_slice
    defaults = boxes_to_network(boxes[:, [0, 1, 3, 4]], height, width, model.image_size)     # (N, 4)
    upward, downward = defaults.clone(), defaults.clone()     # each object's prompt for its next slice
    embeddings = Embeddings(model, volume, cache_mb)
    up = [(z, np.flatnonzero((middle <= z) & (z <= last)), upward) for z in range(len(volume))]
    down = [(z, np.flatnonzero((first <= z) & (z < middle)), downward) for z in reversed(range(len(volume)))]
    again = {z for z, objects, _ in down if len(objects)}     # slices visited a second time, on the way down

    for z, objects, prompts in watched([visit for visit in up + down if len(visit[1])], progress, should_stop):
        keep = prompts is upward and z in again
        logits = decode_boxes(model, embeddings.get(z, keep), prompts[objects])              # (n, 256, 256)
        for k, mask in zip(objects, logits_to_mask(logits, height, width, model.image_size)):
            found.claim(k, (z,), mask, mask & (found.labels[z] <= k))        # a later box has the higher label
            prompts[k] = next_prompt(model, mask, defaults[k])
            if z == middle[k]:
                downward[k] = prompts[k]
