"""Which object keeps a pixel that several masks claim: N masks, given as logits, become one picture of labels.

Images, the slices of volumes and the mouse window all compose here. Full-size logits exist for one object at a time,
and only where its mask is; the rest stays at 256×256. README.md beside this file compares the rules.
"""
import numpy as np
from torch import Tensor

from .geometry import Region, enlarged_logits, reached_region

OVERLAPS = ("inside", "higher", "later")
INSIDE = 0.8                         # the share of an object that makes it lie inside another


def label_dtype(count: int) -> type:
    """Return the type that holds that many labels: uint8 for up to 255, else uint16."""
    return np.uint8 if count <= 255 else np.uint16


class Composition:
    """The labels of N objects on an image or a volume, and what became of each object's own mask.

    Attributes:
        labels: (H, W) or (D, H, W) uint8, uint16 above 255 objects: k + 1 where object k is, 0 where none is.
        mask_sizes: int (N,), the pixels of each object's own mask.
        bits: None unless the masks are kept `separate`; else uint8 (ceil(N / 8), *labels.shape), where bit k % 8 of
            bits[k // 8] is object k's own mask. To read it: `np.unpackbits(bits, axis=0, count=N, bitorder="little")`.
    """

    def __init__(self, shape: tuple[int, ...], count: int, separate: bool = False):
        self.labels = np.zeros(shape, label_dtype(count))
        self.mask_sizes = np.zeros(count, int)
        self.bits = np.zeros((-(-count // 8), *shape), np.uint8) if separate else None

    def claim(self, k: int, place: tuple, mask: np.ndarray, wins: np.ndarray) -> None:
        """Give the pixels of `wins` to object k, whose whole mask at that place of the labels is `mask`."""
        self.labels[place][wins] = k + 1
        self.mask_sizes[k] += np.count_nonzero(mask)
        if self.bits is not None:
            self.bits[(k // 8, *place)] |= mask.astype(np.uint8) << k % 8

    def kept_sizes(self) -> np.ndarray:
        """Count the pixels that each object kept: int (N,)."""
        count = len(self.mask_sizes)
        return sum(np.bincount(part.ravel(), minlength=count + 1) for part in self.labels)[1:]

    def masks(self) -> np.ndarray:
        """Return each object's own mask, bool (N, H, W) or (N, D, H, W), where they were kept separate."""
        return np.unpackbits(self.bits, axis=0, count=len(self.mask_sizes), bitorder="little").view(bool)


def lost_objects(found: Composition) -> list[str]:
    """Name, in a line each, the objects without a pixel and those that lost more than half of their mask to others."""
    lines = []
    for label, (own, kept) in enumerate(zip(found.mask_sizes, found.kept_sizes()), 1):
        if own == 0:
            lines.append(f"label {label}: nothing found")
        elif kept == 0:
            lines.append(f"label {label}: all {own} pixels of its mask went to other objects")
        elif kept < own / 2:
            lines.append(f"label {label}: {own - kept} of the {own} pixels of its mask went to other objects")
    return lines


def compose(found: Composition, objects: np.ndarray, logits: Tensor, boxes: np.ndarray, size: int,
            overlap: str = OVERLAPS[0], z: int | None = None) -> None:
    """Share out the pixels of one picture, an image or slice z of a volume, among n of the N objects.

    The objects are laid down from the largest mask to the smallest (equal ones: in the order of their boxes'
    coordinates) and take the pixels that are free. Of those that already belong to another object they take,

    - overlap "inside": all from an object inside which they lie, none from one that lies inside them, and from others
      where their logit is higher. One object lies inside another if its mask is the smaller one and at least 80 % of
      its mask and of its box lie in the other's.
    - "higher": those where their logit is higher.
    - "later": those of objects with a lower label, as the authors of MedficientSAM have it.

    The labels are therefore the same in whatever order the boxes come, but for "later". Equal boxes have equal
    logits: the first of them keeps all.

    Args:
        found: takes up the labels.
        objects: int (n,), the numbers of the objects, from 0 and ascending.
        logits: (n, 256, 256), above 0 inside.
        boxes: (n, 4) x0 y0 x1 y1 in pixels. With z, the masks are clipped to them.
        size: the side of the network's input.
    """
    height, width = found.labels.shape[-2:]
    place = () if z is None else (z,)
    labels = found.labels[place]                                 # (H, W), a view
    regions = [reached_region(one, height, width, size) if z is None else _whole_pixels(box)
               for one, box in zip(logits, boxes)]
    sizes = np.zeros(len(objects), int)                          # of the masks that have been laid down
    highest = np.zeros((height, width), np.float32)              # the logit of the object that has each pixel
    areas = (logits > 0).sum((1, 2)).numpy()
    for i in np.lexsort((*boxes.T[::-1], -areas)):
        values = enlarged_logits(logits[i], height, width, size, regions[i])
        mask, owners = values > 0, labels[regions[i]]
        sizes[i] = np.count_nonzero(mask)
        wins = mask & (owners <= objects[i]) if overlap == "later" else values > highest[regions[i]]
        if overlap == "inside":
            for label in np.unique(owners[mask & (owners > 0)]):
                j = np.searchsorted(objects, label - 1)
                upper = _upper(i, j, sizes, boxes, logits, regions, (height, width, size))
                wins[mask & (owners == label)] |= upper == i
                wins[owners == label] &= upper != j
        found.claim(objects[i], (*place, *regions[i]), mask, wins)
        highest[regions[i]][wins] = values[wins]


def _upper(i: int, j: int, sizes, boxes, logits: Tensor, regions: list[Region], frame) -> int | None:
    """Return which of two objects lies inside the other, None where neither does."""
    inner, outer = (i, j) if sizes[i] < sizes[j] else (j, i)
    corners = np.stack([boxes[inner], boxes[outer]])
    low, high = corners[:, :2].max(0), corners[:, 2:].min(0)
    in_box = np.prod((high - low + 1).clip(0)) / np.prod(corners[0, 2:] - corners[0, :2] + 1)
    if sizes[i] == sizes[j] or in_box < INSIDE:
        return None
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(regions[i], regions[j]))
    shared = np.logical_and(*(enlarged_logits(logits[k], *frame, both) > 0 for k in (i, j)))
    return inner if np.count_nonzero(shared) >= INSIDE * sizes[inner] else None


def _whole_pixels(box: np.ndarray) -> Region:
    """Return the rows and columns that a box x0 y0 x1 y1 reaches, as slices."""
    x0, y0, x1, y1 = (*np.floor(box[:2]).astype(int), *np.ceil(box[2:]).astype(int))
    return slice(y0, y1 + 1), slice(x0, x1 + 1)
