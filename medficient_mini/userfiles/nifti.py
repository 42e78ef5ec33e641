"""NIfTI volumes and label volumes in and out.

A volume is turned so that its slices lie along one anatomical axis and look as on a radiologist's screen (axial:
slices upward, rows to the back, columns to the patient's left); `Grid` knows the way back, so masks are written on
the file's own voxel grid. nibabel is imported only where a NIfTI file is opened. Errors are ValueErrors of one line,
"<file name>: <field>: expected …, found …".
"""
import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import first_line, whole_file
from .labels import whole_numbers
from .pictures import SAMPLE, intensity_range, to_uint8

# What slices, rows and columns run towards: Superior, Inferior, Left, Posterior.
AXES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
UNITS = {1: 1000.0, 3: 0.001}        # NIfTI's codes of metres and micrometres: mm in one. All else is in mm


@dataclass
class Grid:
    """A NIfTI file's voxel grid (I, J, K) and the slices (D, H, W) made of it.

    order: int (3,), the file axis behind slices, rows and columns. flip: bool (3,), whether each runs backward.
    spacing: float64 (3,), the mm between voxels along (z, y, x) of the slices. affine: float64 (4, 4), voxel indices
    to mm. header: nibabel's.
    """
    shape: tuple[int, int, int]
    affine: np.ndarray
    order: np.ndarray
    flip: np.ndarray
    spacing: np.ndarray
    header: object

    def to_file(self, slices: np.ndarray) -> np.ndarray:
        """View slices (D, H, W) as the file's array (I, J, K)."""
        return np.flip(slices, tuple(np.flatnonzero(self.flip))).transpose(np.argsort(self.order))

    def boxes_to_slices(self, boxes: np.ndarray) -> np.ndarray:
        """Turn boxes (N, 6) i0 j0 k0 i1 j1 k1, voxel indices of the file, inclusive, into x0 y0 z0 x1 y1 z1."""
        corners = np.asarray(boxes, np.float64).reshape(-1, 2, 3)[..., self.order]     # (N, 2, zyx)
        last = np.array(self.shape)[self.order] - 1.0
        # Where an axis runs backward the lower corner becomes the upper one.
        return np.where(self.flip, last - corners[:, ::-1], corners)[..., ::-1].reshape(-1, 6)


def grid_of(shape, affine: np.ndarray, axis: str, header=None) -> Grid:
    """Find the slices along an anatomical axis (a key of AXES) that lie closest to a file's own axes.

    The file's voxels are `shape` (I, J, K), and `affine`, float64 (4, 4), turns their indices into mm.
    """
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
    # For slices, rows and columns the file axis behind each, and whether it runs the same way (1) or backward (-1).
    order, sense = ornt_transform(axcodes2ornt(AXES[axis]), io_orientation(affine)).astype(int).T
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[order]
    return Grid(shape, affine, order, sense < 0, spacing, header)


def _open(path: Path):
    """Open a NIfTI file as nibabel's image, not yet in memory, its shape (I, J, K) and its affine (4, 4) to mm.

    Raises:
        ValueError: it is damaged, no volume, a series, complex or coloured, or its affine is no voxel grid.
    """
    try:
        import nibabel
    except ImportError:
        raise ValueError(f"{path.name}: file: NIfTI files need the package nibabel: pip install nibabel") from None
    try:
        nibabel.imageglobals.logger.setLevel("CRITICAL")          # our one line instead of its several
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)                      # gzip reads all for it, and checks the checksum
        image = nibabel.load(path, keep_file_open=True)
    except Exception as error:                        # nibabel has many, of several modules
        raise ValueError(f"{path.name}: file: expected a NIfTI volume, found it unreadable "
                         f"({first_line(error)})") from None
    shape = (image.shape + (1,))[:3]
    if len(shape) < 3 or math.prod(image.shape) != math.prod(shape) or min(shape) < 1:
        raise ValueError(f"{path.name}: imgs: expected a 3D volume, none of a series, found shape {image.shape}")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"{path.name}: imgs: expected one number per voxel, found {dtype}")
    end = image.dataobj.offset + math.prod(shape) * dtype.itemsize
    if size < end:
        raise ValueError(f"{path.name}: imgs: expected {end:,} bytes as its header announces, found {size:,}")
    in_mm = UNITS.get(int(image.header["xyzt_units"]) & 7, 1.0)
    affine = np.diag([in_mm, in_mm, in_mm, 1.0]) @ image.affine
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError(f"{path.name}: affine: expected three independent axes, found {affine[:3, :3].tolist()}")
    return image, shape, affine


def _slabs(image):
    """Give (k, numbers (I, J) scaled as the header says) of a 2D or 3D image one at a time, in the file's order."""
    for k in range((image.shape + (1,))[2]):
        yield k, np.asarray(image.dataobj[np.s_[:, :, k, 0, 0, 0, 0][:image.ndim]])


def load_nifti(path, axis: str = "axial", window: tuple[float, float] | None = None) -> tuple[np.ndarray, Grid, str]:
    """Read a NIfTI volume as uint8 slices (D, H, W).

    Two passes over the file, a slab at a time, one for the range of its numbers and one to map them, let it only ever
    be held as uint8.

    Args:
        path: a .nii or .nii.gz file.
        axis: anatomical direction of the slices, a key of AXES.
        window: (level, width) of the intensities that become 0–255 (see `pictures.intensity_range`).

    Returns:
        The slices, their Grid, and words that say how intensities were mapped.

    Raises:
        ValueError: the file is absent or damaged, or holds no volume.
    """
    image, shape, affine = _open(Path(path))
    grid = grid_of(shape, affine, axis, image.header)
    step = -(-math.prod(shape) // SAMPLE)
    sample = [slab.ravel()[k % step::step].copy() for k, slab in _slabs(image)]
    low, high, text = intensity_range(np.concatenate(sample), window)
    volume = np.empty(np.array(shape)[grid.order], np.uint8)
    in_file = grid.to_file(volume)                                             # a view: filled slab by slab
    for k, slab in _slabs(image):
        in_file[:, :, k] = to_uint8(slab, low, high)
    return volume, grid, text


def load_label_nifti(path, grid: Grid) -> np.ndarray:
    """Read a mask NIfTI that lies on the voxel grid of an image as uint16 labels (D, H, W) of that image's slices.

    Raises:
        ValueError: the file is absent or damaged, its grid is another (half a voxel off), or its values no labels.
    """
    path = Path(path)
    image, shape, affine = _open(path)
    if shape != grid.shape:
        raise ValueError(f"{path.name}: gts: expected the image's shape {grid.shape}, found {shape}")
    distance = np.linalg.norm(np.abs(affine - grid.affine)[:3] @ [*shape, 1])           # no corner is farther off
    if distance >= 0.5 * grid.spacing.min():
        raise ValueError(f"{path.name}: gts: expected the image's affine, found one up to {distance:.1f} mm off")
    labels = np.empty(np.array(shape)[grid.order], np.uint16)
    in_file = grid.to_file(labels)
    for k, slab in _slabs(image):
        in_file[:, :, k] = whole_numbers(slab, path.name)
    return labels


def save_label_nifti(path, segs: np.ndarray, grid: Grid) -> None:
    """Write labels (D, H, W), uint8 or uint16, as NIfTI on the file's own grid: same shape, affine and header."""
    import nibabel
    header = grid.header.copy()
    header.set_data_dtype(segs.dtype)
    header["cal_min"] = header["cal_max"] = 0        # a display range of the image, not of labels
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    # Without an affine of ours the header's own ones stay as they are, in their unit.
    image = kind(np.ascontiguousarray(grid.to_file(segs)), None, header)
    with whole_file(path) as temporary:
        nibabel.save(image, temporary)
