"""A challenge case: one NPZ file with `imgs`, `boxes` and sometimes `gts` and `spacing`; and the NPZ with its `segs`.

Everything wrong with a file becomes a ValueError of one line, "<file name>: <field>: expected …, found …". Arrays are
streamed out of the zip in small pieces, so a volume is only ever held as uint8, whatever type it was saved in, and a
header that promises more than the file holds is refused before anything is allocated.
"""
import math
import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import whole_file

PIECE = 1 << 20                      # numbers streamed at once
FIELDS = ("imgs", "boxes", "gts", "spacing")          # whatever else a file holds is not looked at
LARGEST = 16 << 30                   # bytes of one array; far above any scan, far below what a forged header claims
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, OverflowError, KeyError,
              zipfile.BadZipFile, zlib.error, struct.error)
Header = tuple[tuple[int, ...], bool, np.dtype]       # shape, Fortran order, dtype


@dataclass
class Case:
    """What one NPZ file holds, checked.

    name: file name. image: uint8 (H, W, 3) RGB of a 2D case, else None. volume: uint8 (D, H, W) or (D, H, W, 3) of a
    3D case, else None. boxes: float64 (N, 4) x0 y0 x1 y1, or (N, 6) x0 y0 z0 x1 y1 z1 for a volume, in pixels,
    zero-based, inclusive, inside the image; None if not asked for. gts: uint8 or uint16 labels of the image's size;
    None if not asked for. spacing: float64 (3,) mm along the axes (z, y, x) of a volume, or None. warnings: lines
    for the user. The rest only for users' own files (prompts.py): points float64 (P, 2) x y with point_labels (P,)
    1 foreground or 0 background; start int (N,), the slices of a volume that its boxes were drawn on; intensity, how
    numbers became 0–255; grid, the formats.Grid of a NIfTI file.
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


def list_cases(path) -> list[Path]:
    """The NPZ files of a folder and its subfolders, sorted, or the one file itself. ValueError if there are none."""
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
    """"2DBox_CT_x_1.npz", "3D_MR_y.npz" -> "CT", "MR"; other names: that of the folder, else "unknown"."""
    path = Path(name)
    match = re.match(r"[23]D(?:Box)?_([^_.]+)", path.name)
    return match[1] if match else path.parent.name or "unknown"


def source_of(name) -> str:
    """"3D_CT_STS_004.npz" -> "CT STS": modality and data set; the modality alone where the name has no more parts."""
    match = re.match(r"[23]D(?:Box)?_([^_.]+)_([^_.]+)_", Path(name).name)
    return f"{match[1]} {match[2]}" if match else modality_of(name)


def read_case(path, need_boxes: bool = True, need_gts: bool = False, z_exclusive: bool = False) -> Case:
    """Read and check a case. ValueError with one line for whatever is wrong with it.

    need_boxes, need_gts: read those fields and insist on them. z_exclusive: z_max of the file's boxes is the slice
    after the last (the MedficientSAM authors' reading); in the Case it is the last slice either way.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path, need_boxes, need_gts, z_exclusive)
    except _Wrong as error:
        raise ValueError(f"{path.name}: {error}") from None
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path.name}: file: expected a whole NPZ archive, found it unreadable ({reason})") from None


def first_line(error) -> str:
    """The first line of an error's message, its type where it has none: what a user is shown."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Wrong(ValueError):
    """"<field>: expected …, found …", before the file name is put in front."""


def _read(archive, path: Path, need_boxes: bool, need_gts: bool, z_exclusive: bool) -> Case:
    headers = _read_headers(archive)
    for name in ["imgs"] + need_boxes * ["boxes"] + need_gts * ["gts"]:
        if name not in headers:
            raise _Wrong(f"{name}: expected this array, found only {', '.join(headers) or 'an empty archive'}")
    case = Case(path.name, modality_of(path))
    is_3d = _is_volume(path.name, headers)
    pixels = _read_pixels(archive, headers["imgs"], case)
    if is_3d:
        case.volume = pixels
    else:
        case.image = _to_rgb(pixels)
    if need_boxes:
        boxes = _read_boxes(archive, headers["boxes"], is_3d)
        case.boxes, lines = check_boxes(boxes, case.shape, case.name, z_exclusive)
        case.warnings += lines
    if need_gts:
        case.gts = _read_labels(archive, headers["gts"], case)
    if is_3d and "spacing" in headers:
        case.spacing = _read_spacing(archive, headers["spacing"], case, strict=need_gts)
    return case


# --------------------------------------------------------------------------------------------------- NPZ members

def _read_headers(archive) -> dict[str, Header]:
    """The header of each array, after checking that the archive can hold what it announces."""
    headers = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name not in FIELDS or name == info.filename:
            continue
        with archive.open(info) as stream:
            shape, fortran, dtype = _read_header(stream, name)
            held = info.file_size - stream.tell()
        claimed = math.prod(shape) * dtype.itemsize
        # Deflate shrinks at most 1032-fold, so the compressed size bounds what a forged directory may promise.
        if claimed > min(held, 1100 * info.compress_size + 1024, LARGEST):
            raise _Wrong(f"{name}: expected the {claimed:,} bytes that its header {dtype} {shape} announces, "
                         f"found room for {max(0, min(held, 1100 * info.compress_size, LARGEST)):,}")
        headers[name] = shape, fortran, dtype
    return headers


def _read_header(stream, name: str) -> Header:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:       # numpy evaluates the header, and damage there raises whatever it happens to hit
        raise _Wrong(f"{name}: expected an array, found a damaged header ({first_line(error)})") from None
    if dtype.hasobject:
        raise _Wrong(f"{name}: expected numbers, found Python objects, which are never loaded")
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise _Wrong(f"{name}: expected a shape, found {shape}")
    return shape, fortran, dtype


def _pieces(archive, name: str, header: Header):
    """(start, numbers) of one array, in the order of the file."""
    shape, _, dtype = header
    count = math.prod(shape)
    with archive.open(name + ".npy") as stream:
        _read_header(stream, name)
        for start in range(0, count, PIECE):
            wanted = min(PIECE, count - start) * dtype.itemsize
            data = stream.read(wanted)
            if len(data) < wanted:
                raise EOFError(f"{name} ends early")
            yield start, np.frombuffer(data, dtype)


def _fill(archive, name: str, header: Header, dtype, convert=lambda piece: piece) -> np.ndarray:
    """The whole array as `dtype`, C-contiguous, never held in the file's type."""
    shape, fortran, _ = header
    array = np.empty(math.prod(shape), dtype)
    for start, piece in _pieces(archive, name, header):
        array[start:start + len(piece)] = convert(piece)
    return np.ascontiguousarray(array.reshape(shape[::-1]).T) if fortran else array.reshape(shape)


def _limits(archive, name: str, header: Header) -> tuple[float, float]:
    """Smallest and largest number; NaN if there is one."""
    low, high = math.inf, -math.inf
    for _, piece in _pieces(archive, name, header):
        # np.minimum keeps a NaN, Python's min loses it.
        low, high = np.minimum(low, piece.min()), np.maximum(high, piece.max())
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------------- fields

def _is_volume(name: str, headers: dict[str, Header]) -> bool:
    """3D or 2D: by the name's prefix, else by the shapes. ValueError where `imgs` fits neither."""
    shape, columns = headers["imgs"][0], headers.get("boxes", ((0,),))[0][-1:]
    channels = shape[-1] in (1, 3, 4) if shape else False
    prefix = re.match(r"([23])D(?:Box)?_", name)
    if prefix:
        is_3d = prefix[1] == "3"
    elif len(shape) == 3 and channels:
        # (5, 9, 3) is a colour image or a narrow volume: boxes or masks tell, else colour is likelier.
        is_3d = columns == (6,) or len(headers.get("gts", ((),))[0]) == 3
    else:
        is_3d = len(shape) >= 3
    fits = len(shape) == 3 or (len(shape) == 4 and shape[-1] == 3) if is_3d else \
        len(shape) == 2 or (len(shape) == 3 and channels)
    if not fits or min(shape) < 1:
        wanted = "(D, H, W) or (D, H, W, 3) of a volume" if is_3d else "(H, W) or (H, W, 3) of an image"
        raise _Wrong(f"imgs: expected shape {wanted}, found {shape}")
    return is_3d


def _read_pixels(archive, header: Header, case: Case) -> np.ndarray:
    """`imgs` as uint8; other types if their numbers lie within 0–255 (floats rounded; 0–1 is spread to 0–255)."""
    dtype = header[2]
    if dtype == np.uint8:
        return _fill(archive, "imgs", header, np.uint8)
    if dtype.kind not in "iuf":
        raise _Wrong(f"imgs: expected uint8, found {dtype}")
    low, high = _limits(archive, "imgs", header)
    if math.isnan(low) or math.isnan(high):
        raise _Wrong(f"imgs: expected uint8 or numbers within 0-255, found {dtype} with NaN")
    if low < 0 or high > 255:
        raise _Wrong(f"imgs: expected uint8 or numbers within 0-255, found {dtype} from {low:g} to {high:g}")
    if dtype.kind != "f":
        return _fill(archive, "imgs", header, np.uint8)
    scale = 1.0
    if 0 < high <= 1:
        scale = 255.0
        case.warnings.append(f"{case.name}: imgs: expected numbers within 0-255, found {low:g} to {high:g}: multiplied by 255")
    return _fill(archive, "imgs", header, np.uint8, lambda piece: piece.astype(np.float64) * scale + 0.5)


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3), or (H, W, 4) whose alpha is dropped -> (H, W, 3)."""
    if image.ndim == 2:
        image = image[..., None]
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image[..., :3])


def _read_boxes(archive, header: Header, is_3d: bool) -> np.ndarray:
    """`boxes` as float64 (N, 4) or (N, 6); a single box may come without its first axis, none as any empty array."""
    shape, _, dtype = header
    columns = 6 if is_3d else 4
    if dtype.kind not in "iuf":
        raise _Wrong(f"boxes: expected numbers, found {dtype}")
    if 0 in shape and len(shape) <= 2:
        return np.zeros((0, columns))
    if len(shape) not in (1, 2) or shape[-1] != columns:
        order = "x0 y0 z0 x1 y1 z1 of a volume" if is_3d else "x0 y0 x1 y1 of an image"
        raise _Wrong(f"boxes: expected shape (N, {columns}), {order}, found {shape}")
    if len(shape) == 2 and shape[0] > 65535:
        raise _Wrong(f"boxes: expected at most 65535 boxes, found {shape[0]}")
    return _fill(archive, "boxes", header, np.float64).reshape(-1, columns)


def check_boxes(boxes: np.ndarray, shape: tuple[int, ...], name: str, z_exclusive: bool = False
                ) -> tuple[np.ndarray, list[str]]:
    """Boxes float64 (N, 4) or (N, 6) on an image (H, W) or volume (D, H, W) -> the same inside it, z whole and inclusive.

    What reaches over the border is clipped, with a warning line (second value) that starts with `name`. ValueError,
    "boxes: expected …, found …", for numbers that are not finite, an upper corner below the lower, and boxes wholly
    outside.
    """
    half, boxes, lines = len(shape), boxes.copy(), []
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
        lines.append(f"{name}: boxes: expected them inside the {size}, found {over.sum()} of {len(boxes)} reaching over "
                     f"its border (first: box {k + 1}, {_text(boxes[k])}): clipped")
    return np.hstack([lower.clip(0, limits), upper.clip(0, limits)]), lines


def _refuse(boxes: np.ndarray, bad: np.ndarray, wanted: str) -> None:
    if bad.any():
        k = int(bad.argmax())
        raise _Wrong(f"boxes: expected {wanted}, found box {k + 1} of {len(boxes)}: {_text(boxes[k])}")


def _text(box: np.ndarray) -> str:
    return " ".join(f"{x:g}" for x in box)


def _read_labels(archive, header: Header, case: Case) -> np.ndarray:
    """`gts` as uint8, or uint16 where a label is above 255."""
    shape, _, dtype = header
    if dtype.kind not in "iub":
        raise _Wrong(f"gts: expected integer labels, found {dtype}")
    if shape != case.shape:
        raise _Wrong(f"gts: expected the image's size {case.shape}, found {shape}")
    if dtype == np.uint8:
        return _fill(archive, "gts", header, np.uint8)
    low, high = _limits(archive, "gts", header)
    if low < 0 or high > 65535:
        raise _Wrong(f"gts: expected labels 0 to 65535, found {low:g} to {high:g}")
    return _fill(archive, "gts", header, np.uint8 if high < 256 else np.uint16)


def _read_spacing(archive, header: Header, case: Case, strict: bool) -> np.ndarray | None:
    """`spacing` float64 (3,); a bad one is an error only where it matters (strict: distances will be measured)."""
    shape, _, dtype = header
    found = f"{dtype} {shape}"
    if shape == (3,) and dtype.kind in "iuf":
        spacing = _fill(archive, "spacing", header, np.float64)
        if np.isfinite(spacing).all() and (spacing > 0).all():
            return spacing
        found = _text(spacing)
    line = f"spacing: expected three positive numbers (z, y, x in mm), found {found}"
    if strict:
        raise _Wrong(line)
    case.warnings.append(f"{case.name}: {line}: ignored")
    return None


# ------------------------------------------------------------------------------------------------------- writing

def write_segs(path, segs: np.ndarray, **extra) -> None:
    """Labels (H, W) or (D, H, W) -> compressed NPZ with `segs` (uint8, uint16 where a label is above 255) and `extra`.

    Written under a temporary name and renamed: the file is whole or absent. OSError where it cannot be written.
    """
    if segs.dtype not in (np.uint8, np.uint16):
        segs = segs.astype(np.uint16 if segs.size and segs.max() > 255 else np.uint8)
    write_npz(path, segs=segs, **extra)


def write_npz(path, **arrays) -> None:
    """np.savez_compressed that leaves a whole file or none, in a folder made if need be."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
