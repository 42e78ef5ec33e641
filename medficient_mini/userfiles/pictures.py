"""Pictures (PNG, JPEG, TIFF, BMP) in, label pictures out, and how intensities become 0–255.

Errors are ValueErrors of one line, "<file name>: <field>: expected …, found …".
"""
import os
import re
import struct
import tempfile
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np

from ..files import whole_file
from ..show.draw import colours

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUMES = (".nii", ".nii.gz")
WINDOWS = {"soft-tissue": (40.0, 400.0), "lung": (-600.0, 1500.0), "bone": (400.0, 1800.0), "brain": (40.0, 80.0)}
PERCENTILES = (0.5, 99.5)            # of the non-zero numbers, as MedSAM prepares its data
SAMPLE = 1 << 23                     # numbers that percentiles are taken from; smaller images give all of theirs
PHOTOMETRIC, ORIENTATION = 262, 274  # the TIFF fields that are looked at; EXIF has the second one too
INVERTED, PALETTE = 0, 3             # values of PHOTOMETRIC: zero is white; numbers are indices of colours
PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"  # first bytes, which say more than a file's name
COMPLAINT = re.compile(rb"^(Corrupt JPEG|Premature end of JPEG|Invalid SOS|libpng).*\n", re.MULTILINE)
ONE_AT_A_TIME = threading.Lock()     # a process has one standard error
TURNED = "turned as its EXIF orientation says"


def is_nifti(path) -> bool:
    """Return whether a file's name ends as NIfTI files do."""
    return str(path).lower().endswith(VOLUMES)


def stem_of(path) -> str:
    """Return the file name without its ending, where .nii.gz is one ending."""
    name = Path(path).name
    for suffix in (".nii.gz", *PICTURES, ".nii", ".npz"):
        if name.lower().endswith(suffix):
            return name[:-len(suffix)]
    return name


# --------------------------------------------------------------------------------------------------- intensities

def parse_window(words: list[str] | None) -> tuple[float, float] | None:
    """Read ["lung"] or ["-600", "1500"] as (level, width), None as None.

    Raises:
        ValueError: the name is unknown or the width is not positive.
    """
    if words is None:
        return None
    try:
        level, width = WINDOWS[words[0]] if len(words) == 1 else map(float, words)
        if np.isfinite([level, width]).all() and width > 0:
            return level, width
    except (KeyError, ValueError):
        pass
    raise ValueError(f"--window: expected LEVEL WIDTH with a width above 0, or one of {', '.join(WINDOWS)}, "
                     f"found {' '.join(words)}")


def intensity_range(sample: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float, str]:
    """Decide which numbers become 0 and 255: the window's ends, else percentiles of the sample.

    Returns:
        low, high, and words that say where they come from.
    """
    if window is not None:
        level, width = window
        return level - width / 2, level + width / 2, f"window level {level:g} width {width:g}"
    finite = sample[np.isfinite(sample)].astype(np.float64)
    numbers = finite[finite != 0]
    low, high = map(float, np.percentile(numbers, PERCENTILES)) if len(numbers) else (0.0, 0.0)
    if low == high and len(numbers):
        # A picture of one number on zero would turn black: the zeros count after all.
        low, high = float(finite.min()), float(finite.max())
        return low, high, f"least and greatest value: {low:.9g} to {high:.9g}"
    return low, high, f"{PERCENTILES[0]:g} and {PERCENTILES[1]:g} percentiles of non-zero values: {low:.9g} to {high:.9g}"


def to_uint8(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map numbers of any type and shape to uint8: low and below to 0, high and above to 255, NaN to 0."""
    # 8 and 16 bits are exact in float32. Larger numbers far from zero would lose their differences there.
    kind = np.float32 if np.asarray(array).dtype.itemsize <= 2 else np.float64
    scaled = (np.asarray(array, kind) - low) * 255 / max(high - low, 1e-12)
    return np.nan_to_num(scaled.clip(0, 255) + 0.5, nan=0.0).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ pictures

def load_picture(path, window: tuple[float, float] | None = None) -> tuple[np.ndarray, str]:
    """Read a picture as uint8 (H, W, 3) RGB. Transparency is dropped.

    Args:
        path: a PNG, JPEG, TIFF or BMP file. It is turned as its EXIF orientation says, as viewers show it.
        window: (level, width) of the intensities that become 0–255; without it 8 bits stay as they are, whereas 16
            bits and floats are mapped by percentiles (see `intensity_range`).

    Returns:
        The picture and words that say how its intensities were mapped, and whether it was turned.

    Raises:
        ValueError: the file is absent, damaged or no single picture.
    """
    path = Path(path)
    pixels, remark = decode(read_bytes(path), path)
    pixels = np.atleast_3d(pixels)[..., :3]
    text = "8 bits as they are"
    if pixels.dtype != np.uint8 or window is not None:
        step = -(-pixels.size // SAMPLE)
        low, high, text = intensity_range(pixels.reshape(-1, pixels.shape[2])[::step], window)
        pixels = to_uint8(pixels, low, high)
    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return np.ascontiguousarray(rgb), "; ".join(filter(None, [text, remark]))


def decode(data: bytes, path: Path) -> tuple[np.ndarray, str | None]:
    """Decode a picture file's bytes to grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4) in the file's own type, upright.

    Returns:
        The pixels, and TURNED where they lie otherwise than in the file.

    Raises:
        ValueError: the data are damaged, not a picture, or more than one.
    """
    pixels, complaints = quietly(cv2.imdecode, np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError(f"{path.name}: file: expected a PNG, JPEG, TIFF or BMP picture, found damaged or other data")
    # Every JPEG, a thumbnail within another one too, begins with FF D8 FF and ends with FF D9.
    damage = re.search(rb"^(Corrupt|Premature end of) JPEG.*", complaints, re.MULTILINE)
    if damage or data.startswith(JPEG) and data.count(b"\xff\xd9") < data.count(JPEG):
        raise ValueError(f"{path.name}: file: expected a whole JPEG picture, found a damaged one"
                         + (f" ({damage[0].decode()})" if damage else ""))
    tiff = tiff_fields(data)
    pages = quietly(cv2.imcount, str(path))[0] if tiff else 1
    if pages and pages > 1:
        raise ValueError(f"{path.name}: file: expected one picture, found {pages} pages")
    if pixels.ndim == 3:
        if pixels.shape[2] not in (3, 4):
            raise ValueError(f"{path.name}: file: expected grey or RGB, found {pixels.shape[2]} channels")
        pixels = pixels[..., [2, 1, 0, 3][:pixels.shape[2]]]
    if tiff.get(PHOTOMETRIC) == INVERTED and pixels.dtype.itemsize > 1:      # OpenCV inverts those of 8 bits itself
        pixels = -pixels if pixels.dtype.kind == "f" else ~pixels
    exif = re.search(rb"Exif\0\0|eXIf", data)
    turn = (tiff or (tiff_fields(data[exif.end():]) if exif else {})).get(ORIENTATION, 1)
    if not tiff:                                                             # OpenCV turns a TIFF itself
        pixels = pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels
        pixels = pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels
        pixels = pixels[::-1] if turn in (3, 4, 7, 8) else pixels
    return pixels, TURNED if 2 <= turn <= 8 else None


def tiff_fields(data: bytes) -> dict[int, int]:
    """Read the first number of each field in the first directory of TIFF or EXIF data; empty where there is none."""
    fields = {}
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return fields
    try:
        start, = struct.unpack_from(f"{order}I", data, 4)
        count, = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", data, place)
            fields[tag], = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, place + 8)
    except struct.error:
        pass                                                                 # cut short: what there is will do
    return fields


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        ValueError: it is absent or may not be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name}: file: expected a readable picture, found: {error.strerror}") from None


def quietly(function, *arguments) -> tuple[object, bytes]:
    """Call a function of OpenCV; give what it returns, None for an error, and its libraries' words on standard error.

    The JPEG library says nowhere else that it had to guess pixels; and a user is to see our one line instead. What
    other threads write on standard error meanwhile comes through afterwards.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    with ONE_AT_A_TIME, tempfile.TemporaryFile() as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            result = function(*arguments)
        except cv2.error:
            result = None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        written.seek(0)
        text = written.read()
        os.write(2, COMPLAINT.sub(b"", text))
    return result, text


def save_label_picture(path, segs: np.ndarray) -> None:
    """Write integer labels (H, W) as a PNG, whole or absent.

    Up to 255 labels become indices of a palette: programs read the labels, viewers show them in the colours of
    `show.draw.overlay`. More become 16-bit grey values.
    """
    count = int(segs.max()) + 1
    png = cv2.imencode(".png", segs.astype(np.uint8 if count <= 256 else np.uint16))[1].tobytes()
    if count <= 256:
        # Grey and palette differ only in the header's colour type, here made 3, and in the palette behind it.
        header = png_chunk(b"IHDR", png[16:25] + b"\3" + png[26:29])
        png = png[:8] + header + png_chunk(b"PLTE", colours(count).tobytes()) + png[33:]
    with whole_file(path) as temporary:
        temporary.write_bytes(png)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Frame a PNG chunk: its length, kind, body and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
