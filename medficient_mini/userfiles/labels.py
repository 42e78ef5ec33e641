"""Label pictures in: which number of a mask picture is which object, or that none can be."""
from pathlib import Path

import cv2
import numpy as np

from .pictures import PALETTE, PHOTOMETRIC, SAMPLES, TURNED, decode, hushed, tiff_fields, with_colour_type

MOST_VALUES = 32                     # more grey values or colours are no labels, but soft edges or a photograph


def load_label_picture(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a mask picture as uint16 labels (H, W), 0 the background, and lines on what was decided.

    Of a palette PNG the indices are the labels, of others the grey values or colours (see `labels_of`). ValueError if
    the file is damaged, transparent, a JPEG of more than black and white or of another format with a palette, or its
    values cannot be labels, OSError if it cannot be read.
    """
    name, data = path.name, path.read_bytes()
    palette = data.startswith(b"\x89PNG") and data[25:26] == b"\3"            # the colour type
    pixels, turned = decode(with_colour_type(data, 0) if palette else data, name)
    lines = [f"{name}: gts: {TURNED}"] * turned
    if palette:
        labels = pixels[..., 0] // (255 // (2 ** data[24] - 1))       # few bits are spread to 0–255
    elif data.startswith(b"\xff\xd8\xff"):                            # a JPEG's values are not those that were saved
        grey = pixels.max(axis=2)
        between = cv2.inRange(grey, 64, 191)                          # at edges, not over an area
        if grey.max() < 192 or cv2.erode(between, None, iterations=2).any():
            raise ValueError(f"{name}: gts: expected a mask as PNG, TIFF or BMP, found a JPEG of more than black and "
                             "white")
        labels = grey > 127
        lines.append(f"{name}: gts: a black and white JPEG, cut at 128")
    else:
        fields, is_bmp = tiff_fields(data), data.startswith(b"BM")
        has_palette = fields.get(PHOTOMETRIC) == PALETTE or is_bmp and data[28] <= 8
        if has_palette and np.ptp(pixels, axis=2).any():                         # a grey one changes nothing
            raise ValueError(f"{name}: gts: expected labels with a palette as PNG, found another format")
        with hushed():
            whole = np.atleast_3d(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
        dropped = fields.get(SAMPLES) == 2 or is_bmp and data[28] == 32          # transparency, by OpenCV
        if np.ptp(whole[..., 3:]) if whole.shape[2] == 4 else dropped:
            raise ValueError(f"{name}: gts: expected an opaque mask, found transparency")
        labels = labels_of(pixels, name)
    return labels.astype(np.uint16), lines


def labels_of(pixels: np.ndarray, name: str) -> np.ndarray:
    """Turn the pixels of a mask (H, W, 1 or 3) into labels (H, W).

    Grey values stay as they are where they are few, small or without a gap; few colours but black are numbered in
    order of (R, G, B). ValueError for many other values, and soft edges.
    """
    white = 255 if pixels.dtype == np.uint8 else 65535
    pixels = whole_numbers(pixels, name)
    brightest = pixels.max(axis=2)
    grey = ((pixels == brightest[..., None]) | ~pixels.any((0, 1))).all()     # or shades of red, for example
    numbers = brightest if grey else pixels.astype(np.int64) @ (1 << 32, 1 << 16, 1)
    found = np.unique(numbers)
    if grey and (len(found) - 1 == found[-1] < white or found[-1] <= white // 16):
        return numbers
    # Edges are soft where no value between black and white fills 3 x 3 pixels; small ones are classes beside "ignore".
    between = (brightest > white // 4) & (brightest < white)
    flat = cv2.morphologyEx(brightest, cv2.MORPH_GRADIENT, None) == 0
    soft = grey and found[-1] == white and between.any() and not (between & flat).any()
    if soft or len(found) > MOST_VALUES:
        raise ValueError(f"{name}: gts: expected labels or black and white, found {len(found)} grey values or colours, "
                         f"as of soft edges or a photograph (save over {MOST_VALUES} labels with a palette or 16 bits)")
    return numbers if grey else np.searchsorted(found, numbers) + (found[0] != 0)


def whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Round numbers that are whole but for a file's scale factors (within 1e-3) to uint16 labels.

    Those of uint8 and uint16 stay as they are. ValueError if one is not whole, negative, above 65535 or not finite.
    """
    if array.dtype in (np.uint8, np.uint16):
        return array
    numbers = array.astype(np.float64)
    labels = np.rint(numbers)
    wrong = ~np.isclose(numbers, labels, rtol=0, atol=1e-3) | (labels < 0) | (labels > 65535)
    if wrong.any():
        raise ValueError(f"{name}: gts: expected whole numbers 0 to 65535, found {numbers[wrong][0]:.9g}")
    return labels.astype(np.uint16)
