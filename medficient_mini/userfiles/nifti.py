"""NIfTI volumes and label volumes in and out.

A volume is turned so that its slices lie along one anatomical axis and look as on a radiologist's screen (axial:
slices upward, rows to the back, columns to the patient's left); `Grid` knows the way back, so masks are written on
the file's own voxel grid. nibabel is imported only where a NIfTI file is opened. Errors are ValueErrors of one line,
"<file name>: <field>: expected …, found …".
"""
import gzip
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..files import first_line, whole_file
from .labels import whole_numbers
from .pictures import SAMPLE, intensity_range, to_uint8

LARGEST = 16 << 30                   # voxels × bytes of one volume; far above any scan
# What slices, rows and columns run towards: Superior, Inferior, Left, Posterior.
AXES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
UNITS = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}       # NIfTI's codes other than of mm; mm in one


@dataclass
class Grid:
    """A NIfTI file's voxel grid (I, J, K) and the slices (D, H, W) made of it.

    order: the file axis behind slices, rows and columns. flip: whether each of these three runs backward.
    spacing: float64 (3,), the mm between voxels along (z, y, x) of the slices. affine: float64 (4, 4), voxel indices
    to mm. header: nibabel's.
    """
    shape: tuple[int, int, int]
    affine: np.ndarray
    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]
    spacing: np.ndarray
    header: object

    def to_file(self, slices: np.ndarray) -> np.ndarray:
        """View slices (D, H, W) as the file's array (I, J, K)."""
        turned = slices[tuple(slice(None, None, -1 if f else 1) for f in self.flip)]
        return turned.transpose(np.argsort(self.order))

    def boxes_to_slices(self, boxes: np.ndarray) -> np.ndarray:
        """Turn boxes (N, 6) i0 j0 k0 i1 j1 k1, voxel indices of the file, inclusive, into x0 y0 z0 x1 y1 z1."""
        corners = np.asarray(boxes, np.float64).reshape(-1, 2, 3)[..., list(self.order)]     # (N, 2, zyx)
        last = np.array(self.shape)[list(self.order)] - 1.0
        # Where an axis runs backward the lower corner becomes the upper one.
        return np.where(self.flip, last - corners[:, ::-1], corners)[..., ::-1].reshape(-1, 6)


def grid_of(shape, affine: np.ndarray, axis: str, header=None) -> Grid:
    """Find the slices along an anatomical axis (a key of AXES) that lie closest to a file's own axes.

    Args:
        shape: (I, J, K) of the file.
        affine: float64 (4, 4), voxel indices to mm.
    """
    from nibabel.orientations import io_orientation
    # For each file axis the patient axis it follows (0 left-right, 1 back-front, 2 feet-head) and the sense.
    follows, sense = io_orientation(affine).T
    order = [int(np.flatnonzero(follows == "LPS".index(letter.replace("I", "S")))[0]) for letter in AXES[axis]]
    flip = [bool((sense[file_axis] > 0) != (letter in "RAS")) for file_axis, letter in zip(order, AXES[axis])]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[order]
    return Grid(tuple(shape), affine, tuple(order), tuple(flip), spacing, header)


def _open(path: Path):
    """Open a 3D (or 2D) scalar NIfTI file, nothing but its header read.

    Returns:
        nibabel's image, its shape (I, J, K), its affine (4, 4) to mm, and the header's unit where that is not mm.

    Raises:
        ValueError: it is damaged, no NIfTI file, a series, its numbers are complex or colours, or its affine is no
            voxel grid.
    """
    try:
        import nibabel
    except ImportError:
        raise ValueError(f"{path.name}: file: NIfTI files need the package nibabel: pip install nibabel") from None
    try:
        nibabel.imageglobals.logger.setLevel("CRITICAL")          # our one line instead of its several
        image = nibabel.load(path, keep_file_open=True)
    except Exception as error:                        # nibabel has many, of several modules
        raise ValueError(f"{path.name}: file: expected a NIfTI volume, found it unreadable "
                         f"({first_line(error)})") from None
    shape = (image.shape + (1,))[:3]
    if len(shape) < 3 or min(shape) < 1 or set(image.shape[3:]) - {1}:
        raise ValueError(f"{path.name}: imgs: expected a 3D volume, found shape {image.shape}"
                         " (of a series, save one volume as a file)")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"{path.name}: imgs: expected one number per voxel, found {dtype}")
    # The compression of gzip is at most about a thousandfold.
    claimed, size = int(np.prod(shape, dtype=object)) * dtype.itemsize, path.stat().st_size
    if claimed > min(LARGEST, size * (1100 if path.suffix.lower() == ".gz" else 1)):
        raise ValueError(f"{path.name}: imgs: expected the {claimed:,} bytes that its header {dtype} {shape} announces, "
                         f"found a file of {size:,}")
    unit, in_mm = UNITS.get(int(image.header["xyzt_units"]) & 7, ("", 1.0))
    affine = np.diag([in_mm, in_mm, in_mm, 1.0]) @ image.affine
    steps = affine[:3, :3]
    with np.errstate(invalid="ignore", divide="ignore"):
        independent = abs(np.linalg.det(steps / np.linalg.norm(steps, axis=0))) > 1e-3
    if not independent or not np.isfinite(affine).all():
        raise ValueError(f"{path.name}: affine: expected three independent voxel axes, found {steps.round(3).tolist()}")
    return image, shape, affine, unit


def _slabs(path: Path, image, shape):
    """Give (k, numbers (I, J) scaled as the header says) of a file, in its own order, one at a time."""
    try:
        for k in range(shape[2]):
            index = (slice(None), slice(None), k)[:image.ndim] + (0,) * (image.ndim - 3)
            yield k, np.asarray(image.dataobj[index])
        if path.suffix.lower() == ".gz":
            # The checksum stands behind the last voxel, where nobody reads unless asked to.
            with gzip.open(path) as stream:
                while stream.read(1 << 20):
                    pass
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path.name}: file: expected {shape} voxels, found it damaged "
                         f"({first_line(error)})") from None


def load_nifti(path, axis: str = "axial", window: tuple[float, float] | None = None) -> tuple[np.ndarray, Grid, str]:
    """Read a NIfTI volume as uint8 slices (D, H, W).

    Two passes over the file, a slab at a time: one for the range (from at most SAMPLE voxels, evenly spread), one for
    the mapping, so the volume is only ever held as uint8.

    Args:
        path: a .nii or .nii.gz file.
        axis: anatomical direction of the slices, a key of AXES.
        window: (level, width) of the intensities that become 0–255; without it 8 bits without a scale factor stay as
            they are and all else is mapped by percentiles (see `pictures.intensity_range`).

    Returns:
        The slices, their Grid, and words that say how intensities were mapped.

    Raises:
        ValueError: the file is absent or damaged, or holds no volume.
    """
    path = Path(path)
    image, shape, affine, unit = _open(path)
    grid = grid_of(shape, affine, axis, image.header)
    plain = image.get_data_dtype() == np.uint8 and (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    low, high, text = 0.0, 255.0, "8 bits as they are"
    if window is not None:
        low, high, text = intensity_range(np.zeros(0), window)
    elif not plain:
        step = -(-int(np.prod(shape)) // SAMPLE)
        sample = [slab.ravel()[k % step::step].copy() for k, slab in _slabs(path, image, shape)]
        low, high, text = intensity_range(np.concatenate(sample), None)
    volume = np.empty([shape[a] for a in grid.order], np.uint8)
    in_file = grid.to_file(volume)                                             # a view: filled slab by slab
    for k, slab in _slabs(path, image, shape):
        in_file[:, :, k] = to_uint8(slab, low, high)
    return volume, grid, text + (f"; lengths in {unit}, turned into mm" if unit else "")


def load_label_nifti(path, grid: Grid) -> np.ndarray:
    """Read a mask NIfTI that lies on the voxel grid of an image as uint16 labels (D, H, W) of that image's slices.

    Raises:
        ValueError: the file is absent or damaged, its shape or affine are another grid's (a corner is off by more
            than half a voxel), or its values are no labels.
    """
    path = Path(path)
    image, shape, affine, _ = _open(path)
    if shape != grid.shape:
        raise ValueError(f"{path.name}: gts: expected the image's shape {grid.shape}, found {shape}")
    corners = np.array(list(np.ndindex(2, 2, 2))) * shape
    off = affine - grid.affine
    distance = np.linalg.norm(corners @ off[:3, :3].T + off[:3, 3], axis=1).max()
    if not distance < 0.5 * grid.spacing.min():
        raise ValueError(f"{path.name}: gts: expected the image's affine, found one that puts a corner "
                         f"{distance:.1f} mm off")
    labels = np.empty([shape[a] for a in grid.order], np.uint16)
    in_file = grid.to_file(labels)
    for k, slab in _slabs(path, image, shape):
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
    open_file = partial(gzip.open, compresslevel=1) if Path(path).suffix.lower() == ".gz" else open
    with whole_file(path) as temporary, open_file(temporary, "wb") as file:
        image.to_stream(file)
