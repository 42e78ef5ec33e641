"""The one reader of NPZ files: cases with `imgs`, `boxes`, `gts` and `spacing`, and masks with `segs`.

Inference, training, evaluation and the baselines all read through this module and so accept and refuse the same
files. Everything wrong with a file becomes a ValueError of one line, "<file name>: <field>: expected …, found …".
Arrays are streamed out of the zip archive in small pieces, so a volume is only ever held as uint8, whatever type it
was saved in, and a header that promises more than the file holds is refused before anything is allocated.
"""
import math
import os
import re
import struct
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import first_line, whole_file

FIELDS = ("imgs", "boxes", "gts", "spacing", "segs")  # whatever else a file holds is not looked at
PIECE = 1 << 20                                       # numbers streamed at once
LARGEST = 16 << 30                                    # bytes of one array; far above any scan
PREFIX = re.compile(r"([23])D(?:Box)?_")              # the challenge's file names: 2D_, 2DBox_, 3D_ or 3DBox_
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, OverflowError, KeyError, MemoryError,
              zipfile.BadZipFile, zlib.error, struct.error)


class FieldError(ValueError):
    """A fault of one field, "<field>: expected …, found …", before the file's name is put in front."""


@dataclass
class Case:
    """One case as its file holds it, checked.

    `name` is the file's name and `warnings` are lines for the user. A 2D case has an `image`, uint8 (H, W, 3) RGB; a
    3D case has a `volume`, uint8 (D, H, W) or (D, H, W, 3). `boxes` are float64 (N, 4), x0 y0 x1 y1, or (N, 6),
    x0 y0 z0 x1 y1 z1, in pixels counted from 0, inclusive, inside the image. `gts` are labels of the image's size,
    uint8 or uint16. `spacing` is float64 (3,), the mm between voxels along (z, y, x). What was not asked for is None.

    The other fields serve users' own files: `points` float64 (P, 2), x y, with `point_labels` (P,), 1 on the object
    and 0 beside it; `drawn_slice` int (N,), the slice of a volume that each box was drawn on; `intensity`, how
    numbers became 0–255, in words; `grid`, the place of a NIfTI file's voxels.
    """
    name: str
    modality: str
    image: np.ndarray | None = None
    volume: np.ndarray | None = None
    boxes: np.ndarray | None = None
    gts: np.ndarray | None = None
    spacing: np.ndarray | None = None
    warnings: list[str] = field(default_factory=list)
    points: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    drawn_slice: np.ndarray | None = None
    start: np.ndarray | None = None
    intensity: str | None = None
    grid: object = None

    @property
    def is_3d(self) -> bool:
        return self.volume is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (D, H, W)."""
        return self.volume.shape[:3] if self.is_3d else self.image.shape[:2]


@dataclass(frozen=True)
class Header:
    """One case as the headers in its file describe it: `name` without ending, `shape` of `imgs` with its channels."""
    path: Path
    name: str
    modality: str
    shape: tuple[int, ...]
    is_3d: bool
    has_gts: bool


# --------------------------------------------------------------------------------------------------------- names

def list_cases(path) -> list[Path]:
    """Return the NPZ files of a folder and its subfolders, sorted, or the one file itself. ValueError for none."""
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise ValueError(f"{path}: expected a folder or an .npz file")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder or an .npz file, found nothing of that name")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ValueError(f"{path}: no permission to read this folder")
    # Hidden files are half-written outputs, of ours or of a copying tool.
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() == ".npz" and not p.name.startswith(".") and p.is_file())
    if not found:
        raise ValueError(f"{path}: expected .npz files in this folder, found none")
    return found


def modality_of(name) -> str:
    """Return "CT" for "2DBox_CT_x_1.npz" or "3D_CT_y.npz"; for other names that of the folder, else "unknown"."""
    path = Path(name)
    match = re.match(PREFIX.pattern + "([^_.]+)", path.name)
    return match[2] if match else path.parent.name or "unknown"


def source_of(name) -> str:
    """Return modality and data set, "CT STS" for "3D_CT_STS_004.npz"; the modality alone for names with fewer parts."""
    match = re.match(PREFIX.pattern + "([^_.]+)_([^_.]+)_", Path(name).name)
    return f"{match[2]} {match[3]}" if match else modality_of(name)


# ------------------------------------------------------------------------------------------------------- reading

def read_case(path, need_boxes: bool = True, need_gts: bool = False, z_exclusive: bool = False) -> Case:
    """Read and check one case.

    Args:
        path: an NPZ file.
        need_boxes, need_gts: read those fields and insist on them.
        z_exclusive: the file's z_max is the slice after the last one, as the authors of MedficientSAM read it. In
            the Case it is the last slice either way.

    Raises:
        ValueError: one line about whatever is wrong with the file.
    """
    path = Path(path)
    with _open(path) as arrays:
        _require(arrays, "imgs", *need_boxes * ["boxes"], *need_gts * ["gts"])
        header = _describe(path, arrays, need_gts)
        case = Case(path.name, header.modality)
        pixels = _read_pixels(arrays["imgs"], case)
        if header.is_3d:
            case.volume = pixels
        else:
            case.image = _to_rgb(pixels)
        if need_boxes:
            _check_columns(arrays["boxes"], 6 if header.is_3d else 4)
            case.boxes, lines = check_boxes(arrays["boxes"].read(np.float64), case.shape, case.name, z_exclusive)
            case.warnings += lines
        if need_gts:
            case.gts = _read_labels(arrays["gts"], case.shape)
        if header.is_3d and "spacing" in arrays:
            try:
                case.spacing = _read_spacing(arrays["spacing"])
            except FieldError as error:               # it matters only where distances are measured
                case.warnings.append(f"{case.name}: {error}: ignored")
    return case


def read_header(path, need_gts: bool = False) -> Header:
    """Describe one case from the headers in its file alone, with the checks and messages of `read_case`.

    `gts` are checked where there are any. ValueError, one line, for a bad file, or one without `gts` if need_gts.
    """
    path = Path(path)
    with _open(path) as arrays:
        _require(arrays, "imgs", *need_gts * ["gts"])
        return _describe(path, arrays, "gts" in arrays)


def read_labels(path, field: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the labels of one file, which may do without images.

    Args:
        path: an NPZ file.
        field: "gts" or "segs".

    Returns:
        labels: uint8 or uint16, (H, W) or (D, H, W).
        spacing: float64 (3,), mm along (z, y, x) of the `gts` of a volume, None where the file holds none.

    Raises:
        ValueError: one line about whatever is wrong with the file.
    """
    path = Path(path)
    with _open(path) as arrays:
        _require(arrays, field)
        shape = arrays[field].shape
        if "imgs" in arrays:
            header = _describe(path, arrays, False)
            size = header.shape[:2 + header.is_3d]
        else:
            prefix = PREFIX.match(path.name)
            size = shape[:2] if shape[2:] == (1,) else shape
            axes = 2 + (prefix[1] == "3" if prefix else len(size) == 3)
            if len(size) != axes or 0 in size:
                wanted = "(D, H, W) of a volume" if axes == 3 else "(H, W) of an image"
                raise FieldError(f"{field}: expected shape {wanted}, found {shape}")
        labels = _read_labels(arrays[field], size)
        has_spacing = field == "gts" and len(size) == 3 and "spacing" in arrays
        return labels, _read_spacing(arrays["spacing"]) if has_spacing else None


@contextmanager
def _open(path: Path):
    """Give {name: _Array} of an NPZ file and turn what goes wrong in the block into a ValueError of one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()
                       if info.filename.endswith(".npy")}
            yield {name: _Array(archive, members[name], name) for name in FIELDS if name in members}
    except FieldError as error:
        raise ValueError(f"{path.name}: {error}") from None
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ValueError(f"{path.name}: file: expected a whole NPZ archive, found it unreadable ({reason})") from None


def _require(arrays, *names: str) -> None:
    for name in names:
        if name not in arrays:
            raise FieldError(f"{name}: expected this array, found only {', '.join(arrays) or 'an empty archive'}")


class _Array:
    """One array of an open NPZ file: `shape` and `dtype` from its header, its numbers in pieces when they are read."""

    def __init__(self, archive, info, name: str):
        self.archive, self.info, self.name = archive, info, name
        with archive.open(info) as stream:
            try:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                self.shape, self.fortran, self.dtype = read(stream)
            except Exception as error:       # numpy evaluates the header, and damage there raises whatever it hits
                raise FieldError(f"{name}: expected an array, found a damaged header ({first_line(error)})") from None
            self.offset = stream.tell()
        if self.dtype.hasobject:
            raise FieldError(f"{name}: expected numbers, found Python objects, which are never loaded")
        if any(not isinstance(n, int) or n < 0 for n in self.shape):
            raise FieldError(f"{name}: expected a shape, found {self.shape}")
        claimed = math.prod(self.shape) * self.dtype.itemsize
        # Deflate shrinks at most 1032-fold, so the compressed size bounds what a forged directory may promise.
        room = max(0, min(info.file_size - self.offset, 1100 * info.compress_size, LARGEST))
        if claimed > room:
            raise FieldError(f"{name}: expected the {claimed:,} bytes that its header {self.dtype} {self.shape} "
                             f"announces, found room for {room:,}")

    def pieces(self):
        """Yield (position, numbers) in the order of the file."""
        count = math.prod(self.shape)
        with self.archive.open(self.info) as stream:
            stream.seek(self.offset)
            for start in range(0, count, PIECE):
                wanted = min(PIECE, count - start) * self.dtype.itemsize
                data = stream.read(wanted)
                if len(data) < wanted:
                    raise EOFError(f"{self.name} ends early")
                yield start, np.frombuffer(data, self.dtype)

    def read(self, dtype, scale: float | None = None) -> np.ndarray:
        """Return the whole array as `dtype`, C-contiguous; with a scale, multiplied by it and rounded."""
        array = np.empty(math.prod(self.shape), dtype)
        for start, piece in self.pieces():
            array[start:start + len(piece)] = piece if scale is None else piece.astype(np.float64) * scale + 0.5
        return np.ascontiguousarray(array.reshape(self.shape, order="F" if self.fortran else "C"))

    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest number; both are NaN if there is one among them."""
        low, high = math.inf, -math.inf
        for _, piece in self.pieces():               # np.minimum keeps a NaN, Python's min loses it
            low, high = np.minimum(low, piece.min()), np.maximum(high, piece.max())
        return float(low), float(high)


# -------------------------------------------------------------------------------------------------------- fields

def _describe(path: Path, arrays: dict[str, _Array], with_gts: bool) -> Header:
    """What the headers say of a case, after checking those of `imgs` and, if asked, `gts`."""
    imgs, gts, boxes = (arrays.get(name) for name in ("imgs", "gts", "boxes"))
    shape, prefix = imgs.shape, PREFIX.match(path.name)
    has_channels = shape[-1:] in ((1,), (3,), (4,))
    if prefix:
        is_3d = prefix[1] == "3"
    elif len(shape) == 3 and has_channels:
        # (5, 9, 3) is a colour image or a narrow volume: boxes or masks tell, else colour is likelier.
        is_3d = bool(boxes and boxes.shape[-1:] == (6,) or gts and gts.shape == shape and shape[-1] > 1)
    else:
        is_3d = len(shape) >= 3
    if is_3d:
        fits, wanted = len(shape) == 3 or len(shape) == 4 and shape[-1] == 3, "(D, H, W) or (D, H, W, 3) of a volume"
    else:
        fits, wanted = len(shape) == 2 or len(shape) == 3 and has_channels, "(H, W) or (H, W, 3) of an image"
    if not fits or 0 in shape:
        raise FieldError(f"imgs: expected shape {wanted}, found {shape}")
    if imgs.dtype.kind not in "iuf":
        raise FieldError(f"imgs: expected uint8 or numbers within 0-255, found {imgs.dtype}")
    if with_gts:
        _check_labels(gts, shape[:2 + is_3d])
    return Header(path, path.stem, modality_of(path), shape, is_3d, gts is not None)


def _read_pixels(imgs: _Array, case: Case) -> np.ndarray:
    """`imgs` as uint8; other types if their numbers lie within 0–255 (floats are rounded; 0–1 is spread to 0–255)."""
    if imgs.dtype == np.uint8:
        return imgs.read(np.uint8)
    low, high = imgs.limits()
    if not (low >= 0 and high <= 255):
        found = "with NaN" if math.isnan(low) else f"from {low:g} to {high:g}"
        raise FieldError(f"imgs: expected uint8 or numbers within 0-255, found {imgs.dtype} {found}")
    if imgs.dtype.kind != "f":
        return imgs.read(np.uint8)
    scale = 255.0 if 0 < high <= 1 else 1.0
    if scale > 1:
        case.warnings.append(f"{case.name}: imgs: expected numbers within 0-255, found {low:g} to {high:g}: "
                             "multiplied by 255")
    return imgs.read(np.uint8, scale)


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3), or (H, W, 4), whose alpha is dropped, as (H, W, 3)."""
    if image.ndim == 2:
        image = image[..., None]
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image[..., :3])


def _check_labels(array: _Array, size: tuple[int, ...]) -> None:
    """Integers of the image's size (H, W) or (D, H, W); an image's may have a last axis of one, as images may."""
    if array.dtype.kind not in "iub":
        raise FieldError(f"{array.name}: expected integer labels, found {array.dtype}")
    if array.shape != size and not (len(size) == 2 and array.shape == (*size, 1)):
        raise FieldError(f"{array.name}: expected shape {size} of the {'volume' if len(size) == 3 else 'image'}, "
                         f"found {array.shape}")


def _read_labels(array: _Array, size: tuple[int, ...]) -> np.ndarray:
    """Labels as uint8, or uint16 where one is above 255."""
    _check_labels(array, size)
    low, high = (0, 255) if array.dtype == np.uint8 else array.limits()
    if low < 0 or high > 65535:
        raise FieldError(f"{array.name}: expected labels 0 to 65535, found {low:g} to {high:g}")
    return array.read(np.uint8 if high < 256 else np.uint16).reshape(size)


def _read_spacing(array: _Array) -> np.ndarray:
    found = f"{array.dtype} {array.shape}"
    if array.shape == (3,) and array.dtype.kind in "iuf":
        spacing = array.read(np.float64)
        if np.isfinite(spacing).all() and (spacing > 0).all():
            return spacing
        found = _text(spacing)
    raise FieldError(f"spacing: expected three positive numbers (z, y, x in mm), found {found}")


# ------------------------------------------------------------------------------------------------------- prompts

def check_boxes(boxes, shape: tuple[int, ...], name: str, z_exclusive: bool = False) -> tuple[np.ndarray, list[str]]:
    """Check boxes and clip them to the image.

    Args:
        boxes: numbers (N, 4), x0 y0 x1 y1, on an image, or (N, 6), x0 y0 z0 x1 y1 z1, on a volume; a single box may
            come without its first axis, and no box as any empty array.
        shape: (H, W) or (D, H, W).
        name: what the warnings start with.
        z_exclusive: see `read_case`.

    Returns:
        boxes: float64 (N, 4) or (N, 6) inside the image, z whole and inclusive.
        warnings: lines about boxes that reached over the border.

    Raises:
        ValueError: "boxes: expected …, found …" for another shape, numbers that are not finite, an upper corner below
            the lower, and boxes wholly outside.
    """
    half, boxes, lines = len(shape), np.asarray(boxes), []
    _check_columns(boxes, 2 * half)
    boxes = boxes.astype(np.float64).reshape(-1, 2 * half)
    limits = np.array(shape[::-1], np.float64) - 1                                # x, y[, z] of the last pixel
    size = "×".join(map(str, shape[::-1])) + (" volume" if half == 3 else " image")
    _refuse(boxes, ~np.isfinite(boxes).all(1), "finite numbers")
    if half == 3:
        boxes[:, [2, 5]] = np.rint(boxes[:, [2, 5]])
    _refuse(boxes, (boxes[:, :half] > boxes[:, half:]).any(1), "the lower corner before the upper")
    if half == 3 and z_exclusive:
        one = boxes[:, 5] == boxes[:, 2]
        boxes[:, 5] = np.maximum(boxes[:, 5] - 1, boxes[:, 2])
        if one.any():
            lines.append(f"{name}: boxes: expected z_min < z_max in a half-open range, found them equal in "
                         f"{one.sum()} of {len(boxes)}: taken as one slice")
    lower, upper = boxes[:, :half], boxes[:, half:]
    _refuse(boxes, ((upper < 0) | (lower > limits)).any(1), f"a box that touches the {size}, counted from 0")
    # The upper border of the last pixel, W or H, is a usual way to write it and no mistake; of slices it is one.
    slack = np.array([1.0, 1.0, 0.0])[:half]
    over = ((lower < 0) | (upper > limits + slack)).any(1)
    if over.any():
        k = int(over.argmax())
        lines.append(f"{name}: boxes: expected them inside the {size}, found {over.sum()} of {len(boxes)} reaching "
                     f"over its border (first: box {k + 1}, {_text(boxes[k])}): clipped")
    return np.hstack([lower.clip(0, limits), upper.clip(0, limits)]), lines


def check_points(points, labels, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Check points on an image (H, W) and their labels.

    Args:
        points: numbers (P, 2), x y, inside the image.
        labels: (P,), 1 or True on the object, 0 or False beside it.

    Returns:
        points float64 (P, 2) and labels int64 (P,).

    Raises:
        ValueError: "points: expected …, found …" or "point labels: …".
    """
    points, labels = np.asarray(points), np.asarray(labels)
    if points.dtype.kind not in "iuf" or points.ndim != 2 or points.shape[1] != 2:
        raise FieldError(f"points: expected numbers of shape (P, 2), x y, found {points.dtype} {points.shape}")
    inside = ((points >= 0) & (points < shape[::-1])).all(1)                      # NaN is outside too
    if not inside.all():
        raise FieldError(f"points: expected them inside the {shape[1]}×{shape[0]} image, "
                         f"found {_text(points[inside.argmin()])}")
    if labels.shape != (len(points),) or not np.isin(labels, (0, 1)).all():
        raise FieldError(f"point labels: expected {len(points)} of 0 or 1, found {labels.dtype} {labels.shape}")
    return points.astype(np.float64), labels.astype(np.int64)


def _check_columns(boxes: np.ndarray | _Array, columns: int) -> None:
    shape, dtype = boxes.shape, boxes.dtype
    if dtype.kind not in "iuf":
        raise FieldError(f"boxes: expected numbers, found {dtype}")
    if 0 in shape and len(shape) <= 2:
        return
    if len(shape) not in (1, 2) or shape[-1] != columns:
        order = "x0 y0 z0 x1 y1 z1 of a volume" if columns == 6 else "x0 y0 x1 y1 of an image"
        raise FieldError(f"boxes: expected shape (N, {columns}), {order}, found {shape}")
    if len(shape) == 2 and shape[0] > 65535:
        raise FieldError(f"boxes: expected at most 65535 boxes, found {shape[0]}")


def _refuse(boxes: np.ndarray, bad: np.ndarray, wanted: str) -> None:
    if bad.any():
        k = int(bad.argmax())
        raise FieldError(f"boxes: expected {wanted}, found box {k + 1} of {len(boxes)}: {_text(boxes[k])}")


def _text(numbers: np.ndarray) -> str:
    return " ".join(f"{x:g}" for x in numbers)


# ------------------------------------------------------------------------------------------------------- writing

def write_segs(path, segs: np.ndarray, **extra) -> None:
    """Write labels (H, W) or (D, H, W) as `segs`, uint8 or, where a label is above 255, uint16, with `extra` arrays.

    The file is whole or absent. OSError where it cannot be written.
    """
    if segs.dtype not in (np.uint8, np.uint16):
        segs = segs.astype(np.uint16 if segs.size and segs.max() > 255 else np.uint8)
    write_npz(path, segs=segs, **extra)


def write_npz(path, **arrays) -> None:
    """Write a compressed NPZ file whole or not at all, in a folder made if need be."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
