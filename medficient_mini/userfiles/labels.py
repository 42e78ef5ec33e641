"""Label pictures in: which number of a mask picture is which object, or that none can be.

Errors are ValueErrors of one line, "<file name>: gts: expected …, found …".
"""
from pathlib import Path

import cv2
import numpy as np

from .pictures import JPEG, PALETTE, PHOTOMETRIC, decode, png_chunk, tiff_fields

MOST_VALUES = 32                     # more grey values or colours are no labels, but soft edges or a photograph


def load_label_picture(path) -> tuple[np.ndarray, list[str]]:
    """Read a mask picture as uint16 labels (H, W), 0 the background.

    Of a palette PNG the indices are the labels, of a grey picture the grey values (see `grey_labels`), of a coloured
    one every colour but black (see `coloured_labels`). What is transparent is background.

    Returns:
        The labels, and lines for the user that say how they were changed: turned, or cut.

    Raises:
        ValueError: the file is damaged, or its values cannot be labels.
        OSError: it cannot be read.
    """
    path = Path(path)
    name, data = path.name, path.read_bytes()
    if data.startswith(b"\x89PNG") and data[25:26] == b"\3":                 # the colour type of a palette
        pixels, remarks = decode(indices_as_grey(data), name)
        labels = pixels[..., 0]
    else:
        pixels, remarks = decode(data, name)
        whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)     # as it lies in the file
        if whole.shape[2:] == (4,):
            if remarks:
                raise ValueError(f"{name}: gts: expected an opaque mask or no EXIF orientation, found transparency")
            # What is less than half as opaque as the most opaque pixel is background; black on nothing is a mask too.
            visible = (whole[..., 3:] >= whole[..., 3].max() / 2).astype(np.uint8)
            seen = pixels * visible
            pixels = seen if seen.any() or visible.all() else visible
        white = 255 if pixels.dtype == np.uint8 else 65535
        pixels = whole_numbers(pixels, name)
        if (pixels == pixels[..., :1]).all():
            labels, cut = grey_labels(pixels[..., 0], white, data.startswith(JPEG), name)
            remarks += cut
        else:
            labels = coloured_labels(pixels, data, name)
    return labels.astype(np.uint16), [f"{name}: gts: {remark}" for remark in remarks]


def indices_as_grey(data: bytes) -> bytes:
    """Give a palette PNG a palette that maps each index to itself, so that decoding it yields the indices."""
    before, _, after = data.partition(b"PLTE")
    size = int.from_bytes(before[-4:], "big")
    grey = np.arange(256, dtype=np.uint8).repeat(3).tobytes()[:size]
    return before[:-4] + png_chunk(b"PLTE", grey) + after[size + 4:]


def grey_labels(labels: np.ndarray, white: int, jpeg: bool, name: str) -> tuple[np.ndarray, list[str]]:
    """Leave grey values (H, W) as they are where they are few or small, else cut white on black with soft edges.

    Raises:
        ValueError: there are many values, and black and white are not the two fullest quarters of the histogram.
    """
    values = np.unique(labels)
    if values[-1] <= white // 16 or len(values) <= (2 if jpeg else MOST_VALUES):
        return labels, []
    quarters = np.bincount(labels.ravel() // (white // 4 + 1), minlength=4)
    if min(quarters[0], quarters[3]) <= max(quarters[1], quarters[2]):
        raise ValueError(f"{name}: gts: expected labels or black and white, found {len(values)} grey values "
                         f"(save over {MOST_VALUES} labels with a palette or 16 bits, none as JPEG)")
    return labels > white // 2, [f"a black and white mask with soft edges, cut at {white // 2 + 1}"]


def coloured_labels(pixels: np.ndarray, data: bytes, name: str) -> np.ndarray:
    """Number the colours but black of RGB (H, W, 3) in order of (R, G, B), as integers (H, W).

    Raises:
        ValueError: there are too many colours, those of a JPEG, or those of a palette that is not read.
    """
    if tiff_fields(data).get(PHOTOMETRIC) == PALETTE or data.startswith(b"BM") and data[28] <= 8:     # bits of a pixel
        raise ValueError(f"{name}: gts: expected labels with a palette as PNG, found another format")
    numbers = pixels.astype(np.int64) @ (1 << 32, 1 << 16, 1)
    found, labels = np.unique(numbers, return_inverse=True)
    if len(found) > MOST_VALUES or data.startswith(JPEG):
        raise ValueError(f"{name}: gts: expected at most {MOST_VALUES} flat colours, no JPEG, found {len(found)}")
    return labels.reshape(numbers.shape) + (found[0] != 0)


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
