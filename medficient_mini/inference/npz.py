"""The one reader of NPZ files: cases with `imgs`, `boxes`, `gts` and `spacing`, and masks with `segs`.

What is wrong with a file is a ValueError of one line, "<file name>: <field>: expected …, found …". Arrays are streamed,
so a volume is only ever held as uint8, whatever type it was saved in, and a header that promises more than the file
holds is refused before anything is allocated.
"""
import math
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy import ndarray
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from ..files import first_line, list_files, stray_kind, whole_file
from .boxes import FieldError, as_text, check_boxes

FIELDS = ("imgs", "boxes", "gts", "spacing", "segs")                # whatever else a file holds is not looked at
PIECE = 1 << 20                                                     # numbers streamed at once
NAME = re.compile(r"([23])D(?:Box)?_([^_.]+)(?:_([^_.]+)_)?")       # dimension, modality, data set


@dataclass(eq=False)
class Case:
    """One checked case; what was not asked for is None. The fields from `points` on are of users' own files alone."""
    path: Path                                  # of the file
    shape: tuple[int, ...]                      # (H, W) of an image, (D, H, W) of a volume
    has_gts: bool = False                       # whether the file holds labels
    pixels: ndarray | None = None               # uint8 (H, W, 3) RGB of an image, (D, H, W) or (D, H, W, 3) of a volume
    boxes: ndarray | None = None                # float64 (N, 4) or (N, 6), as `check_boxes` returns them
    gts: ndarray | None = None                  # labels, uint8 or uint16, of `shape`
    spacing: ndarray | None = None              # float64 (3,), mm between voxels along (z, y, x)
    warnings: list[str] = field(default_factory=list)
    points: ndarray | None = None               # float64 (P, 2), x y
    point_labels: ndarray | None = None         # (P,), 1 on the object, 0 beside it
    drawn_slice: ndarray | None = None          # int (N,), the slice of a volume that each box was drawn on
    intensity: str | None = None                # how numbers became 0–255, in words
    grid: object = None                         # where a NIfTI file's voxels lie

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @cached_property
    def modality(self) -> str:
        """As the file's name or folder has it, see `modality_of`."""
        return modality_of(self.path)

    @property
    def is_3d(self) -> bool:
        return len(self.shape) == 3


def list_cases(path) -> list[Path]:
    """Return the NPZ files of a folder and its subfolders, sorted, or the one file itself. ValueError for none."""
    return list_files(path, (".npz",))


def modality_of(name, with_source: bool = False) -> str:
    """Return "CT" for "3D_CT_STS_004.npz", "CT STS" with the data set; else the folder's name, else "unknown"."""
    path = Path(name)
    match = NAME.match(path.name)
    if not match:
        return path.parent.name or "unknown"
    return " ".join(match.group(2, 3)) if with_source and match[3] else match[2]


def read_case(path, need_boxes: bool = True, need_gts: bool = False, z_exclusive: bool = False) -> Case:
    """Read and check one case; ValueError, one line, if it is bad. `z_exclusive` is as in `check_boxes`."""
    with _open(path, "gts" * need_gts, "imgs", *need_boxes * ["boxes"], *need_gts * ["gts"]) as (arrays, case):
        case.pixels = _read_pixels(arrays["imgs"], case)
        if not case.is_3d:
            rgb = case.pixels.reshape(*case.shape, -1)[..., :3]                # or one channel; no alpha
            case.pixels = rgb.repeat(3 // rgb.shape[2], axis=2)
        if need_boxes:
            boxes = arrays["boxes"].read(np.float64)
            case.boxes, remarks = check_boxes(boxes, case.shape, case.name, z_exclusive)
            case.warnings += remarks
        if need_gts:
            case.gts = _read_labels(arrays["gts"], case)
        if case.is_3d and "spacing" in arrays:
            try:
                case.spacing = _read_spacing(arrays["spacing"])
            except FieldError as error:                                        # only distances need it
                case.warnings.append(f"{case.name}: {error}: ignored")
    return case


def read_header(path, need_gts: bool = False) -> Case:
    """Describe one case from the headers in its file alone, `gts` too if there are any. ValueError as `read_case`."""
    with _open(path, "gts", "imgs", *need_gts * ["gts"]) as (_, case):
        return case


def read_labels(path, field: str) -> tuple[ndarray, ndarray | None]:
    """Read labels, "gts" or "segs", uint8 or uint16, and the spacing of a volume's `gts`, else None."""
    with _open(path, field, field) as (arrays, case):
        has_spacing = field == "gts" and case.is_3d and "spacing" in arrays
        return _read_labels(arrays[field], case), _read_spacing(arrays["spacing"]) if has_spacing else None


@contextmanager
def _open(path, labels: str, *needed: str):
    """Give {name: _Array} of an NPZ file and its Case without arrays; what goes wrong in the block is a ValueError."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _Array(archive, name) for name in FIELDS if f"{name}.npy" in archive.namelist()}
            for name in needed:
                if name not in arrays:
                    found = ", ".join(arrays) or "an empty archive"
                    raise FieldError(f"{name}: expected this array, found only {found}")
            yield arrays, _describe(path, arrays, labels)
    except FieldError as error:
        raise ValueError(f"{path.name}: {error}") from None
    except Exception as error:               # zipfile, zlib and numpy raise a dozen kinds for damage
        reason = stray_kind(path) or f"it unreadable ({first_line(error)})"
        raise ValueError(f"{path.name}: file: expected a whole NPZ archive, found {reason}") from None


class _Array:
    """One array of an open NPZ file: shape and dtype from its header, its numbers in pieces when they are read."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self.archive, self.name, member = archive, name, archive.getinfo(f"{name}.npy")
        with archive.open(member) as stream:
            read = read_array_header_1_0 if read_magic(stream) == (1, 0) else read_array_header_2_0
            self.shape, self.fortran, self.dtype = read(stream)
            self.offset = stream.tell()
        self.count = math.prod(self.shape)
        if self.dtype.hasobject:
            raise FieldError(f"{name}: expected numbers, found Python objects, which are never loaded")
        claimed = self.count * self.dtype.itemsize
        # Deflate shrinks at most 1032-fold, so the compressed size bounds what a forged directory may promise.
        if claimed > min(member.file_size - self.offset, 1100 * member.compress_size):
            raise FieldError(f"{name}: expected the {claimed:,} bytes of {self.dtype} {self.shape}, found fewer")

    def pieces(self):
        """Yield the numbers in the order of the file."""
        if self.dtype.kind not in "biuf":
            raise FieldError(f"{self.name}: expected numbers, found {self.dtype}")
        with self.archive.open(f"{self.name}.npy") as stream:
            stream.read(self.offset)         # not seek, after which newer Pythons check no checksum
            for start in range(0, self.count, PIECE):
                numbers = min(PIECE, self.count - start)
                yield np.frombuffer(stream.read(numbers * self.dtype.itemsize), self.dtype, numbers)

    def read(self, dtype, scale: float | None = None) -> ndarray:
        """Return the whole array as `dtype`, C-contiguous; with a scale, multiplied by it, rounded, at most 255."""
        array = np.empty(self.count, dtype)
        for start, piece in zip(range(0, self.count, PIECE), self.pieces()):
            array[start:start + PIECE] = piece if scale is None else (piece.astype(float) * scale + 0.5).clip(max=255)
        return np.asarray(array.reshape(self.shape, order="F" if self.fortran else "C"), order="C")

    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest number, NaN if there is one, and without a look 0 and 255 of uint8."""
        if self.dtype == np.uint8:
            return 0, 255
        extremes = np.array([(piece.min(), piece.max()) for piece in self.pieces()])
        return extremes.min(), extremes.max()


def _describe(path: Path, arrays: dict[str, _Array], labels: str) -> Case:
    """Check the headers of `imgs` and of the labels of that name, where there are any; either may be absent."""
    targets = arrays.get(labels)
    pixels = arrays.get("imgs", targets)
    shape, match = pixels.shape, NAME.match(path.name)
    if match:
        is_3d = match[1] == "3"
    elif len(shape) == 3 and shape[-1] in (1, 3, 4):
        # (5, 9, 3) is a colour image or a narrow volume: boxes or masks tell, else colour is likelier.
        boxes, gts = arrays.get("boxes"), arrays.get("gts", targets)
        is_3d = bool(boxes and boxes.shape[-1:] == (6,) or gts and gts.shape == shape and shape[-1] > 1)
    else:
        is_3d = len(shape) >= 3
    axes, channels, wanted = (3, {3}, "(D, H, W[, 3]) of a volume") if is_3d else \
        (2, {1, 3, 4}, "(H, W[, 3]) of an image")                    # grey, RGB, RGB with alpha
    if len(shape) - axes not in (0, 1) or not channels.issuperset(shape[axes:]) or min(shape) < 1:
        raise FieldError(f"{pixels.name}: expected shape {wanted}, found {shape}")
    if pixels.name == "imgs" and pixels.dtype.kind not in "iuf":
        raise FieldError(f"imgs: expected uint8 or numbers within 0-255, found {pixels.dtype}")
    case = Case(path, shape[:axes], "gts" in arrays)
    if targets and targets.dtype.kind not in "iub":
        raise FieldError(f"{labels}: expected integer labels, found {targets.dtype}")
    # An image's labels may have a last axis of one, as images may.
    if targets and targets.shape != case.shape and (is_3d or targets.shape != (*case.shape, 1)):
        raise FieldError(f"{labels}: expected the size of {pixels.name}, {case.shape}, found {targets.shape}")
    return case


def _read_pixels(imgs: _Array, case: Case) -> ndarray:
    """Read `imgs` as uint8: numbers within 0–255, floats rounded, and 0–1 spread to 0–255 with a warning."""
    low, high = imgs.limits()
    if not (low >= 0 and high <= 255):       # NaN is neither
        raise FieldError(f"imgs: expected uint8 or numbers within 0-255, found {imgs.dtype} from {low:g} to {high:g}")
    scale = 1.0 if imgs.dtype.kind == "f" else None
    if scale and 0 < high <= 1.01:           # rounding may have ended above 1
        scale = 255.0
        case.warnings.append(f"{case.name}: imgs: expected numbers within 0-255, found {low:g} to {high:g}: "
                             "multiplied by 255")
    return imgs.read(np.uint8, scale)


def _read_labels(array: _Array, case: Case) -> ndarray:
    """Read labels as uint8, or uint16 where one is above 255."""
    low, high = array.limits()
    if low < 0 or high > 65535:
        raise FieldError(f"{array.name}: expected labels 0 to 65535, found {low:g} to {high:g}")
    return array.read(np.uint8 if high < 256 else np.uint16).reshape(case.shape)


def _read_spacing(array: _Array) -> ndarray:
    """Read the spacing, if it is one."""
    spacing = array.read(np.float64)
    if spacing.shape != (3,) or not ((spacing > 0) & (spacing < np.inf)).all():
        raise FieldError(f"spacing: expected three positive numbers (z, y, x in mm), found {as_text(spacing.flat[:4])}")
    return spacing


def write_segs(path, segs: ndarray, **extra) -> None:
    """Write labels (H, W) or (D, H, W) as `segs`, uint8, or uint16 where one is above 255, with `extra` arrays."""
    write_npz(path, segs=segs.astype(np.min_scalar_type(int(segs.max(initial=0))), copy=False), **extra)


def write_npz(path, **arrays) -> None:
    """Write a compressed NPZ file whole or not at all, in a folder made if need be. OSError where that fails."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
