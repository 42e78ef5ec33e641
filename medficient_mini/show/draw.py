"""All pictures: overlays, contact sheets, ground truth beside prediction, training curves. OpenCV only.

Images are uint8, grey (H, W) or RGB (H, W, 3); pictures come back as RGB uint8 (H', W', 3); `save_png` writes them.
Label i has the same colour in every picture, and so has box i - 1, from which label i was made.
"""
import math

import cv2
import numpy as np

from ..files import whole_file

SMALLEST = 512                       # overlays of smaller images are enlarged by a whole number until this long
TILE = 320                           # longest side of a slice in a contact sheet and of a panel in a row
FONT = cv2.FONT_HERSHEY_SIMPLEX
WHITE, BLACK, BLUE = (255, 255, 255), (0, 0, 0), (30, 90, 200)


def overlay(image: np.ndarray, segs: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
    """Draw translucent masks, their contours and the boxes on the image, at least 512 pixels long.

    Args:
        image: uint8 (H, W) or (H, W, 3).
        segs: integer labels (H, W), 0 background.
        boxes: (N, 4) x_min, y_min, x_max, y_max in pixels, corner pixels included, box i - 1 in the colour of label i.
    """
    scale = max(1, math.ceil(SMALLEST / max(image.shape[:2])))
    return panel(image, segs, boxes, scale, fill=0.35)


def contact_sheet(volume: np.ndarray, segs: np.ndarray, boxes: np.ndarray | None = None, count: int = 12) -> np.ndarray:
    """Draw evenly spaced slices of a volume as `overlay` does, four in a row, the slice number in the corner.

    Args:
        volume: uint8 (D, H, W) or (D, H, W, 3).
        segs: integer labels (D, H, W).
        boxes: (N, 6) x_min, y_min, z_min, x_max, y_max, z_max, all inclusive; drawn on the slices they reach.
        count: at most so many slices, spread over those that hold a label or a box (all slices where none does).
    """
    boxes = np.zeros((0, 6)) if boxes is None else boxes
    used = [*np.flatnonzero(segs.any((1, 2))), *boxes[:, [2, 5]].ravel()]
    ends = np.clip([min(used, default=0), max(used, default=len(segs))], 0, len(segs) - 1)
    tiles = []
    for z in np.unique(np.linspace(*ends, count).round().astype(int)):
        reached = (boxes[:, 2] <= z) & (z <= boxes[:, 5])
        here = np.where(reached[:, None], boxes[:, [0, 1, 3, 4]], np.nan)
        tiles.append(panel(volume[z], segs[z], here, TILE / max(segs.shape[1:]), fill=0.35))
        write(tiles[-1], str(z), 4, 16, 0.5)
    return sheet(tiles, min(4, len(tiles)), fill=0)


def compare_row(image: np.ndarray, gts: np.ndarray, segs: np.ndarray, caption: str) -> np.ndarray:
    """Draw image, ground truth contours and prediction contours side by side (MedficientSAM, Fig. 2).

    Args:
        image: uint8 (H, W) or (H, W, 3).
        gts, segs: integer labels (H, W).
        caption: a line above, ASCII (other characters become "?"), cut where it is longer than the row.
    """
    panels = []
    for name, labels in (("image", np.zeros_like(gts)), ("ground truth", gts), ("prediction", segs)):
        picture = panel(image, labels, None, TILE / max(image.shape[:2]))
        write(picture, name, 4, len(picture) - 6, 0.4)
        panels.append(np.pad(picture, ((0, 0), (0, 4), (0, 0))))
    row = np.hstack(panels)
    strip = np.full((24, row.shape[1], 3), 255, np.uint8)
    write(strip, caption, 4, 17, 0.45, BLACK, outline=None)
    return np.vstack([strip, row])


def curves(columns: dict[str, list[float]], xs: list[float], path) -> None:
    """Save a PNG with a panel for each column over the steps `xs`, at most three in a row.

    columns: name -> one number per entry of xs; NaN where there is none (the points beside it are joined).
    """
    panels = [curve(name, np.asarray(xs), np.asarray(values, float)) for name, values in columns.items()]
    if panels:
        save_png(path, sheet(panels, min(3, len(panels))))


def save_png(path, picture: np.ndarray) -> None:
    """Write RGB uint8 (H, W, 3) as a PNG file, whole or not at all; makes the folder. OSError if it fails."""
    with whole_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1].tobytes())


# ------------------------------------------------------------------------------------------------- pieces of a picture

def panel(image, segs, boxes, scale: float, fill: float = 0.0) -> np.ndarray:
    """One picture: `image` scaled by `scale`, contours of `segs`, their areas tinted by `fill` (0 … 1), boxes."""
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=smooth)
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    labels = cv2.resize(segs.astype(np.uint16), (width, height), interpolation=cv2.INTER_NEAREST)
    table = colours(int(labels.max(initial=0)) + 1)
    inside = labels > 0
    picture[inside] = ((1 - fill) * picture[inside] + fill * table[labels[inside]]).astype(np.uint8)
    edge = contours(labels, 1 + 2 * (max(height, width) // 800))
    picture[edge] = table[labels[edge]]
    draw_boxes(picture, () if boxes is None else boxes, scale)
    return picture


def colours(count: int) -> np.ndarray:
    """Return (count, 3) uint8 RGB: black for the background, green for 1, then hues a golden angle apart."""
    hue = (np.arange(count) * 180 * 0.618034 + 129) % 180
    hsv = np.stack([hue, np.full(count, 200), np.full(count, 255)], -1).astype(np.uint8)
    table = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    table[0] = 0
    return table


def contours(labels, thickness: int) -> np.ndarray:
    """bool (H, W): labelled pixels within `thickness` pixels of another label or the background, all labels at once."""
    # One pixel of thickness takes a 3 x 3 neighbourhood. Beyond the image's edge OpenCV assumes no other label.
    kernel = np.ones((2 * thickness + 1,) * 2, np.uint8)
    return (labels > 0) & ((cv2.erode(labels, kernel) != labels) | (cv2.dilate(labels, kernel) != labels))


def draw_boxes(picture, boxes, scale: float) -> None:
    """Boxes (N, 4) in unscaled pixels into `picture`; a row with NaN is left out. Corner pixels belong to the box."""
    for box, colour in zip(boxes, colours(len(boxes) + 1)[1:].tolist()):
        if np.isfinite(box).all():
            corners = np.floor(box[:2] * scale), np.ceil((box[2:] + 1) * scale) - 1
            cv2.rectangle(picture, *np.int32(corners).tolist(), colour, 1 + max(picture.shape[:2]) // 800)


def write(picture, text: str, x: int, y: int, size: float, colour=WHITE, outline=BLACK) -> None:
    """`text` at the baseline point x, y; with an outline it reads on any background."""
    text = text.encode("ascii", "replace").decode()
    for ink, thickness in ((outline, 3), (colour, 1)):
        if ink is not None:
            cv2.putText(picture, text, (x, y), FONT, size, ink, thickness, cv2.LINE_AA)


def curve(name: str, xs, values) -> np.ndarray:
    """One panel of `curves`, (300, 520, 3): the line in a frame, its range above, that of the axis below."""
    picture = np.full((300, 520, 3), 255, np.uint8)
    cv2.rectangle(picture, (20, 40), (500, 260), BLACK, 1)
    known = np.isfinite(values)
    if known.any():
        low, high = values[known].min(), values[known].max()
        across = 20 + 480 * (xs - xs[0]) / (xs[-1] - xs[0] or 1)
        down = 260 - 220 * (values - low) / (high - low or 1)
        points = np.stack([across, down], 1)[known].round().astype(np.int32)
        cv2.polylines(picture, [points], False, BLUE, 1, cv2.LINE_AA)
        cv2.circle(picture, points[-1].tolist(), 3, BLUE, -1, cv2.LINE_AA)
        name += f": {low:.4g} to {high:.4g}, at the end {values[known][-1]:.4g}"
        write(picture, f"step {xs[0]} to {xs[-1]}", 20, 280, 0.42, BLACK, outline=None)
    write(picture, name, 20, 26, 0.5, BLACK, outline=None)
    return picture


def sheet(pictures: list[np.ndarray], columns: int, fill: int = 255) -> np.ndarray:
    """Pictures in rows of so many, those of a row of one height; what is left of shorter rows is filled with grey."""
    rows = [np.hstack(pictures[i:i + columns]) for i in range(0, len(pictures), columns)]
    width = max(row.shape[1] for row in rows)
    return np.vstack([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=fill) for row in rows])
