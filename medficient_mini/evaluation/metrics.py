"""DSC and NSD as the challenge computes them. NumPy and scipy.ndimage only; arrays in, floats out.

Surface elements (Nikolov et al., arXiv 1809.04430): one may sit on every corner of the voxel grid. Its 2 x 2 x 2
neighbourhood, eight bits, says which part of the surface passes there; its weight is the area of the marching-cubes
triangles of that neighbourhood (`element_sizes`), its place the corner itself. NSD at a tolerance is the area of both
surfaces that has an element of the other surface within the tolerance, divided by the area of both.

The tolerance is small beside the volume, so no distance transform is made: elements that both masks share are at
distance 0, and for the others the few grid columns within reach are searched, each with one `searchsorted` over all
elements that are still open.

2D: the challenge gives a mask a third axis of one voxel and spacing 1, 1, 1. Every pixel of the mask then is surface,
which flatters NSD; `contour_nsd` is the NSD of the contour itself, with elements on the corners of the pixel grid
weighted by length.
"""
import itertools
from functools import lru_cache

import numpy as np
from scipy import ndimage

LOWEST_DSC = 0.2                     # the challenge's script does not compute NSD at or below this mean DSC: it is 0


# ------------------------------------------------------------------------------------------------------- scores

def dsc(gt: np.ndarray, seg: np.ndarray) -> float:
    """Dice similarity coefficient 2 |gt and seg| / (|gt| + |seg|) of two masks of one shape, 0 … 1; NaN if both empty."""
    gt, seg = masks_of(gt, seg)
    total = np.count_nonzero(gt) + np.count_nonzero(seg)
    return 2 * np.count_nonzero(gt & seg) / total if total else float("nan")


def nsd(gt: np.ndarray, seg: np.ndarray, spacing=None, tolerance: float = 2.0) -> float:
    """Normalised surface distance of two masks, 0 … 1; NaN if both are empty.

    gt, seg: (D, H, W) with spacing (3,) in mm in the order of the axes, or (H, W), scored as the challenge does
    (module docstring) whatever the spacing. tolerance: mm (pixels in 2D), inclusive. ValueError for other shapes or a
    spacing that is not three positive numbers.
    """
    gt, seg = masks_of(gt, seg)
    if gt.ndim == 2:
        # With equal spacings the third axis may as well come first; then the last one is long, which is faster.
        gt, seg, spacing = gt[None], seg[None], (1.0, 1.0, 1.0)
    return boundary_overlap(gt, seg, spacing, tolerance)


def contour_nsd(gt: np.ndarray, seg: np.ndarray, spacing=(1.0, 1.0), tolerance: float = 2.0) -> float:
    """NSD of the contours of two (H, W) masks, weighted by length, 0 … 1; NaN if both are empty. ValueError as `nsd`."""
    gt, seg = masks_of(gt, seg)
    if gt.ndim != 2:
        raise ValueError(f"expected 2D masks, found {gt.ndim} axes")
    return boundary_overlap(gt, seg, spacing, tolerance)


def case_scores(gts: np.ndarray, segs: np.ndarray, spacing=None, tolerance: float = 2.0, contour: bool = False) -> dict:
    """Scores of one case: {"labels": n, "dsc": mean, "nsd": mean}, with `contour` also "nsd_contour".

    gts, segs: integer labels of one shape, (H, W) or (D, H, W); spacing: (3,) mm for 3D. Scored are the n labels of
    the ground truth; all scores are None where it has none. NSD is 0 where the mean DSC is at most LOWEST_DSC
    (both conventions of the challenge). "nsd_contour" is NSD itself in 3D. ValueError for shapes that differ, labels
    that are no integers >= 0, and missing or bad spacing in 3D.
    """
    gts, segs = checked_labels("gts", gts), checked_labels("segs", segs)
    if gts.shape != segs.shape:
        raise ValueError(f"segs: expected the shape of gts, {gts.shape}, found {segs.shape}")
    if gts.ndim == 3:
        spacing = checked_spacing(spacing, 3)
    crops = list(crop_labels(gts, segs))
    scores = {"labels": len(crops), "dsc": None, "nsd": None} | ({"nsd_contour": None} if contour else {})
    if crops:
        scores["dsc"] = float(np.mean([dsc(*masks()) for masks in crops]))
        good = scores["dsc"] > LOWEST_DSC
        scores["nsd"] = float(np.mean([nsd(*masks(), spacing, tolerance) for masks in crops])) if good else 0.0
        if contour and (gts.ndim == 3 or not good):
            scores["nsd_contour"] = scores["nsd"]
        elif contour:
            scores["nsd_contour"] = float(np.mean([contour_nsd(*masks(), tolerance=tolerance) for masks in crops]))
    return scores


def crop_labels(gts, segs):
    """For each label of the ground truth a function giving (gt, seg), its masks cropped to their union's box."""
    boxes, others = ndimage.find_objects(gts), ndimage.find_objects(segs)
    for label, (box, other) in enumerate(itertools.zip_longest(boxes, others), 1):
        if box is not None:
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, other or box))
            yield lambda label=label, box=box: (gts[box] == label, segs[box] == label)


def masks_of(gt, seg):
    gt, seg = np.asarray(gt, bool), np.asarray(seg, bool)
    if gt.shape != seg.shape or gt.ndim not in (2, 3):
        raise ValueError(f"expected two masks of one shape with 2 or 3 axes, found {gt.shape} and {seg.shape}")
    return gt, seg


def checked_labels(name, labels):
    """uint8 or uint16 labels; ValueError for anything but integers 0 … 65535 with two or three axes."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biu" or labels.ndim not in (2, 3):
        raise ValueError(f"{name}: expected integer labels with 2 or 3 axes, found {labels.dtype} {labels.shape}")
    low, high = labels.min(initial=0), labels.max(initial=0)
    if low < 0 or high > 65535:
        raise ValueError(f"{name}: expected labels 0 to 65535, found {low} to {high}")
    return labels.astype(np.uint8 if high < 256 else np.uint16, copy=False)


def checked_spacing(spacing, axes):
    """Tuple of `axes` floats; ValueError unless they are positive and finite."""
    try:
        found = tuple(float(s) for s in spacing)
    except TypeError:
        found = ()
    if len(found) != axes or not all(0 < s < np.inf for s in found):
        raise ValueError(f"spacing: expected {axes} positive numbers in mm, found {spacing}")
    return found


# --------------------------------------------------------------------------------------------- surfaces and distances

def boundary_overlap(gt, seg, spacing, tolerance):
    """NSD of two bool masks with two or three axes."""
    spacing = checked_spacing(spacing, gt.ndim)
    gt, seg = crop(gt, seg)
    codes = neighbourhoods(gt, seg)                                            # (D + 1, H + 1, W + 1), both masks
    sizes = element_sizes(spacing)
    full = len(sizes) - 1
    places = np.flatnonzero((codes != 0) & (codes != (full << 8 | full)))
    found, shape = codes.ravel()[places], codes.shape
    del codes
    gt_codes, seg_codes = found & 255, found >> 8
    on_gt, on_seg = (gt_codes != 0) & (gt_codes != full), (seg_codes != 0) & (seg_codes != full)
    columns, stretched = reach(shape, spacing, tolerance)
    positions = np.ravel_multi_index(np.unravel_index(places, shape), stretched)   # increasing, as `places`
    near, total = 0.0, 0.0
    for codes, on, other in ((gt_codes, on_gt, on_seg), (seg_codes, on_seg, on_gt)):
        areas = sizes[codes[on]]
        close = other[on]
        alone = np.flatnonzero(~close)
        close[alone] = within_reach(positions[on][alone], positions[other], columns)
        total += areas.sum()
        near += areas[close].sum()
    return float(near / total) if total else float("nan")


def crop(gt, seg):
    """Both masks cropped to the box of their union."""
    either = gt | seg
    for axis in range(either.ndim):
        used = np.flatnonzero(either.any(tuple(a for a in range(either.ndim) if a != axis)))
        span = slice(used[0], used[-1] + 1) if len(used) else slice(0, 0)
        index = (slice(None),) * axis + (span,)
        either, gt, seg = either[index], gt[index], seg[index]
    return gt, seg


def neighbourhoods(gt, seg):
    """uint16, one longer per axis: neighbourhood of each grid corner, that of `gt` in the low byte, of `seg` in the high.

    The voxel before the corner on every axis gives the highest of the 2 ** axes bits, the one after it the lowest.
    """
    codes = np.zeros([n + 2 for n in gt.shape], np.uint16)
    codes[(slice(1, -1),) * gt.ndim] = gt.astype(np.uint16) | seg.astype(np.uint16) << 8
    for axis in range(gt.ndim):
        before = codes[(slice(None),) * axis + (slice(None, -1),)]
        after = codes[(slice(None),) * axis + (slice(1, None),)]
        codes = before << 2 ** (gt.ndim - 1 - axis) | after
    return codes


def reach(shape, spacing, tolerance):
    """The grid columns along the last axis that hold a point within `tolerance` of a corner.

    Returns a list of (shift, half): the column begins `shift - half` and ends `shift + half` flat positions away, the
    nearest columns first; and the shape the flat positions count in, longer than `shape` so that nothing reached
    across an edge is another row's.
    """
    limits = [min(int(tolerance / s + 1e-6), n - 1) for s, n in zip(spacing, shape)]
    stretched = tuple(n + limit for n, limit in zip(shape, limits))
    steps = np.meshgrid(*[np.arange(limit + 1) * s for limit, s in zip(limits, spacing)], indexing="ij", sparse=True)
    inside = np.sqrt(sum(step * step for step in steps)) <= tolerance           # summed as the distance transform does
    halves = inside.sum(-1) - 1
    columns = []
    for column in itertools.product(*[range(-limit, limit + 1) for limit in limits[:-1]]):
        half = int(halves[tuple(abs(c) for c in column)])
        if half >= 0:
            shift = 0
            for c, n in zip(column + (0,), stretched):
                shift = shift * n + c
            columns.append((shift, half))
    return sorted(columns, key=lambda column: -column[1]), stretched


def within_reach(queries, targets, columns):
    """bool per query: is a target in one of its columns? Both int64 and increasing."""
    hit = np.zeros(len(queries), bool)
    still_open = np.arange(len(queries))
    targets = np.append(targets, np.iinfo(np.int64).max)
    for shift, half in columns:
        if not len(still_open):
            break
        begin = queries[still_open] + (shift - half)
        found = targets[np.searchsorted(targets, begin)] <= begin + 2 * half
        hit[still_open[found]] = True
        still_open = still_open[~found]
    return hit


# ---------------------------------------------------------------------------------------------- size of an element

def element_sizes(spacing: tuple) -> np.ndarray:
    """Area in mm² (3D, 256 entries) or length in mm (2D, 16 entries) of the element of each neighbourhood.

    The element's vertices are the midpoints of the edges between an inside and an outside voxel. On every face of the
    neighbourhood they are joined in pairs; where two inside voxels face each other diagonally, each is cut off by
    itself. In 2D that one face is all. In 3D the joined vertices form polygons. Where more than four voxels are
    inside, those of the complement are taken, as in Lorensen and Cline's marching cubes (SIGGRAPH 1987).

    Polygons with five or six corners need not be flat: they are cut into triangles from the corner whose triangles
    lie in the fewest planes. These are the triangles behind the 256 entries of the challenge's table, for any spacing.
    """
    codes, sides = elements(len(spacing))
    sides = sides * spacing
    if len(spacing) == 2:
        return np.bincount(codes, np.linalg.norm(sides, axis=1), minlength=16)
    areas = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1) / 2
    return np.bincount(codes, areas, minlength=256)


@lru_cache
def elements(axes):
    """The segments (M, 2) or the two sides of the triangles (M, 2, 3) of all neighbourhoods, and whose each is (M,)."""
    corners = list(itertools.product((0, 1), repeat=axes))
    codes, sides = [], []
    for code in range(2 ** len(corners)):
        inside = {corner for bit, corner in enumerate(reversed(corners)) if code >> bit & 1}
        if axes == 3 and len(inside) > 4:
            inside = set(corners) - inside
        segments = joined_midpoints(inside, axes)
        if axes == 2:
            found = [np.subtract(a, b) for a, b in segments]
        else:
            found = [triangle for polygon in polygons(segments) for triangle in triangles(polygon)]
        codes += [code] * len(found)
        sides += found
    return np.array(codes), np.array(sides)


def joined_midpoints(inside, axes):
    """Pairs of edge midpoints joined on the faces of the neighbourhood (the unit square or cube)."""
    segments = []
    for fixed in itertools.product(range(axes), (0, 1)) if axes == 3 else [None]:
        face = [list(c) for c in ((0, 0), (0, 1), (1, 1), (1, 0))]
        if fixed:
            for corner in face:
                corner.insert(*fixed)
        face = [tuple(corner) for corner in face]
        crossings = [(a, b) for a, b in zip(face, face[1:] + face[:1]) if (a in inside) != (b in inside)]
        if len(crossings) == 2:
            groups = [crossings]
        else:
            groups = [[edge for edge in crossings if corner in edge] for corner in face if corner in inside and crossings]
        segments += [tuple(tuple((np.add(a, b) / 2).tolist()) for a, b in group) for group in groups]
    return segments


def polygons(segments):
    """Segments (pairs of points, each point in two of them) -> closed loops of points."""
    neighbours = {}
    for a, b in segments:
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    loops = []
    while neighbours:
        point, loop = next(iter(neighbours)), []
        while point is not None:
            loop.append(point)
            point = next((p for p in neighbours.pop(point) if p in neighbours), None)
        loops.append(loop)
    return loops


def triangles(polygon):
    """Closed loop of points of the unit cube -> two sides (2, 3) of each triangle, cut as `element_sizes` says."""
    fans = []
    for k in range(len(polygon)):
        points = np.array(polygon[k:] + polygon[:k]) - polygon[k]
        fan = [np.stack(sides) for sides in zip(points[1:-1], points[2:])]
        normals = [np.cross(a, b) for a, b in fan]
        planes = {tuple((normal / np.linalg.norm(normal)).round(6) + 0.0) for normal in normals}
        fans.append((len(planes), k, fan))
    return min(fans, key=lambda fan: fan[:2])[2]
