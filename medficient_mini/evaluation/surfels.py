"""Surface elements of voxel masks ("surfels"): what they look like, where they are, how large they are.

A surfel may sit on every corner of the voxel grid (Nikolov et al., arXiv 1809.04430). The 2 x 2 x 2 voxels around the
corner, eight bits, say which part of the surface passes there. The surfel's place is the corner itself, and its size
is the area of the marching-cubes triangles of these eight voxels.
"""
import itertools
from functools import lru_cache

import numpy as np

SQUARE = ((0, 0), (0, 1), (1, 1), (1, 0))                    # the corners of a face, in order around it
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

    The vertices are the midpoints of the edges between an inside and an outside voxel. On every face of the cube they
    are joined in pairs, so that of two inside voxels facing each other diagonally each is cut off by itself, and so
    form polygons; with more than four voxels inside, those of the complement (Lorensen and Cline's marching cubes,
    SIGGRAPH 1987). A polygon is cut into triangles from the corner where the sides of the triangles are longest.
    """
    codes, sides = surface_triangles()
    normals = np.cross(*(sides * spacing_mm).swapaxes(0, 1))
    return np.bincount(codes, np.linalg.norm(normals, axis=1) / 2, minlength=256)


@lru_cache
def surface_triangles():
    """Return two sides of each triangle (M, 2, 3) of all 256 codes, in grid steps, and the code (M,) of each."""
    corners = list(itertools.product((1, 0), repeat=3))      # of the cube, from the lowest bit to the highest
    faces = [[(*corner[:axis], side, *corner[axis:]) for corner in SQUARE] for axis in range(3) for side in (0, 1)]
    codes, sides = [], []
    for code in range(256):
        bits = code if code.bit_count() <= 4 else 255 - code
        inside = {corner for k, corner in enumerate(corners) if bits >> k & 1}
        for polygon in polygons([segment for face in faces for segment in segments(face, inside)]):
            fans = [fan(polygon, k) for k in range(len(polygon))]
            triangles = max(fans, key=lambda sides: np.sum(sides ** 2))
            codes += [code] * len(triangles)
            sides += list(triangles)
    return np.array(codes), np.array(sides)


def segments(face, inside: set) -> list:
    """Return pairs of edge midpoints joined on a face, given by its four corners in order, and all corners inside."""
    if face[0] in inside:            # Starting outside, the edges before and behind each inside voxel come in pairs.
        face = face[1:] + face[:1]
    edges = zip(face, face[1:] + face[:1])
    midpoints = [tuple(np.add(a, b) / 2) for a, b in edges if (a in inside) != (b in inside)]
    return list(zip(midpoints[::2], midpoints[1::2]))


def polygons(segments: list) -> list:
    """Join segments, pairs of points, to closed loops of points; each point is in two of them."""
    loops = []
    while segments:
        loop = list(segments.pop())
        while loop[-1] != loop[0]:
            following = next(segment for segment in segments if loop[-1] in segment)
            segments.remove(following)
            loop.append(following[following[0] == loop[-1]])                   # its other end
        loops.append(loop[:-1])
    return loops


def fan(polygon: list, k: int) -> np.ndarray:
    """Cut a polygon from its corner k into triangles (M, 2, 3): their two sides at that corner."""
    points = np.roll(polygon, -k, axis=0)
    sides = points[1:] - points[0]
    return np.stack([sides[:-1], sides[1:]], 1)
