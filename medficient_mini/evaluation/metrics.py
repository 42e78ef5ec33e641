"""DSC and NSD as the challenge computes them: arrays in, floats out, with NumPy and scipy.ndimage only.

NSD at a tolerance is the area of both surfaces that has a surfel of the other surface within the tolerance, divided by
the area of both. The tolerance is small beside the volume, so no distance transform is made: surfels that both masks
share are at distance 0, and for the others the few grid columns within the tolerance are searched, each with one
`searchsorted` over all surfels that are still alone.

In 2D the challenge gives a mask a third axis of one voxel and spacing 1, 1, 1. Every pixel of the mask then is
surface, which flatters NSD; `contour_nsd` is the NSD of the contour itself.
"""
import itertools

import numpy as np

from .surfels import CONTOUR_LENGTHS, surfel_areas, surfel_codes

LOWEST_DSC = 0.2                     # At or below this mean DSC the challenge's script takes NSD as 0.


def dsc(gt: np.ndarray, seg: np.ndarray) -> float:
    """Return the Dice similarity coefficient of two masks, 2 |gt and seg| / (|gt| + |seg|), 0 … 1.

    gt, seg: (H, W) or (D, H, W), nonzero inside. NaN if both are empty, ValueError for shapes that differ.
    """
    gt, seg = as_masks(gt, seg)
    total = np.count_nonzero(gt) + np.count_nonzero(seg)
    return 2 * np.count_nonzero(gt & seg) / total if total else float("nan")


def nsd(gt: np.ndarray, seg: np.ndarray, spacing_mm=None, tolerance_mm: float = 2.0) -> float:
    """Return the normalised surface distance of two masks, 0 … 1; NaN if both are empty.

    Args:
        gt, seg: (D, H, W), or (H, W), which are scored as the challenge does (see above) whatever the spacing.
        spacing_mm: three numbers in the order of the axes; only for volumes.
        tolerance_mm: distance that still counts as near, inclusive; pixels in 2D.

    Raises:
        ValueError: the shapes differ or the spacing is not three positive numbers.
    """
    gt, seg = as_masks(gt, seg)
    if gt.ndim == 2:
        # With equal spacings the third axis may as well come first; then the last one is long, which is faster.
        gt, seg, spacing_mm = gt[None], seg[None], (1, 1, 1)
    mm = np.array(spacing_mm, float)
    if mm.shape != (3,) or not ((mm > 0) & (mm < np.inf)).all():
        found = "none" if spacing_mm is None else np.ravel(spacing_mm)[:9].tolist()
        raise ValueError(f"spacing: expected 3 positive numbers in mm, found {found}")
    return near_share(gt, seg, mm, tolerance_mm, surfel_areas(mm))


def contour_nsd(gt: np.ndarray, seg: np.ndarray, tolerance: float = 2.0) -> float:
    """Return the NSD of the contours of two (H, W) masks, weighted by length, in pixels; otherwise as `nsd`."""
    return near_share(*as_masks(gt, seg), np.ones(2), tolerance, CONTOUR_LENGTHS)


def case_scores(gts: np.ndarray, segs: np.ndarray, spacing_mm=None, tolerance_mm: float = 2.0,
                contour: bool = False) -> dict:
    """Score one case: {"labels": n, "dsc": mean, "nsd": mean}, with `contour` also "nsd_contour".

    The means are over the n labels of the ground truth; the scores are None where it has none. NSD is 0 where the
    mean DSC is at most LOWEST_DSC (both conventions of the challenge). "nsd_contour" is NSD itself in 3D.

    Args:
        gts, segs: uint8 or uint16 labels of one shape, (H, W) or (D, H, W).
        spacing_mm, tolerance_mm: as in `nsd`, with its errors.
    """
    from scipy import ndimage
    scores = []
    boxes = zip(ndimage.find_objects(gts), ndimage.find_objects(segs, gts.max()))
    for label, (box, other) in enumerate(boxes, 1):
        if box is not None:
            union = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, other or box))
            gt, seg = gts[union] == label, segs[union] == label
            scores.append([dsc(gt, seg), nsd(gt, seg, spacing_mm, tolerance_mm)])
            if contour:
                scores[-1].append(contour_nsd(gt, seg, tolerance_mm) if gt.ndim == 2 else scores[-1][1])
    keys = ["dsc", "nsd", "nsd_contour"][:2 + contour]
    if not scores:
        return {"labels": 0} | dict.fromkeys(keys)
    means = np.mean(scores, 0)
    means[1:] *= means[0] > LOWEST_DSC
    return {"labels": len(scores)} | dict(zip(keys, means.tolist()))


def as_masks(gt, seg):
    """Two bool masks of one shape with two or three axes; ValueError for others."""
    gt, seg = np.asarray(gt, bool), np.asarray(seg, bool)
    if gt.shape != seg.shape or gt.ndim not in (2, 3):
        raise ValueError(f"expected two masks of one shape with 2 or 3 axes, found {gt.shape} and {seg.shape}")
    return gt, seg


def near_share(gt, seg, spacing_mm, tolerance_mm, sizes):
    """The NSD of two bool masks with two or three axes; `sizes` holds the size of the surfel of each code."""
    from scipy import ndimage
    used = ndimage.find_objects((gt | seg).view(np.uint8))
    if not used:
        return float("nan")
    gt, seg = gt[used[0]], seg[used[0]]
    full = len(sizes) - 1
    codes = surfel_codes(gt | seg.astype(np.uint16) << 8)                      # (D + 1, H + 1, W + 1)
    places = np.flatnonzero((codes != 0) & (codes != (full << 8 | full)))
    columns, shape = columns_within(tolerance_mm, spacing_mm, codes.shape)
    positions = np.ravel_multi_index(np.unravel_index(places, codes.shape), shape)         # increasing, as `places`
    codes = codes.ravel()[places]
    gt_sizes, seg_sizes = sizes[codes & 255], sizes[codes >> 8]                # 0 where a mask has no surfel
    near, total = 0.0, 0.0
    for size, other in ((gt_sizes, seg_sizes), (seg_sizes, gt_sizes)):
        close = other > 0
        alone = ~close & (size > 0)
        close[alone] = any_within(columns, positions[alone], positions[other > 0])
        near += size[close].sum()
        total += size.sum()
    return float(near / total)


def columns_within(tolerance_mm, spacing_mm, shape):
    """The grid columns along the last axis that hold a corner within the tolerance of a given one.

    Returns:
        Integers (C, 2), the longest columns first: a column spans half of its length to both sides of the flat
        position that lies a shift away, and these are shift and half. And the shape in which flat positions count,
        larger than `shape`, so that what lies across an edge is not taken for another row.
    """
    limits = [min(int(tolerance_mm / mm + 1e-6), n - 1) for mm, n in zip(spacing_mm, shape)]
    padded = tuple(n + limit for n, limit in zip(shape, limits))
    offsets = np.array(list(itertools.product(*[range(-limit, limit + 1) for limit in limits[:-1]])))
    *across_mm, along_mm = spacing_mm
    squares = ((offsets * across_mm) ** 2).sum(1)[:, None] + (np.arange(limits[-1] + 1) * along_mm) ** 2
    halves = (np.sqrt(squares) <= tolerance_mm).sum(1) - 1                      # rounded as the distance transform does
    columns = np.stack([offsets @ np.cumprod(padded[:0:-1])[::-1], halves], 1)[halves >= 0]
    return columns[np.argsort(-columns[:, 1])], padded


def any_within(columns, queries, targets):
    """bool per query: is a target in one of its columns? Queries and targets are increasing flat positions."""
    hit = np.zeros(len(queries), bool)
    alone = np.arange(len(queries))
    targets = np.append(targets, np.iinfo(np.int64).max)
    for shift, half in columns:
        if not len(alone):
            break
        begin = queries[alone] + (shift - half)
        found = targets[np.searchsorted(targets, begin)] <= begin + 2 * half
        hit[alone[found]] = True
        alone = alone[~found]
    return hit
