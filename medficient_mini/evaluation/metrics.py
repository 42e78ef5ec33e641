"""DSC and NSD as the challenge computes them: arrays in, floats out, with NumPy and SciPy only.

NSD at a tolerance is the share of both surfaces' area that has a surfel of the other surface within the tolerance. In
2D the challenge gives a mask a third axis of one voxel and spacing 1, 1, 1. Every pixel of the mask then is surface,
which flatters NSD; `contour_nsd` is the NSD of the contour itself.
"""
import numpy as np

from .surfels import CONTOUR_LENGTHS, surfel_areas, surfel_codes

LOWEST_DSC = 0.2                     # At or below this mean DSC the challenge's script takes NSD as 0.


def dsc(gt: np.ndarray, seg: np.ndarray) -> float:
    """Return the Dice coefficient of masks (H, W) or (D, H, W), 0 … 1, NaN if both are empty. ValueError as `nsd`."""
    gt, seg = as_masks(gt, seg)
    total = np.count_nonzero(gt) + np.count_nonzero(seg)
    return 2 * np.count_nonzero(gt & seg) / total if total else float("nan")


def nsd(gt: np.ndarray, seg: np.ndarray, spacing_mm=None, tolerance_mm: float = 2.0) -> float:
    """Return the normalised surface distance of two masks, 0 … 1; NaN if both are empty.

    gt, seg: (D, H, W) with three `spacing_mm` in the order of the axes, or (H, W), scored as the challenge does (see
    above) whatever the spacing. `tolerance_mm`, pixels in 2D, is the distance that still counts as near. ValueError for
    shapes that differ, or a spacing that is not three positive numbers.
    """
    gt, seg = as_masks(gt, seg)
    if gt.ndim == 2:
        gt, seg, spacing_mm = gt[None], seg[None], (1, 1, 1)                   # with these any axis may be the third
    mm = np.array(spacing_mm, float)
    if mm.shape != (3,) or not ((mm > 0) & (mm < np.inf)).all():
        found = "none" if spacing_mm is None else np.ravel(spacing_mm)[:9].tolist()
        raise ValueError(f"spacing: expected 3 positive numbers in mm, found {found}")
    return near_share(gt, seg, mm, tolerance_mm, surfel_areas(mm))


def contour_nsd(gt: np.ndarray, seg: np.ndarray, tolerance: float = 2.0) -> float:
    """Return the NSD of the contours of two (H, W) masks, weighted by length, in pixels; otherwise as `nsd`."""
    return near_share(*as_masks(gt, seg), 1.0, tolerance, CONTOUR_LENGTHS)


def case_scores(gts: np.ndarray, segs: np.ndarray, spacing_mm=None, tolerance_mm: float = 2.0,
                contour: bool = False) -> dict:
    """Score one case: {"labels": n, "dsc": mean, "nsd": mean}, with `contour` also "nsd_contour" (in 3D NSD itself).

    gts, segs: uint8 or uint16 labels of one shape; the rest is as in `nsd`. By the challenge's conventions the means
    are over the n labels of the ground truth, None where it has none, and NSD is 0 where the mean DSC is at most
    LOWEST_DSC.
    """
    from scipy.ndimage import find_objects
    scores = []
    for label, (box, other) in enumerate(zip(find_objects(gts), find_objects(segs, gts.max())), 1):
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
    """Return two bool masks of one shape with two or three axes; ValueError for others."""
    gt, seg = np.asarray(gt, bool), np.asarray(seg, bool)
    if gt.shape != seg.shape or gt.ndim not in (2, 3):
        raise ValueError(f"expected two masks of one shape with 2 or 3 axes, found {gt.shape} and {seg.shape}")
    return gt, seg


def near_share(gt, seg, spacing_mm, tolerance_mm, sizes):
    """Return the NSD of two bool masks with two or three axes; `sizes` holds the size of the surfel of each code."""
    from scipy.ndimage import binary_erosion
    from scipy.spatial import cKDTree
    gt_sizes, seg_sizes = [sizes[surfel_codes(mask.view(np.uint8))] for mask in (gt, seg)]    # of each grid corner
    near, total = 0.0, 0.0
    for own, other in ((gt_sizes, seg_sizes), (seg_sizes, gt_sizes)):
        present, there = own > 0, other > 0
        close = there[present]                                                 # shared surfels are at distance 0
        corners = np.argwhere(present & ~there)
        targets = np.argwhere(there & ~binary_erosion(there, border_value=1))  # the nearest one has a free neighbour
        tree = cKDTree(targets * spacing_mm)
        distances, nearest = tree.query(corners * spacing_mm, distance_upper_bound=tolerance_mm + 1e-6)
        found = np.isfinite(distances)
        # Whole steps first, then mm, as the challenge's distance transform rounds.
        steps_mm = (corners[found] - targets[nearest[found]]) * spacing_mm
        found[found] = np.sqrt((steps_mm ** 2).sum(1)) <= tolerance_mm
        close[~close] = found
        near += own[present][close].sum()
        total += own[present].sum()
    return float(near / total) if total else float("nan")
