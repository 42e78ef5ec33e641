"""Volumes and label volumes in and out: NIfTI through nibabel; DICOM series, NRRD and MetaImage through SimpleITK.

A volume is turned so that its slices lie along one anatomical axis and look as on a radiologist's screen (axial:
slices upward, rows to the back, columns to the patient's left); `Grid` knows the way back. Both packages are imported
where a file needs them.
"""
import gzip
import math
import os
import re
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..files import first_line, list_files, whole_file
from ..inference.boxes import FieldError
from ..show.draw import colours
from .labels import whole_numbers
from .pictures import PICTURES, SAMPLE, hushed, intensity_range, to_uint8

NIFTI, META = (".nii", ".nii.gz"), (".mha", ".mhd")
IMAGES = (*PICTURES, *NIFTI, ".nrrd", *META)
# What slices, rows and columns run towards: Superior, Inferior, Left, Posterior.
AXES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
UNITS = {1: 1000.0, 3: 0.001}        # NIfTI's codes of metres and micrometres: mm in one. All else is in mm
# The fields of a NIfTI header that say where its voxels lie: both affines, in their unit.
GEOMETRY = ("pixdim xyzt_units qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z "
            "srow_x srow_y srow_z").split()
TAGS = "0020|000e", "0008|103e"      # of a DICOM series: its identifier and description
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])                  # from ITK's axes, left, back and top, to NIfTI's, and back


class Grid:
    """A file's voxel grid (I, J, K) and the slices (D, H, W) made of it, as close as can be to an axis of AXES.

    affine: float64 (4, 4), voxel indices to mm to the right, front and top. header: nibabel's, None of other formats.
    order: int (3,), the file axis behind slices, rows and columns. flip: bool (3,), whether each runs backward.
    size: int (3,), their numbers D, H, W. spacing: float64 (3,), the mm between them.
    """

    def __init__(self, shape: tuple[int, int, int], affine: np.ndarray, axis: str, header=None):
        from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
        self.shape, self.affine, self.header = shape, affine, header
        # Of slices, rows and columns the file axis behind each, and whether it runs the same way (1) or backward (-1).
        self.order, sense = ornt_transform(axcodes2ornt(AXES[axis]), io_orientation(affine)).astype(int).T
        self.flip, self.size = sense < 0, np.take(shape, self.order)
        self.spacing = np.linalg.norm(affine[:3, :3], axis=0)[self.order]

    def to_file(self, slices: np.ndarray) -> np.ndarray:
        """View slices (D, H, W) as the file's array (I, J, K)."""
        return np.flip(slices, tuple(np.flatnonzero(self.flip))).transpose(np.argsort(self.order))

    def to_slices(self, voxels, dtype, convert) -> np.ndarray:
        """Turn the file's numbers (I, J, K) to slices of another type, converting one slab (I, J) at a time."""
        slices = np.empty(self.size, dtype)
        in_file = self.to_file(slices)
        for k in range(self.shape[2]):
            in_file[..., k] = convert(np.asarray(voxels[..., k]))
        return slices

    def boxes_to_slices(self, boxes: np.ndarray) -> np.ndarray:
        """Turn boxes (N, 6) i0 j0 k0 i1 j1 k1, voxel indices of the file, inclusive, into x0 y0 z0 x1 y1 z1."""
        corners = np.reshape(boxes, (-1, 2, 3))[..., self.order]                       # (N, 2, zyx)
        # Where an axis runs backward the lower corner becomes the upper one.
        return np.where(self.flip, self.size - 1.0 - corners[:, ::-1], corners)[..., ::-1].reshape(-1, 6)


def is_dicom(path: Path) -> bool:
    """Tell whether a file starts as DICOM files do and is not a CD's table of contents."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"
    return False


def list_images(path: Path) -> list[Path]:
    """Find pictures and volumes in a folder and its subfolders, sorted, or the one file itself.

    A folder that holds DICOM files is one volume. ValueError where there is nothing of all this.
    """
    found = set()
    with suppress(ValueError):                               # raised below, in better words
        for file in list_files(path, ("",)):
            if file.name.lower().endswith(IMAGES):
                found.add(file)
            elif is_dicom(file):
                found.add(file if file == path else file.parent)
    return sorted(found) or list_files(path, IMAGES)


def parts_of(path: Path) -> list[Path]:
    """Return the files that an image consists of: those of a DICOM folder, a header and its numbers, else the one."""
    if path.is_dir():
        return sorted(filter(is_dicom, path.iterdir()))
    if not path.name.lower().endswith((".mhd", ".nrrd")):
        return [path]
    with open(path, "rb") as file:
        names = re.findall(rb"(?im)^(?:ElementDataFile *=|data ?file:) *(.+?)\r?$", file.read(1 << 16))
    numbers = [path.parent / os.fsdecode(name) for name in names]
    if not all(map(Path.is_file, numbers)):                  # "LIST" or a pattern: any of the folder's may be meant
        numbers = sorted(filter(Path.is_file, path.parent.iterdir()))
    return [path, *numbers]


def _open_nifti(path: Path):
    """Open a NIfTI file: its numbers, not yet in memory, its affine in mm, and its header."""
    import nibabel
    nibabel.imageglobals.logger.setLevel("CRITICAL")              # our one line instead of its several
    # Not nibabel's own Opener, which finds no end where indexed_gzip is installed.
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)                          # gzip reads all for it, and checks the checksum
    image = nibabel.load(path, keep_file_open=True)
    end = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if size < end:
        raise FieldError(f"imgs: expected {end:,} bytes as its header announces, found {size:,}")
    in_mm = UNITS.get(int(image.header["xyzt_units"]) & 7, 1.0)
    return image.dataobj, np.diag([in_mm, in_mm, in_mm, 1.0]) @ image.affine, image.header


def _itk_reader(path: Path):
    """Let SimpleITK read a file's header; return its reader, and the file's affine."""
    import SimpleITK
    from nibabel.affines import from_matvec
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    # Compression shrinks at most 1032-fold: no header promises more.
    if len(size) != 3 or channels > 1 or math.prod(size) > 1100 * sum(part.stat().st_size for part in parts_of(path)):
        raise FieldError(f"imgs: expected a 3D volume in grey, found shape {size}, {channels} channels")
    axes = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    return reader, LPS @ from_matvec(axes, reader.GetOrigin())


def _open_itk(path: Path):
    """Read an NRRD or MetaImage file: its numbers (I, J, K) and its affine."""
    import SimpleITK
    data = path.read_bytes()
    header, _, packed = data.partition(b"\n\n" if data.startswith(b"NRRD") else b"LOCAL\n")
    if packed and re.search(rb"encoding: *gz|CompressedData *= *True", header):
        zlib.decompress(packed, 47)                               # ITK does not look at the checksum
    reader, affine = _itk_reader(path)
    return SimpleITK.GetArrayFromImage(reader.Execute()).T, affine


def _open_dicom(path: Path, series: int | None):
    """Read one series of a DICOM folder, or a single file: its numbers (I, J, K), rescaled, and its affine."""
    import SimpleITK
    parts, found = parts_of(path), {}                        # the slices of each series
    for file in parts:
        with suppress(RuntimeError, FieldError):             # reports, plans and colour pictures lie beside images
            reader, affine = _itk_reader(file)
            tags = [reader.GetMetaData(tag).strip() for tag in TAGS if reader.HasMetaDataKey(tag)]
            found.setdefault(tuple(tags), []).append((reader, affine))
    left_out = len(parts) - sum(map(len, found.values()))
    if found and left_out:                                   # one of the slices, damaged, might be among them
        print(f"{path.name}: series: expected slices in grey, found {left_out} of {len(parts)} DICOM files without one: "
              "left out", file=sys.stderr)
    number = series if series is not None else len(found) == 1       # without --series there must be one alone
    if not 0 < number <= len(found):
        listed = "; ".join(f"{number}: {' '.join(tags[1:]) or 'no description'}, {len(slices)} slices"
                           for number, (tags, slices) in enumerate(found.items(), 1))
        raise FieldError(f"series: expected --series with the number of one, found {listed or 'no image in grey'}")
    slices = list(found.values())[number - 1]
    normal = slices[0][1][:3, 2]
    slices.sort(key=lambda pair: pair[1][:3, 3] @ normal)
    affines = np.array([affine for _, affine in slices])
    affine, places, count = affines[0], affines[:, :3, 3], len(slices)
    if len({reader.GetSize() for reader, _ in slices}) > 1 or np.ptp(affines[:, :3, :2], axis=0).max() > 1e-4:
        raise FieldError("series: expected slices of one size and direction, found several")
    if count > 1:
        affine[:3, 2] = (places[-1] - places[0]) / (count - 1)
        off = np.linalg.norm(places - np.linspace(places[0], places[-1], count), axis=1)
        if off.max() >= np.linalg.norm(affine[:3, 2]) / 4:
            raise FieldError(f"series: expected slices at even distances, found one {off.max():.4g} mm off its place")
    voxels = np.concatenate([SimpleITK.GetArrayFromImage(reader.Execute()) for reader, _ in slices])
    if len(voxels) != count:
        raise FieldError(f"imgs: expected one slice in each file, found {len(voxels)} in {count}")
    return voxels.T, affine


def _open(path: Path, series: int | None = None):
    """Open a volume: its numbers (I, J, K), of NIfTI not yet in memory, its affine, and nibabel's header or None."""
    header = None
    try:
        with hushed():
            if path.name.lower().endswith(NIFTI):
                voxels, affine, header = _open_nifti(path)
            elif path.is_dir() or is_dicom(path):
                voxels, affine = _open_dicom(path, series)
            else:
                voxels, affine = _open_itk(path)
        shape = (*voxels.shape, 1)[:3]
        is_3d = len(shape) == 3 and math.prod(voxels.shape) == math.prod(shape) > 0
        if not is_3d or voxels.dtype.kind not in "iuf":
            raise FieldError(f"imgs: expected a 3D volume, one number per voxel, found {voxels.dtype}, {voxels.shape}")
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            raise FieldError(f"affine: expected three independent axes, found {affine[:3, :3].tolist()}")
        # Reshaped nibabel would open the file anew for each slab.
        return voxels if voxels.shape == shape else np.asarray(voxels).reshape(shape), affine, header
    except ImportError as error:
        line = f"file: expected the package {error.name} for it, found none: pip install {error.name}"
    except FieldError as error:
        line = error
    except Exception as error:                               # the libraries have many, ITK's are of many lines
        reason = "" if isinstance(error, RuntimeError) else f" ({first_line(error)})"
        line = f"file: expected a volume, found it unreadable{reason}"
    raise ValueError(f"{path.name}: {line}")


def load_volume(path, axis: str = "axial", window: tuple[float, float] | None = None,
                series: int | None = None) -> tuple[np.ndarray, Grid, str]:
    """Read a volume as uint8 slices (D, H, W), with their Grid and words that say how intensities were mapped.

    `path` is a file or a folder of DICOM files, `axis` a key of AXES, `window` (level, width), `series` which of a
    DICOM folder's, from 1. ValueError if the file is absent or damaged or holds no volume, or a series has gaps.
    """
    voxels, affine, header = _open(Path(path), series)
    grid = Grid(voxels.shape, affine, axis, header)
    step = -(-math.prod(grid.shape) // SAMPLE)
    sample = [np.asarray(voxels[..., k]).ravel()[k % step::step].copy() for k in range(grid.shape[2])]
    low, high, text = intensity_range(np.concatenate(sample), window)
    return grid.to_slices(voxels, np.uint8, lambda slab: to_uint8(slab, low, high)), grid, text


def load_labels(path: Path, grid: Grid) -> np.ndarray:
    """Read a mask that lies on the voxel grid of an image as uint16 labels (D, H, W) of that image's slices.

    ValueError if the file is absent or damaged, its grid is another (half a voxel off), or its values are no labels.
    """
    voxels, affine, _ = _open(path)
    if voxels.shape != grid.shape:
        raise ValueError(f"{path.name}: gts: expected the image's shape {grid.shape}, found {voxels.shape}")
    distance = np.linalg.norm(np.abs(affine - grid.affine)[:3] @ [*grid.shape, 1])      # no corner is farther off
    if distance >= 0.5 * grid.spacing.min():
        raise ValueError(f"{path.name}: gts: expected the image's affine, found one up to {distance:.1f} mm off")
    return grid.to_slices(voxels, np.uint16, lambda slab: whole_numbers(slab, path.name))


def save_labels(path, segs: np.ndarray, grid: Grid) -> None:
    """Write labels (D, H, W), uint8 or uint16, on a file's own grid, as NIfTI, NRRD or MetaImage.

    Of the header only geometry is kept: a patient's name may stand there. NRRD gets 3D Slicer's names and colours.
    """
    array = grid.to_file(segs)
    with whole_file(path) as temporary:
        if grid.header is None:
            _save_itk(temporary, array, grid.affine)
            return
        import nibabel
        kind = nibabel.Nifti2Image if isinstance(grid.header, nibabel.Nifti2Header) else nibabel.Nifti1Image
        image = kind(array, None)                        # without an affine of ours, the two of the header count
        for field in GEOMETRY:
            image.header[field] = grid.header[field]
        nibabel.save(image, temporary)


def _save_itk(path: Path, labels: np.ndarray, affine: np.ndarray) -> None:
    import SimpleITK
    image, affine = SimpleITK.GetImageFromArray(labels.T), LPS @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing)
    image.SetDirection((affine[:3, :3] / spacing).ravel())
    image.SetOrigin(affine[:3, 3])
    if path.suffix == ".nrrd":
        extent = " ".join(f"0 {n - 1}" for n in labels.shape)
        for k, colour in enumerate(colours(int(labels.max()) + 1)[1:]):
            keys = {"ID": f"object_{k + 1}", "Name": f"object {k + 1}", "LabelValue": k + 1, "Layer": 0,
                    "Color": " ".join(map(str, colour / 255)), "Extent": extent}
            for key, value in keys.items():
                image.SetMetaData(f"Segment{k}_{key}", str(value))
    SimpleITK.WriteImage(image, str(path), True)
