"""NIfTI volumes in and out."""
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import first_line, whole_file
from .pictures import AXES, LARGEST, SAMPLE, are_labels, intensity_range, to_uint8


@dataclass
class Grid:
    """A NIfTI file's voxel grid (i, j, k) and the slices (D, H, W) made of it.

    order: the file axis behind slices, rows and columns. flip: whether each of these three runs backward.
    spacing: float64 (3,) mm along (z, y, x) of the slices. affine: (4, 4) voxel indices to mm. header: nibabel's.
    """
    shape: tuple[int, int, int]
    affine: np.ndarray
    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]
    spacing: np.ndarray
    header: object

    def to_slices(self, array: np.ndarray) -> np.ndarray:
        """View of a file array (I, J, K) as slices (D, H, W)."""
        return array.transpose(self.order)[tuple(slice(None, None, -1 if f else 1) for f in self.flip)]

    def to_file(self, slices: np.ndarray) -> np.ndarray:
        """View of slices (D, H, W) as the file array (I, J, K)."""
        turned = slices[tuple(slice(None, None, -1 if f else 1) for f in self.flip)]
        return turned.transpose(np.argsort(self.order))

    def boxes_to_slices(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 6) i0 j0 k0 i1 j1 k1, voxel indices of the file, inclusive -> x0 y0 z0 x1 y1 z1 on the slices."""
        corners = np.asarray(boxes, np.float64).reshape(-1, 2, 3)[..., list(self.order)]     # (N, 2, zyx)
        return self._mirrored(corners)[..., ::-1].reshape(-1, 6)

    def boxes_to_file(self, boxes: np.ndarray) -> np.ndarray:
        """The reverse of `boxes_to_slices`."""
        corners = np.asarray(boxes, np.float64).reshape(-1, 2, 3)[..., ::-1]                 # (N, 2, zyx)
        return self._mirrored(corners)[..., np.argsort(self.order)].reshape(-1, 6)

    def _mirrored(self, corners: np.ndarray) -> np.ndarray:
        """Where an axis runs backward the lower corner becomes the upper one."""
        last = np.array(self.shape)[list(self.order)] - 1.0
        return np.where(self.flip, last - corners[:, ::-1], corners)


def grid_of(shape, affine: np.ndarray, axis: str, header=None) -> Grid:
    """The slices along the anatomical `axis` (a key of AXES) that lie closest to the axes of an affine (4, 4).

    ValueError for an affine that is no voxel grid.
    """
    from nibabel.orientations import io_orientation
    matrix = np.asarray(affine, np.float64)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(affine).all() or not (spacing > 0).all() or abs(np.linalg.det(matrix / spacing)) < 1e-3:
        raise ValueError(f"affine: expected three independent voxel axes, found {matrix.round(3).tolist()}")
    # For each file axis the patient axis it follows (0 left-right, 1 back-front, 2 feet-head) and the sense.
    follows, sense = io_orientation(affine).T
    order = [int(np.flatnonzero(follows == "LPS".index(letter.replace("I", "S")))[0]) for letter in AXES[axis]]
    flip = [bool((sense[file_axis] > 0) != (letter in "RAS")) for file_axis, letter in zip(order, AXES[axis])]
    return Grid(tuple(shape), np.asarray(affine, np.float64), tuple(order), tuple(flip), spacing[order], header)


def _open_nifti(path: Path):
    """The nibabel image of a 3D (or 2D) scalar NIfTI file, nothing but its header read. ValueError otherwise."""
    try:
        import nibabel
    except ImportError:
        raise ValueError(f"{path.name}: file: NIfTI files need the package nibabel: pip install nibabel") from None
    try:
        image = nibabel.load(path, keep_file_open=True)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError,
            nibabel.spatialimages.HeaderDataError) as error:
        raise ValueError(f"{path.name}: file: expected a NIfTI volume, found it unreadable ({first_line(error)})") from None
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"{path.name}: imgs: expected a 3D volume, found shape {image.shape}"
                         + (" (a series: save one volume of it as a file)" if len(shape) > 3 else ""))
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"{path.name}: imgs: expected one number per voxel, found {dtype}")
    claimed, size = int(np.prod(shape, dtype=object)) * dtype.itemsize, path.stat().st_size
    if claimed > min(LARGEST, size * (1100 if path.name.lower().endswith(".gz") else 1)):
        raise ValueError(f"{path.name}: imgs: expected the {claimed:,} bytes that its header {dtype} {shape} announces, "
                         f"found a file of {size:,}")
    return image, shape + (1,) * (3 - len(shape))


def _slabs(path: Path, image, shape):
    """(k, numbers (I, J) scaled as the header says) of the file, in its own order, one at a time."""
    try:
        for k in range(shape[2]):
            whole = image.ndim == 2
            index = (slice(None),) * 2 if whole else (slice(None), slice(None), k) + (0,) * (image.ndim - 3)
            yield k, np.asarray(image.dataobj[index])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path.name}: file: expected {shape} voxels, found it damaged ({first_line(error)})") from None


def load_nifti(path, axis: str = "axial", window: tuple[float, float] | None = None) -> tuple[np.ndarray, Grid, str]:
    """A NIfTI volume as uint8 slices (D, H, W) along `axis`, their Grid, and a line on the intensities.

    Two passes over the file, a slab at a time: one for the range (from at most SAMPLE voxels, evenly spread), one for
    the mapping; the volume is only ever held as uint8. 8-bit files without a scale factor stay as they are.
    """
    path = Path(path)
    image, shape = _open_nifti(path)
    try:
        grid = grid_of(shape, image.affine, axis, image.header)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    step = -(-int(np.prod(shape)) // SAMPLE)
    plain = image.get_data_dtype() == np.uint8 and (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    if plain and window is None:
        text, convert = "8 bits as they are", np.asarray
    else:
        sample = [] if window else [slab.ravel()[k % step::step].copy() for k, slab in _slabs(path, image, shape)]
        low, high, text = intensity_range(np.concatenate(sample) if sample else np.zeros(0), window)
        convert = lambda slab: to_uint8(slab, low, high)                      # noqa: E731
    volume = np.empty([shape[a] for a in grid.order], np.uint8)
    in_file = grid.to_file(volume)                                             # a view: filled slab by slab
    for k, slab in _slabs(path, image, shape):
        in_file[:, :, k] = convert(slab)
    return volume, grid, text


def load_label_nifti(path, grid: Grid) -> np.ndarray:
    """A mask NIfTI on the voxel grid of an image -> uint16 labels (D, H, W) along that image's slices.

    ValueError where shape or affine are another grid's (a corner off by more than half a voxel) or values are no labels.
    """
    path = Path(path)
    image, shape = _open_nifti(path)
    if shape != grid.shape:
        raise ValueError(f"{path.name}: gts: expected the image's shape {grid.shape}, found {shape}")
    corners = np.array([[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])])
    distance = np.linalg.norm(corners @ (image.affine - grid.affine).T, axis=1).max()
    if not distance < 0.5 * grid.spacing.min():
        raise ValueError(f"{path.name}: gts: expected the image's affine, found one that puts a corner {distance:.1f} mm off")
    labels = np.empty([shape[a] for a in grid.order], np.uint16)
    in_file = grid.to_file(labels)
    for k, slab in _slabs(path, image, shape):
        if not are_labels(slab):
            raise ValueError(f"{path.name}: gts: expected whole numbers 0 to 65535, found others in slice {k}")
        in_file[:, :, k] = slab
    return labels


def save_label_nifti(path, segs: np.ndarray, grid: Grid) -> None:
    """Labels (D, H, W) uint8 or uint16 -> NIfTI on the file's own grid: same shape, affine and header; whole or absent."""
    import nibabel
    header = grid.header.copy()
    header.set_data_dtype(segs.dtype)
    header["cal_min"] = header["cal_max"] = 0        # a display range of the image, not of labels
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(np.ascontiguousarray(grid.to_file(segs)), grid.affine, header)
    with whole_file(path) as temporary:
        nibabel.save(image, temporary)
