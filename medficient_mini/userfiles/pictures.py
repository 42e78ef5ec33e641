"""Pictures (PNG, JPEG, TIFF, BMP) in, label pictures out, and how intensities become 0–255."""
import os
import re
import struct
import tempfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np

from ..files import whole_file
from ..show.draw import colours

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
ENDING = re.compile(r"\.(nii|nii\.gz|nrrd|mha|mhd|dcm|npz|png|jpe?g|tiff?|bmp)$", re.IGNORECASE)
WINDOWS = {"soft-tissue": (40.0, 400.0), "lung": (-600.0, 1500.0), "bone": (400.0, 1800.0), "brain": (40.0, 80.0)}
SAMPLE = 1 << 23                     # numbers that percentiles are taken from; smaller images give all of theirs
PHOTOMETRIC, ORIENTATION, SAMPLES = 262, 274, 277    # the TIFF fields that are looked at
INVERTED, PALETTE = 0, 3             # values of PHOTOMETRIC: zero is white; numbers are indices of colours
TURNED = "turned as its EXIF orientation says"
# What OpenCV and the libraries for JPEG, PNG, JPEG 2000 and MetaImage write on standard error.
COMPLAINTS = re.compile(rb"(\[ *(WARN|ERROR):|Corrupt JPEG|Invalid |Inconsistent|libpng|Unsupported |Marker |Failed "
                        rb"|Meta(Image|Object): |DimSize |Uncompress|   ideal)[^\n]*\n+")


def is_picture(path) -> bool:
    """Return whether a file's name ends as those of pictures do."""
    return str(path).lower().endswith(PICTURES)


def stem_of(path) -> str:
    """Return the file name without its ending, where .nii.gz is one ending."""
    return ENDING.sub("", os.path.basename(os.path.abspath(path)))


def parse_window(words: list[str] | None) -> tuple[float, float] | None:
    """Read ["lung"] or ["-600", "1500"] as (level, width), None as None; ValueError where it is neither."""
    if words is None:
        return None
    with suppress(ValueError):
        level, width = map(float, WINDOWS.get(" ".join(words), words))
        if np.isfinite(level) and 0 < width < np.inf:
            return level, width
    raise ValueError(f"--window: expected LEVEL WIDTH with a width above 0, or one of {', '.join(WINDOWS)}, "
                     f"found {' '.join(words)}")


def intensity_range(sample: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float, str]:
    """Return which numbers become 0 and 255: the window's ends, 0 and 255 of uint8, else percentiles; and say so."""
    if window is not None:
        level, width = window
        return level - width / 2, level + width / 2, f"window level {level:g} width {width:g}"
    if sample.dtype == np.uint8:
        return 0.0, 255.0, "8 bits as they are"
    finite = sample[np.isfinite(sample)].astype(np.float64)
    if not finite.any():
        return 0.0, 0.0, "all values are zero"
    low, high = np.percentile(finite[finite != 0], (0.5, 99.5)).tolist()     # as MedSAM prepares its data
    text = "0.5 and 99.5 percentiles of non-zero values"
    if low == high:
        # A picture of one number on zero would turn black: the zeros count after all.
        low, high, text = float(finite.min()), float(finite.max()), "least and greatest value"
    return low, high, f"{text}: {low:.9g} to {high:.9g}"


def to_uint8(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map numbers of any type and shape to uint8: low and below to 0, high and above to 255, NaN to 0."""
    if (array.dtype, low, high) == (np.uint8, 0, 255):
        return array
    # 8 and 16 bits are exact in float32. Larger numbers far from zero would lose their differences there.
    kind = np.float32 if array.itemsize <= 2 else np.float64
    scaled = (array.astype(kind) - low) * 255 / ((high - low) or 1.0)
    return np.nan_to_num(scaled.clip(0, 255) + 0.5).astype(np.uint8)


def load_picture(path: Path, window: tuple[float, float] | None = None) -> tuple[np.ndarray, str]:
    """Read a PNG, JPEG, TIFF or BMP file as uint8 (H, W, 3) RGB, and say how its intensities were mapped.

    It is turned as its EXIF orientation says; transparency is dropped. `window` is (level, width). ValueError if the
    file is damaged or no single picture, OSError if it cannot be read.
    """
    pixels, turned = decode(path.read_bytes(), path.name)
    low, high, text = intensity_range(pixels[::-(-pixels.size // SAMPLE)], window)      # every so many rows
    rgb = to_uint8(pixels, low, high).repeat(3 // pixels.shape[2], axis=2)
    return rgb, text + f"; {TURNED}" * turned


def decode(data: bytes, name: str) -> tuple[np.ndarray, bool]:
    """Decode a picture file's bytes to grey (H, W, 1) or RGB (H, W, 3) in the file's own type, upright, opaque.

    Also return whether they were turned for it. ValueError if they are damaged or not one picture.
    """
    fields, pages = tiff_fields(data), pages_of(data)
    if len(pages) != 1:
        found = f"{len(pages)} pages" if pages else "damaged or other data"
        raise ValueError(f"{name}: file: expected one PNG, JPEG, TIFF or BMP picture, found {found}")
    pixels = np.atleast_3d(pages[0])[..., ::-1]                              # BGR to RGB
    if fields.get(PHOTOMETRIC) == INVERTED and pixels.itemsize > 1:          # OpenCV inverts those of 8 bits itself
        pixels = -pixels if pixels.dtype.kind == "f" else ~pixels
    stored = pages_of(data, cv2.IMREAD_IGNORE_ORIENTATION)                   # it turns TIFFs all the same
    turned = 2 <= fields.get(ORIENTATION, 1) <= 8 or not np.array_equal(stored, pages, equal_nan=True)
    return pixels, turned


def tiff_fields(data: bytes) -> dict[int, int]:
    """Read the fields of 16 bits in the first directory of a classic TIFF; none of other files."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    with suppress(struct.error):                                             # cut short, or no TIFF
        start, = struct.unpack_from(f"{order}I", data, 4)                    # "None…" is no format
        count, = struct.unpack_from(f"{order}H", data, start)
        entries = struct.iter_unpack(f"{order}HHIHH", data[start + 2:start + 2 + 12 * count])
        return {tag: value for tag, _, _, value, _ in entries}
    return {}


def pages_of(data: bytes, flags: int = 0) -> tuple[np.ndarray, ...]:
    """Decode a file's pages, none if damaged, whose only sign is what the JPEG library writes, or of a BigTIFF."""
    pages, flags = (), flags | cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
    with hushed() as written, suppress(cv2.error):
        _, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), flags)
    return () if b"Corrupt JPEG" in written or data[:4] in (b"II+\0", b"MM\0+") else pages


@contextmanager
def hushed():
    """Hide what image libraries write on standard error, and give it as a bytearray, which is filled afterwards.

    What is none of their COMPLAINTS is passed on: other threads may write too, as infer.py reads ahead.
    """
    written, stderr = bytearray(), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield written
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            written += file.read()
            os.write(2, COMPLAINTS.sub(b"", written))


def save_label_picture(path, segs: np.ndarray) -> None:
    """Write integer labels (H, W) as a PNG: up to 255 by a palette in the overlay's colours, more in 16 bits."""
    highest = int(segs.max())
    png = cv2.imencode(".png", segs.astype(np.min_scalar_type(highest)))[1].tobytes()
    if highest < 256:
        png = with_colour_type(png, 3, png_chunk(b"PLTE", colours(highest + 1).tobytes()))
    with whole_file(path) as temporary:
        temporary.write_bytes(png)


def with_colour_type(png: bytes, kind: int, palette: bytes = b"") -> bytes:
    """Turn a grey PNG (0) into one with a palette (3), or back: they differ only in the header and the palette."""
    return png[:8] + png_chunk(b"IHDR", png[16:25] + bytes([kind]) + png[26:29]) + palette + png[33:]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Frame a PNG chunk: its length, kind, body and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
