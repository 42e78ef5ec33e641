"""Surface elements of voxel masks ("surfels"): what they look like, where they are, how large they are.

A surfel may sit on every corner of the voxel grid (Nikolov et al., arXiv 1809.04430). The 2 x 2 x 2 voxels around the
corner, eight bits, say which part of the surface passes there. The surfel's place is the corner itself, and its size
is the area of the marching-cubes triangles of these eight voxels. In 2D the four pixels around a corner of the pixel
grid give a piece of the contour and its length.
"""
import itertools
from functools import lru_cache

import numpy as np

SQUARE = ((0, 0), (0, 1), (1, 1), (1, 0))                    # the corners of a face, in order around it


def surfel_codes(mask: np.ndarray) -> np.ndarray:
    """Return the code of every grid corner: a bit for each voxel around it, set where the voxel is inside the mask.

    The voxel before the corner on every axis gives the highest bit, the one after it the lowest. A corner whose code
    is 0 or has all bits set holds no surfel.

    Args:
        mask: unsigned integers (D, H, W) or (H, W), 0 or 1; two masks may be coded at once, the second as 256.

    Returns:
        An array of the mask's dtype, one longer on every axis.
    """
    codes = np.pad(mask, 1)
    for axis in range(mask.ndim):
        pairs = codes[:-1] << 2 ** (mask.ndim - 1 - axis) | codes[1:]
        codes = np.moveaxis(pairs, 0, -1)                    # the next axis comes first; at the end all are back
    return codes


def surfel_sizes(spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Return the size of the surfel of each code: 256 areas in mm² for three spacings, 16 lengths in mm for two.

    The vertices of a surfel are the midpoints of the edges between an inside and an outside voxel. On every face of
    the cube they are joined in pairs; where two inside voxels face each other diagonally, each is cut off by itself.
    In 2D that one face is all. In 3D the joined vertices form polygons. Where more than four voxels are inside, those
    of the complement are taken, as in Lorensen and Cline's marching cubes (SIGGRAPH 1987).

    Polygons with five or six corners need not be flat: they are cut into triangles from the corner whose triangles
    lie in the fewest planes. These are the triangles behind the 256 entries of the challenge's table, for any spacing.
    """
    if len(spacing_mm) == 2:
        codes, segments = contour_pieces()
        return np.bincount(codes, np.linalg.norm(segments * spacing_mm, axis=1), minlength=16)
    codes, sides = surface_triangles()
    normals = np.cross(*(sides * spacing_mm).swapaxes(0, 1))
    return np.bincount(codes, np.linalg.norm(normals, axis=1) / 2, minlength=256)


@lru_cache
def contour_pieces():
    """The contour segments (M, 2) of all 16 codes in steps of the grid, and the code (M,) of each."""
    pieces = [(code, np.subtract(*segment)) for code in range(16) for segment in segments(SQUARE, inside(code, 2))]
    return [np.array(column) for column in zip(*pieces)]


@lru_cache
def surface_triangles():
    """Two sides of each triangle (M, 2, 3) of all 256 codes in steps of the grid, and the code (M,) of each."""
    faces = [[(*corner[:axis], side, *corner[axis:]) for corner in SQUARE] for axis in range(3) for side in (0, 1)]
    codes, sides = [], []
    for code in range(256):
        voxels = inside(code if code.bit_count() <= 4 else 255 - code, 3)
        for polygon in polygons([segment for face in faces for segment in segments(face, voxels)]):
            triangles = min((fan(polygon, k) for k in range(len(polygon))), key=planes)
            codes += [code] * len(triangles)
            sides += list(triangles)
    return np.array(codes), np.array(sides)


def inside(code: int, axes: int) -> set:
    """The corners of the unit square or cube whose bit is set."""
    corners = itertools.product((1, 0), repeat=axes)
    return {corner for bit, corner in enumerate(corners) if code >> bit & 1}


def segments(face, voxels: set) -> list:
    """Pairs of edge midpoints joined on a face, given by its four corners in order."""
    if face[0] in voxels:            # Starting outside, the edges before and behind each inside voxel come in pairs.
        face = (*face[1:], face[0])
    edges = zip(face, (*face[1:], face[0]))
    midpoints = [tuple(np.add(a, b) / 2) for a, b in edges if (a in voxels) != (b in voxels)]
    return list(zip(midpoints[::2], midpoints[1::2]))


def polygons(segments: list) -> list:
    """Join segments, pairs of points, to closed loops of points; each point is in two of them."""
    loops = []
    while segments:
        first, point = segments.pop()
        loops.append([first])
        while point != first:
            loops[-1].append(point)
            following = next(segment for segment in segments if point in segment)
            segments.remove(following)
            point = following[following[0] == point]                           # its other end
    return loops


def fan(polygon: list, k: int) -> np.ndarray:
    """The triangles (M, 2, 3) of a polygon cut from its corner k: their two sides at that corner."""
    points = np.roll(polygon, -k, axis=0)
    sides = points[1:] - points[0]
    return np.stack([sides[:-1], sides[1:]], 1)


def planes(triangles: np.ndarray) -> int:
    """The number of different planes that triangles with a common corner lie in."""
    normals = np.cross(triangles[:, 0], triangles[:, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return len(np.unique(normals.round(6) + 0.0, axis=0))
