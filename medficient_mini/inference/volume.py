"""Volumes: boxes (N, 6) become labels, slice by slice. `segment_volume` is the way in.

By default every slice is prompted anew; the published propagation prompts the middle slice alone, and each further one
with its neighbour's mask. README.md beside this file compares them.
"""
from functools import lru_cache, partial

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from ..machine import ahead, workers_on
from .boxes import as_numbers
from .compose import OVERLAPS, Composition, compose
from .geometry import box_of_mask, boxes_to_network, logits_to_mask, scaled_size
from .predictor import checked_boxes, checked_pixels, decode_boxes, encode, logits_of_boxes

PROPAGATIONS = ("sections", "published")
KEPT = 256                           # embeddings, 4 MB each: 1 GB at most
LITE_MEDSAM_LOOSENED = 3             # network pixels, LiteMedSAM's inference script


class Stopped(Exception):
    """Raised by `segment_volume` where its `should_stop` answered yes; nothing is returned or written."""


def segment_volume(model, volume: ndarray, boxes: ndarray, drawn_slice: ndarray | None = None,
                   propagation: str = PROPAGATIONS[0], overlap: str = OVERLAPS[0], *, progress=None,
                   should_stop=None, details: bool = False, separate: bool = False) -> ndarray | Composition:
    """Segment the objects in boxes of a volume: labels (D, H, W), where box k gives label k, counted from 1.

    Args:
        model: what `load_model` returns.
        volume: uint8 (D, H, W) or (D, H, W, 3).
        boxes: (N, 6) x0 y0 z0 x1 y1 z1 in its voxels, all inclusive.
        drawn_slice: int (N,), the slices the boxes were drawn on, where the objects are largest; None: the middle.
        propagation: "sections", see `segment_sections`, or "published", see `propagate`.
        overlap: who gets a voxel that several objects claim, see `compose`; as published, always the later box.
        progress: called as progress(done, total) after each slice.
        should_stop: called without arguments before each slice; where it returns true, Stopped is raised.
        details: return the whole Composition: labels, sizes and what was lost.
        separate: let the Composition keep each object's own mask as well.

    Raises:
        ValueError: one line, for another volume or option, or boxes that `check_boxes` refuses.
    """
    volume = checked_pixels(volume, 3)
    boxes = checked_boxes(boxes, volume.shape[:3])
    first, last = boxes[:, 2], boxes[:, 5]
    if propagation not in PROPAGATIONS:
        raise ValueError(f"propagation: expected one of {', '.join(PROPAGATIONS)}, found {propagation!r}")
    if drawn_slice is None:
        drawn = (first + last) / 2
    else:
        drawn = as_numbers(drawn_slice, "drawn_slice")
        if drawn.shape != first.shape or not ((first <= drawn) & (drawn <= last) & (drawn % 1 == 0)).all():
            raise ValueError(f"drawn_slice: expected a slice within each of {len(boxes)} boxes, found {drawn.tolist()}")
    found = Composition(volume.shape[:3], len(boxes), overlap, separate)
    watch = partial(watched, progress=progress, should_stop=should_stop)
    if propagation == "published":
        propagate(found, model, volume, boxes, drawn, watch)
    else:
        segment_sections(found, model, volume, boxes, drawn, watch)
    return found if details else found.labels


def watched(visits, total: int, progress, should_stop):
    """Give the visits of slices one by one, and ask and tell the caller of `segment_volume` before and after each."""
    for done, visit in enumerate(visits):
        if should_stop is not None and should_stop():
            raise Stopped(f"stopped after {done} of {total} slices")
        yield visit
        if progress is not None:
            progress(done + 1, total)


def segment_sections(found: Composition, model, volume, boxes, drawn, watch) -> None:
    """Segment every slice on its own, from the prompts of `section_boxes`, and clip its masks to the given boxes.

    No slice depends on another, so nothing drifts, a slice where the network sees nothing stays empty, and several are
    done side by side.
    """
    todo, flat = visits(len(volume), boxes[:, 2], boxes[:, 5]), boxes[:, [0, 1, 3, 4]]
    slices = [(model, volume[z], section_boxes(boxes[objects], z, drawn[objects])) for z, objects in todo]
    decoded = zip(todo, ahead(logits_of_boxes, slices, workers_on(next(model.parameters()).device)))
    for (z, objects), (_, logits) in watch(decoded, len(todo)):
        compose(found, objects, logits.result(), flat[objects], model.image_size, z)


def visits(depth: int, first: ndarray, last: ndarray) -> list[tuple[int, ndarray]]:
    """List the slices that any of the objects reach, from `first` to `last`, each with the numbers of these objects."""
    found = [(z, np.flatnonzero((first <= z) & (z <= last))) for z in range(depth)]
    return [visit for visit in found if len(visit[1])]


def section_boxes(boxes: ndarray, z: int, drawn_slice: ndarray | None = None) -> ndarray:
    """Make the prompts (N, 4) x0 y0 x1 y1 on slice z of boxes (N, 6) that reach it, float64 in pixels of the volume.

    A person's box bounds the object in every slice, and an object narrows towards its ends. So each is midway between
    the given box and the section at z of the ellipsoid inscribed in it: two halves of different height where
    `drawn_slice`, the slice of the largest section, is not the middle one.
    """
    first, last = boxes[:, 2], boxes[:, 5]
    largest = (first + last) / 2 if drawn_slice is None else drawn_slice
    reach = np.where(z > largest, last - largest, largest - first) + 0.5     # to the outer face of the end slice
    scale = (1 + np.sqrt(np.clip(1 - ((z - largest) / reach) ** 2, 0, 1))) / 2
    middle, half = (boxes[:, :2] + boxes[:, 3:5]) / 2, scale[:, None] * (boxes[:, 3:5] - boxes[:, :2]) / 2
    return np.hstack([middle - half, middle + half])


def propagate(found: Composition, model, volume, boxes, drawn, watch) -> None:
    """Segment by the published propagation (LiteMedSAM's and MedficientSAM's scripts).

    The middle slice (z0 + z1) // 2 is prompted with the box; every further slice, up to z1 and down to z0, with the
    box of its neighbour's mask. Where masks overlap, the later box wins. All boxes that wait for a slice are decoded
    as one batch on one embedding; those of slices that are met on both ways are kept, KEPT of them.
    """
    frame = (*volume.shape[1:3], model.image_size)
    first, middle, last = boxes[:, 2], np.floor(drawn), boxes[:, 5]
    defaults = boxes_to_network(boxes[:, [0, 1, 3, 4]], *frame)               # (N, 4)
    upward, downward = defaults.clone(), defaults.clone()     # each object's prompt for its next slice
    up, down = visits(len(volume), middle, last), visits(len(volume), first, middle - 1)[::-1]
    twice = {z for z, _ in up} & {z for z, _ in down}
    # The way down starts at the top, so the embeddings used last, which stay when memory is short, are needed first.
    kept = lru_cache(KEPT)(lambda z: encode(model, volume[z]))
    ways = [(*visit, upward) for visit in up] + [(*visit, downward) for visit in down]

    for z, objects, prompts in watch(ways, len(ways)):
        embedding = kept(z) if z in twice else encode(model, volume[z])
        logits = decode_boxes(model, embedding, prompts[objects])             # (n, 256, 256)
        for k, mask in zip(objects, logits_to_mask(logits, *frame)):
            found.claim(k, (z,), mask, mask & (found.labels[z] <= k))        # a later box has the higher label
            prompts[k] = next_prompt(model, mask, defaults[k])
            if z == middle[k]:
                downward[k] = prompts[k]


def next_prompt(model, mask: ndarray, default: Tensor) -> Tensor:
    """Return the neighbour slice's prompt (4,) in network pixels: the box of this mask (H, W), `default` if empty."""
    box = box_of_mask(mask)
    if box is None:
        return default
    prompt = boxes_to_network(box, *mask.shape, model.image_size)
    if model.name == "lite_medsam":
        height, width = scaled_size(*mask.shape, model.image_size)
        prompt += LITE_MEDSAM_LOOSENED * torch.tensor([-1, -1, 1, 1])
        prompt = prompt.clamp(torch.zeros(4), torch.tensor([width, height, width, height]))
    return prompt
