"""All pictures: overlays, contact sheets, ground truth beside prediction, training curves. OpenCV only.

Images are uint8, grey (H, W) or RGB (H, W, 3), labels integers (H, W), 0 the background; boxes hold their corner
pixels. Pictures are RGB uint8 (H', W', 3). Label i and box i - 1, from which it was made, have one colour everywhere.
"""
import math

import cv2
import numpy as np

from ..files import whole_file

SMALLEST = 512                       # overlays of smaller images are enlarged by a whole number until this long
TILE = 320                           # longest side of a slice in a contact sheet, width of a panel in a row
SLICES = 12                          # of a contact sheet, at most
WHITE, BLACK, BLUE = (255, 255, 255), (0, 0, 0), (30, 90, 200)


def overlay(image: np.ndarray, segs: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Draw translucent masks, their contours and boxes (N, 4) x0 y0 x1 y1 on the image, at least 512 pixels long."""
    return panel(image, segs, boxes, math.ceil(SMALLEST / max(image.shape[:2])))


def contact_sheet(volume: np.ndarray, segs: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Draw 12 slices of a volume (D, H, W[, 3]) as `overlay` does, four in a row, with their numbers.

    They are spread evenly over those that hold a label or a box (N, 6) x0 y0 z0 x1 y1 z1, over all where none does.
    """
    used = [*np.flatnonzero(segs.any((1, 2))), *boxes[:, [2, 5]].ravel()] or [0, len(segs) - 1]
    tiles = []
    for z in np.unique(np.linspace(min(used), max(used), SLICES).round().astype(int)):
        reached = (boxes[:, 2] <= z) & (z <= boxes[:, 5])
        here = np.where(reached[:, None], boxes[:, [0, 1, 3, 4]], np.nan)
        tiles.append(panel(volume[z], segs[z], here, TILE / max(segs.shape[1:])))
        write(tiles[-1], str(z), 4, 16, 0.5)
    return sheet(tiles, 4)


def compare_row(image: np.ndarray, gts: np.ndarray, segs: np.ndarray, caption: str) -> np.ndarray:
    """Draw image, ground truth and prediction side by side, 960 wide (MedficientSAM, Fig. 2), below a caption."""
    panels = []
    for name, labels in (("image", np.zeros_like(gts)), ("ground truth", gts), ("prediction", segs)):
        panels.append(panel(image, labels, (), TILE / image.shape[1], fill=0))
        write(panels[-1], name, 4, len(panels[-1]) - 6, 0.4)
    row = np.pad(np.hstack(panels), ((24, 0), (0, 0), (0, 0)), constant_values=255)
    write(row, caption, 4, 17, 0.45, BLACK)
    return row


def curves(columns: dict[str, list[float]], xs: list[float], path) -> None:
    """Save a PNG with a panel for each column: name, range and line over the steps `xs`, without its NaNs. OSError."""
    panels = []
    for name, values in columns.items():
        x, y = np.array([xs, values])[:, np.isfinite(values)]
        picture = np.full((300, 520, 3), 255, np.uint8)
        cv2.rectangle(picture, (20, 40), (500, 260), BLACK, 1)
        write(picture, f"step {xs[0]} to {xs[-1]}", 20, 280, 0.42, BLACK)
        if len(y):
            name += f": {y.min():.4g} to {y.max():.4g}, at the end {y[-1]:.4g}"
            across = np.interp(x, [xs[0], xs[-1]], [20, 500])
            down = np.interp(y, [y.min(), y.max()], [260, 40])
            points = np.stack([across, down], 1).round().astype(np.int32)
            cv2.polylines(picture, [points], False, BLUE, 2, cv2.LINE_AA)
        write(picture, name, 20, 26, 0.5, BLACK)
        panels.append(picture)
    save_png(path, sheet(panels, 3))


def save_png(path, picture: np.ndarray) -> None:
    """Write a picture as a PNG file, whole or not at all; makes the folder. OSError if it fails."""
    with whole_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1])


def panel(image, segs, boxes, scale: float, fill: float = 0.35) -> np.ndarray:
    """Draw the image scaled by `scale`, contours of `segs`, their areas tinted by `fill` (0 … 1), boxes without NaN."""
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]              # width, height
    picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    labels = cv2.resize(segs.astype(np.uint16), size, interpolation=cv2.INTER_NEAREST)
    table = colours(max(labels.max(), len(boxes)) + 1)
    thickness = 1 + max(size) // 800
    inside, edge = labels > 0, contours(labels, thickness)
    picture[inside] = (1 - fill) * picture[inside] + fill * table[labels[inside]]
    picture[edge] = table[labels[edge]]
    for box, colour in zip(boxes, table[1:].tolist()):
        if np.isfinite(box).all():
            corners = np.floor(box[:2] * scale), np.ceil((box[2:] + 1) * scale) - 1
            cv2.rectangle(picture, *np.int32(corners).tolist(), colour, thickness)
    return picture


def colours(count: int) -> np.ndarray:
    """Return (count, 3) uint8 RGB: black for the background, green for 1, then hues a golden angle apart."""
    hsv = np.full((1, count, 3), (0, 200, 255), np.uint8)
    hsv[..., 0] = (np.arange(count) * 180 * 0.618034 + 129) % 180
    hsv[:, 0] = 0
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]


def contours(labels, thickness: int) -> np.ndarray:
    """Return bool (H, W): labelled pixels within `thickness` pixels of another label or the background."""
    kernel = np.ones((2 * thickness + 1,) * 2, np.uint8)
    return (labels > 0) & (cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, kernel) > 0)       # greatest minus smallest


def write(picture, text: str, x: int, y: int, size: float, colour=WHITE) -> None:
    """Write text at the baseline point x, y, outlined in black or white so that it reads on any background."""
    text = text.encode(errors="backslashreplace").decode()                     # OpenCV crashes on a half character
    for ink, thickness in ((WHITE if colour == BLACK else BLACK, 3), (colour, 1)):
        cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, ink, thickness, cv2.LINE_AA)


def sheet(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Join pictures of one size in rows of so many, the last row filled with white."""
    pictures = pictures + [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    return np.vstack([np.hstack(pictures[i:i + columns]) for i in range(0, len(pictures), columns)])
