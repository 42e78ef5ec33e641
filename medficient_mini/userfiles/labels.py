"""Label pictures in: which number of a mask picture is which object, or that none can be.

Errors are ValueErrors of one line, "<file name>: gts: expected …, found …".
"""
from pathlib import Path

import cv2
import numpy as np

from .pictures import JPEG, PALETTE, PHOTOMETRIC, PNG, SAMPLES, decode, tiff_fields, with_colour_type

MOST_VALUES = 32                     # more grey values or colours are no labels, but soft edges or a photograph


def load_label_picture(path) -> tuple[np.ndarray, list[str]]:
    """Read a mask picture as uint16 labels (H, W), 0 the background, and say how they were changed: turned, or cut.

    Of a palette PNG the indices are the labels, of others the grey values or colours (see `labels_of`). Where all that
    is visible has one colour, its opacity is the mask; else what is less than half as opaque as the most opaque pixel
    is background. ValueError if the file is damaged or its values cannot be labels, OSError if it cannot be read.
    """
    path = Path(path)
    name, data = path.name, path.read_bytes()
    if data.startswith(PNG) and data[25:26] == b"\3":                 # the colour type of a palette
        pixels, remarks = decode(with_colour_type(data, 0), name)
        labels = pixels[..., 0] // (255 // (2 ** data[24] - 1))       # few bits are spread to 0–255
    else:
        pixels, remarks = decode(data, name)
        whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)     # as it lies in the file
        bmp = data.startswith(b"BM") and data[28] == 32
        if tiff_fields(data).get(SAMPLES) == 2 or bmp and whole.shape[2] == 3:         # OpenCV drops these
            raise ValueError(f"{name}: gts: expected transparency in a PNG, found it in a grey TIFF or a BMP")
        if whole.shape[2:] == (4,):
            if remarks:
                raise ValueError(f"{name}: gts: expected an opaque mask or no EXIF orientation, found transparency")
            opacity = whole[..., 3:]
            colours = pixels[opacity[..., 0] > 0]
            if opacity.min() < opacity.max() and (colours == colours[0]).all():
                pixels = opacity
            else:
                pixels = pixels * (opacity >= opacity.max() / 2)
        labels, cut = labels_of(pixels, data, name)
        remarks += cut
    return labels.astype(np.uint16), [f"{name}: gts: {remark}" for remark in remarks]


def labels_of(pixels: np.ndarray, data: bytes, name: str) -> tuple[np.ndarray, list[str]]:
    """Turn the pixels of a mask (H, W, 1 or 3) into labels (H, W).

    Grey values stay as they are where they are few, small or without a gap; few colours but black are numbered in
    order of (R, G, B). White on black with soft edges is cut at half of white: black and white are the two fullest
    quarters of the histogram, and no value between fills 3 x 3 pixels. A JPEG can be nothing else: it changes values.
    ValueError for many other values, a JPEG of them, and colours of a palette whose indices are not read.
    """
    white = 255 if pixels.dtype == np.uint8 else 65535
    pixels = whole_numbers(pixels, name)
    brightest = pixels.max(axis=2)
    grey = ((pixels == brightest[..., None]) | ~pixels.any((0, 1))).all()     # or shades of red, for example
    palette = tiff_fields(data).get(PHOTOMETRIC) == PALETTE or data.startswith(b"BM") and data[28] <= 8
    if palette and not grey:
        raise ValueError(f"{name}: gts: expected labels with a palette as PNG, found another format")
    numbers = brightest if grey else pixels.astype(np.int64) @ (1 << 32, 1 << 16, 1)
    found = np.unique(numbers)
    jpeg = data.startswith(JPEG)
    few = len(found) <= MOST_VALUES and not jpeg
    quarters = np.bincount(brightest.ravel() // (white // 4 + 1), minlength=4)
    soft = grey and min(quarters[0], quarters[3]) > max(quarters[1], quarters[2])
    if soft:
        # JPEG spoils white areas a little, too.
        edges = (numbers > white // 4) & (numbers < found[-1] - 16 * jpeg)
        square = np.ones((3, 3), np.uint8)
        soft = not (edges & (cv2.erode(numbers, square) == cv2.dilate(numbers, square))).any()
    numbered = len(found) - 1 == found[-1] < white                           # 0 … N without a gap
    plain = few and not (soft and found[-1] == white and edges.any()) or numbered or found[-1] <= white // 16
    if grey and (plain and not jpeg or np.isin(found, (0, white)).all()):
        return numbers, []
    if soft:
        return numbers > white // 2, [f"a black and white mask with soft edges, cut at {white // 2 + 1}"]
    if few:
        return np.searchsorted(found, numbers) + (found[0] != 0), []
    raise ValueError(f"{name}: gts: expected labels or black and white, found {len(found)} grey values or colours "
                     f"(save over {MOST_VALUES} labels with a palette or 16 bits, none as JPEG)")


def whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Round numbers that are whole but for a file's scale factors (within 1e-3) to uint16 labels.

    ValueError if one is not whole, negative, above 65535 or not finite.
    """
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(np.uint16)
    numbers = array.astype(np.float64)
    labels = np.rint(numbers)
    wrong = ~np.isclose(numbers, labels, rtol=0, atol=1e-3) | (labels < 0) | (labels > 65535)
    if wrong.any():
        raise ValueError(f"{name}: gts: expected whole numbers 0 to 65535, found {numbers[wrong][0]:.9g}")
    return labels.astype(np.uint16)
