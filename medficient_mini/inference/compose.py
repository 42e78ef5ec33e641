"""Which object keeps a pixel that several masks claim: N masks, given as logits, become one picture of labels.

Full-size logits exist for one object at a time, and only where its mask is. README.md beside this file compares the
rules; the published propagation (volume.py) has its own.
"""
import numpy as np
from numpy import ndarray
from torch import Tensor

from .geometry import enlarged_logits, reached_region

OVERLAPS = ("inside", "higher", "later")
INSIDE = 0.8                         # see `lies_inside`


class Composition:
    """The labels of N objects on an image or a volume, and what became of each object's own mask.

    `overlap`, one of OVERLAPS (else ValueError), says who keeps a pixel that several claim: see `compose`.
    `labels` are (H, W) or (D, H, W) uint8, uint16 above 255 objects: k + 1 where object k is, 0 where none is.
    `mask_sizes`, int (N,), counts the pixels of each object's own mask. Where these are kept `separate`, bit k % 8 of
    bits[k // 8], uint8 (ceil(N / 8), *labels.shape), is object k's mask.
    """

    def __init__(self, shape: tuple[int, ...], count: int, overlap: str = OVERLAPS[0], separate: bool = False):
        if overlap not in OVERLAPS:
            raise ValueError(f"overlap: expected one of {', '.join(OVERLAPS)}, found {overlap!r}")
        self.overlap = overlap
        self.labels = np.zeros(shape, np.min_scalar_type(count))
        self.mask_sizes = np.zeros(count, int)
        self.bits = np.zeros((-(-count // 8), *shape), np.uint8) if separate else None

    def claim(self, k: int, place: tuple, mask: ndarray, wins: ndarray) -> None:
        """Give the pixels of `wins` to object k, whose whole mask at that place of the labels is `mask`."""
        self.labels[place][wins] = k + 1
        self.mask_sizes[k] += np.count_nonzero(mask)
        if self.bits is not None:
            self.bits[(k // 8, *place)] |= mask * np.uint8(1 << k % 8)

    def kept_sizes(self) -> ndarray:
        """Count the pixels that each object kept: int (N,)."""
        count = len(self.mask_sizes)
        return sum(np.bincount(part.ravel(), minlength=count + 1) for part in self.labels)[1:]

    def masks(self) -> ndarray:
        """Return each object's own mask, bool (N, H, W) or (N, D, H, W), where they were kept separate."""
        return np.unpackbits(self.bits, axis=0, count=len(self.mask_sizes), bitorder="little").view(bool)


def lost_objects(found: Composition) -> list[str]:
    """Name, in a line each, the objects that were not found and those that lost more than half of their mask."""
    lines = []
    for label, (own, kept) in enumerate(zip(found.mask_sizes, found.kept_sizes()), 1):
        if own == 0:
            lines.append(f"label {label}: nothing found")
        elif kept < own / 2:
            lines.append(f"label {label}: {own - kept} of the {own} pixels of its mask went to other objects")
    return lines


def compose(found: Composition, objects: ndarray, logits: Tensor, boxes: ndarray, size: int,
            z: int | None = None) -> None:
    """Share out the pixels of one picture, an image or slice z of a volume, among n of the N objects of `found`.

    `objects` are their numbers, int (n,), from 0 and ascending; logits (n, 256, 256) on the CPU are above 0 inside;
    boxes (n, 4) x0 y0 x1 y1, in pixels, clip the masks of a slice. `size` is the side of the network's input.

    Objects are laid down from the largest mask to the smallest, equally large ones by their boxes' coordinates. Each
    takes the free pixels, and of those of another: with overlap "inside" all of an object inside which it lies
    (`lies_inside`), else where its logit is higher; with "higher" the latter alone; with "later", as the authors of
    MedficientSAM have it, those of lower labels. So the labels are the same in whatever order the boxes come, but for
    "later"; of equal boxes the first keeps all.
    """
    place = () if z is None else (z,)
    labels = found.labels[place]                                 # (H, W), a view
    frame = (*labels.shape, size)
    highest = np.zeros(labels.shape, np.float32)                 # the logit of the object that has each pixel
    inside = logits.numpy() > 0
    areas = inside.sum((1, 2))
    for i in np.lexsort((*boxes.T[::-1], -areas)):
        if z is None:
            region = reached_region(logits[i], *frame)
        else:
            low, high = np.floor(boxes[i, 1::-1]).astype(int), np.ceil(boxes[i, :1:-1]).astype(int) + 1
            region = tuple(map(slice, low, high))
        values = enlarged_logits(logits[i], *frame, region)
        mask, owners = values > 0, labels[region]
        wins = mask & (owners <= objects[i]) if found.overlap == "later" else values > highest[region]
        if found.overlap == "inside":
            for label in np.unique(owners[mask & (owners > 0)]):
                if lies_inside(i, np.searchsorted(objects, label - 1), inside, areas, boxes):
                    wins |= mask & (owners == label)
        found.claim(objects[i], (*place, *region), mask, wins)
        highest[region][wins] = values[wins]


def lies_inside(i: int, j: int, inside: ndarray, areas: ndarray, boxes: ndarray) -> bool:
    """Tell whether object i lies inside object j: most of its mask, at 256×256, and of its box, and it is smaller."""
    # A poor mask may lie anywhere, so the boxes are asked as well; two masks of one thing, as large, are no nest.
    low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
    shared_box = np.prod((high - low + 1).clip(0))
    return bool(shared_box >= INSIDE * np.prod(boxes[i, 2:] - boxes[i, :2] + 1)
                and areas[i] <= INSIDE * areas[j]
                and np.count_nonzero(inside[i] & inside[j]) >= INSIDE * areas[i])
