"""Label pictures in: which number of a mask picture is which object, or that none can be.

Errors are ValueErrors of one line, "<file name>: gts: expected …, found …".
"""
import struct
from pathlib import Path

import numpy as np

from .pictures import JPEG, PALETTE, PHOTOMETRIC, PNG, decode, png_chunk, read_bytes, tiff_fields

SCATTERED = 8                        # labels may be single pixels, but not those of more values than this


def load_label_picture(path) -> tuple[np.ndarray, str | None]:
    """Read a mask picture as uint16 labels (H, W), 0 the background.

    Of a palette picture the indices are the labels, of a grey one the grey values ({0, 255} is one object), of a
    coloured one every colour but black, numbered in order of (R, G, B). Where all that is visible has one colour, the
    transparency is the mask. Grey values that only smoothing or JPEG makes are cut at half of white.

    Returns:
        The labels, and a line for the user where they were cut or turned, else None.

    Raises:
        ValueError: the file is absent or damaged, or its values cannot be labels.
    """
    path = Path(path)
    data = read_bytes(path)
    if tiff_fields(data).get(PHOTOMETRIC) == PALETTE:
        raise ValueError(f"{path.name}: gts: expected labels, found a TIFF with a palette (save it as PNG)")
    indexed = indices_as_grey(data)
    pixels, remark = decode(indexed or data, path)
    if indexed:
        labels, cut = pixels.reshape(*pixels.shape[:2], -1)[..., 0].astype(np.uint16), None
    else:
        labels, cut = labels_of(pixels, data.startswith(JPEG), path.name)
    remarks = ", ".join(filter(None, [remark, cut]))
    return labels, f"{path.name}: gts: {remarks}" if remarks else None


def indices_as_grey(data: bytes) -> bytes | None:
    """Give a palette PNG or BMP a palette that maps each index to itself; None where the data are neither."""
    grey = np.arange(256, dtype=np.uint8)
    if data.startswith(PNG) and data[25:26] == b"\3":                       # the colour type
        start = data.find(b"PLTE") - 4
        size, = struct.unpack_from(">I", data, start)
        return data[:start] + png_chunk(b"PLTE", grey.repeat(3).tobytes()[:size]) + data[start + 12 + size:]
    if data.startswith(b"BM") and int.from_bytes(data[28:30], "little") <= 8 and len(data) > 54:    # bits of a pixel
        pixels, header = struct.unpack_from("<II", data, 10)
        palette = np.stack([grey] * 4, -1).tobytes()[:pixels - 14 - header]
        return data[:14 + header] + palette + data[14 + header + len(palette):]
    return None


def labels_of(pixels: np.ndarray, jpeg: bool, name: str) -> tuple[np.ndarray, str | None]:
    """Turn the pixels of a mask, grey, RGB or RGBA, into uint16 labels (H, W) and words if they had to be cut."""
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        alpha, pixels = pixels[..., 3], pixels[..., :3]
        if np.ptp(alpha):
            visible = pixels[alpha > 0]
            pixels = alpha if (visible == visible[0]).all() else pixels * (alpha > 0)[..., None]
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim == 3:
        numbers = (pixels.astype(np.int64) << np.array([32, 16, 0])).sum(-1)
        colours_found, labels = np.unique(numbers, return_inverse=True)
        labels = labels.reshape(numbers.shape) + (colours_found[0] != 0)
        if len(colours_found) > 256 or jpeg or scattered(labels) > SCATTERED:
            raise ValueError(f"{name}: gts: expected at most 255 flat colours of objects on black, found "
                             f"{len(colours_found)} colours{' of a JPEG' if jpeg else ''}")
        return labels.astype(np.uint16), None

    labels = whole_numbers(pixels, name)
    most = 255 if pixels.dtype == np.uint8 else 65535
    values = np.unique(labels)
    if values[-1] <= most // 16 or scattered(labels) <= SCATTERED and not (jpeg and len(values) > 2):
        return labels, None
    white = labels > most - most // 4
    grey = (labels > most // 16) & ~white
    if not white.any() or grey.sum() > (white.sum() if jpeg else labels.size / 2):
        raise ValueError(f"{name}: gts: expected labels or black and white, found {len(values)} grey values scattered "
                         "as in a photograph or a compressed picture")
    return (labels > most // 2).astype(np.uint16), f"a black and white mask with soft edges, cut at {most // 2 + 1}"


def scattered(labels: np.ndarray) -> int:
    """Count the labels (H, W) most of whose pixels equal neither the next nor the one below: smooth edges, noise."""
    flat = np.zeros(labels.shape, bool)
    flat[:, :-1] = labels[:, :-1] == labels[:, 1:]
    flat[:-1] |= labels[:-1] == labels[1:]
    return int((2 * np.bincount(labels[flat], minlength=65536) < np.bincount(labels.ravel(), minlength=65536)).sum())


def whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Round numbers that are whole but for a file's scale factors (within 1e-3) to uint16 labels.

    Raises:
        ValueError: one is not whole, negative, above 65535 or not finite.
    """
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(np.uint16)
    numbers = array.astype(np.float64)
    labels = np.rint(numbers)
    wrong = ~np.isclose(numbers, labels, rtol=0, atol=1e-3) | (labels < 0) | (labels > 65535)
    if wrong.any():
        raise ValueError(f"{name}: gts: expected whole numbers 0 to 65535, found {numbers[wrong][0]:.9g}")
    return labels.astype(np.uint16)
