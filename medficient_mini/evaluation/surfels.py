"""Surface elements of voxel masks ("surfels"): what they look like, where they are, how large they are.

A surfel may sit on every corner of the voxel grid (Nikolov et al., arXiv 1809.04430). The 2 x 2 x 2 voxels around the
corner, eight bits, say which part of the surface passes there. The surfel's place is the corner itself, and its size
is the area of the marching-cubes triangles of these eight voxels.
"""
import itertools
from functools import lru_cache

import numpy as np

# In 2D: the contour's length in pixels within the four pixels around a corner, bits 8 and 4 above 2 and 1, for each of
# the 16 codes. A pixel that differs from both of its neighbours is cut off by a slant from side to side.
SLANT = 0.5 ** 0.5
CONTOUR_LENGTHS = np.array([0, SLANT, SLANT, 1, SLANT, 1, 2 * SLANT, SLANT,
                            SLANT, 2 * SLANT, 1, SLANT, 1, SLANT, SLANT, 0])


def surfel_codes(mask: np.ndarray) -> np.ndarray:
    """Return the code of every grid corner of a mask (D, H, W) or (H, W), uint8 of 0 and 1: uint8, one longer an axis.

    The voxel before the corner on every axis gives the highest bit, the one after it the lowest; 1 is inside.
    """
    codes = np.pad(mask, 1)
    for axis in range(mask.ndim):
        pairs = codes[:-1] << 2 ** (mask.ndim - 1 - axis) | codes[1:]
        codes = np.moveaxis(pairs, 0, -1)                    # the next axis comes first; at the end all are back
    return codes


def surfel_areas(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Return the area in mm² of the surfel of each of the 256 codes, as the challenge's table has it for one spacing.

    Inside voxels that share a face form a part, so that of two facing each other diagonally each is cut off by itself.
    A polygon goes round each part, through the midpoints of the edges that leave it; with more than four voxels inside,
    round those of the complement (Lorensen and Cline's marching cubes, SIGGRAPH 1987). It is cut into triangles from
    the corner where the sides of the triangles are longest.
    """
    codes, sides = surface_triangles()
    normals = np.cross(*(sides * spacing_mm).swapaxes(0, 1))
    return np.bincount(codes, np.linalg.norm(normals, axis=1) / 2, minlength=256)


@lru_cache
def surface_triangles():
    """Return two sides of each triangle (M, 2, 3) of all 256 codes, in grid steps, and the code (M,) of each."""
    from scipy.ndimage import label
    corners = itertools.product((0, 1), repeat=3)            # of the cube, from the highest bit to the lowest
    edges = [(a, b) for a, b in itertools.combinations(corners, 2) if np.not_equal(a, b).sum() == 1]
    codes, sides = [], []
    for code in range(256):
        bits = code if code.bit_count() <= 4 else 255 - code
        parts, count = label(np.unpackbits(np.uint8([bits])).reshape(2, 2, 2))
        for part in range(1, count + 1):
            triangles = fan(np.array([np.add(a, b) / 2 for a, b in edges if (parts[a] == part) != (parts[b] == part)]))
            codes += [code] * len(triangles)
            sides += list(triangles)
    return np.array(codes), np.array(sides)


def fan(points: np.ndarray) -> np.ndarray:
    """Cut the polygon with these corners (K, 3), in any order, into triangles (K - 2, 2, 3): two sides of each."""
    around = points - points.mean(0)
    plane = np.linalg.svd(around)[2][:2]                     # the one nearest to all of them: there angles order them
    points = points[np.argsort(np.angle(around @ plane.T @ (1, 1j)))]
    spokes = np.stack([np.roll(points, -k, 0) - points[k] for k in range(len(points))])[:, 1:]       # (K, K - 1, 3)
    return max(np.stack([spokes[:, :-1], spokes[:, 1:]], 2), key=np.linalg.norm)
