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
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (200, 200, 200)


def overlay(image: np.ndarray, segs: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
    """The image with translucent masks, their contours and the boxes, at least 512 pixels long.

    image: uint8 (H, W) or (H, W, 3). segs: integer labels (H, W), 0 background. boxes: (N, 4) x_min, y_min, x_max,
    y_max in pixels, corner pixels included, box i - 1 in the colour of label i; None: no boxes.
    """
    scale = max(1, math.ceil(SMALLEST / max(image.shape[:2])))
    return panel(image, segs, boxes, scale, fill=0.35)


def contact_sheet(volume: np.ndarray, segs: np.ndarray, boxes: np.ndarray | None = None, count: int = 12) -> np.ndarray:
    """Evenly spaced slices of a volume as `overlay` shows them, four in a row, the slice number in the corner.

    volume: uint8 (D, H, W) or (D, H, W, 3). segs: integer labels (D, H, W). boxes: (N, 6) x_min, y_min, z_min,
    x_max, y_max, z_max, all inclusive; drawn on the slices they reach; None: no boxes. count: at most so many slices,
    spread over those that hold a label or a box (all slices where none does).
    """
    used = np.flatnonzero(segs.reshape(len(segs), -1).any(1)).tolist()
    if boxes is not None and len(boxes):
        used += [boxes[:, 2].min(), boxes[:, 5].max()]
    first, last = (max(0, int(min(used))), min(len(segs) - 1, int(max(used)))) if used else (0, len(segs) - 1)
    scale = TILE / max(volume.shape[1:3])
    tiles = []
    for z in np.unique(np.linspace(first, last, count).round().astype(int)):
        here = None
        if boxes is not None and len(boxes):
            here = boxes[:, [0, 1, 3, 4]].astype(float)
            here[(z < boxes[:, 2]) | (z > boxes[:, 5])] = np.nan
        tile = panel(volume[z], segs[z], here, scale, fill=0.35)
        write(tile, f"{z}", 4, 16, 0.5)
        tiles.append(tile)
    columns = min(4, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i:i + columns]) for i in range(0, len(tiles), columns)])


def compare_row(image: np.ndarray, gts: np.ndarray, segs: np.ndarray, caption: str) -> np.ndarray:
    """Image | ground truth contours | prediction contours under a caption line (MedficientSAM, Fig. 2).

    image: uint8 (H, W) or (H, W, 3). gts, segs: integer labels (H, W). caption: one line, ASCII (other characters
    become "?"), made smaller where it would not fit.
    """
    scale = TILE / max(image.shape[:2])
    panels = [panel(image, labels, None, scale) for labels in (np.zeros_like(gts), gts, segs)]
    row = np.hstack([np.pad(p, ((0, 0), (0, 4), (0, 0))) for p in panels])[:, :-4]
    for name, x in zip(("image", "ground truth", "prediction"), range(0, row.shape[1], panels[0].shape[1] + 4)):
        write(row, name, x + 4, row.shape[0] - 6, 0.4)
    strip = np.full((24, row.shape[1], 3), 255, np.uint8)
    width = cv2.getTextSize(caption, FONT, 0.45, 1)[0][0]
    write(strip, caption, 4, 17, min(0.45, 0.45 * (row.shape[1] - 8) / max(width, 1)), BLACK, outline=None)
    return np.vstack([strip, row])


# ------------------------------------------------------------------------------------------------- pieces of a picture

def panel(image, segs, boxes, scale, fill=0.0):
    """One picture: `image` scaled by `scale`, contours of `segs`, their areas tinted by `fill` (0 … 1), boxes."""
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(rgb(image), (width, height), interpolation=smooth)
    labels = cv2.resize(segs.astype(np.uint16), (width, height), interpolation=cv2.INTER_NEAREST)
    table = colours(int(labels.max(initial=0)) + 1)
    if fill:
        inside = labels > 0
        picture[inside] = ((1 - fill) * picture[inside] + fill * table[labels[inside]]).astype(np.uint8)
    edge = contours(labels, 1 + 2 * (max(height, width) // 800))
    picture[edge] = table[labels[edge]]
    draw_boxes(picture, boxes, scale)
    return picture


def rgb(image):
    """(H, W), (H, W, 1) or (H, W, 3) uint8 -> its own copy (H, W, 3)."""
    image = image if image.ndim == 3 else image[..., None]
    return np.ascontiguousarray(np.broadcast_to(image, image.shape[:2] + (3,)))


def colours(count):
    """(count, 3) uint8 RGB: black for the background, green for 1, then hues a golden angle apart."""
    hue = (np.arange(count) * 180 * 0.618034 + 129) % 180
    hsv = np.stack([hue, np.full(count, 200), np.full(count, 255)], -1).astype(np.uint8)
    table = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    table[0] = 0
    return table


def contours(labels, thickness):
    """bool (H, W): labelled pixels within `thickness` pixels of another label or the background, all labels at once."""
    # One pixel of thickness takes a 3 x 3 neighbourhood. Beyond the image's edge OpenCV assumes no other label.
    kernel = np.ones((2 * thickness + 1,) * 2, np.uint8)
    return (labels > 0) & ((cv2.erode(labels, kernel) != labels) | (cv2.dilate(labels, kernel) != labels))


def draw_boxes(picture, boxes, scale):
    """Boxes (N, 4) in unscaled pixels into `picture`; a row with NaN is left out. Corner pixels belong to the box."""
    if boxes is None or not len(boxes):
        return
    thickness = 1 + max(picture.shape[:2]) // 800
    for box, colour in zip(np.asarray(boxes, np.float64), colours(len(boxes) + 1)[1:].tolist()):
        if np.isfinite(box).all():
            x0, y0 = (int(v) for v in np.floor(box[:2] * scale))
            x1, y1 = (int(v) for v in np.ceil((box[2:] + 1) * scale) - 1)
            cv2.rectangle(picture, (x0, y0), (x1, y1), colour, thickness)


def write(picture, text, x, y, size, colour=WHITE, outline=BLACK):
    """`text` at the baseline point x, y; with an outline it reads on any background."""
    text = text.encode("ascii", "replace").decode()
    if outline is not None:
        cv2.putText(picture, text, (x, y), FONT, size, outline, 3, cv2.LINE_AA)
    cv2.putText(picture, text, (x, y), FONT, size, colour, 1, cv2.LINE_AA)


# -------------------------------------------------------------------------------------------------------------- curves

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 34, 46            # margins round the axes of one panel


def curves(columns: dict[str, list[float]], xs: list[float], path, x_label: str = "step") -> None:
    """One panel per column over the common axis `xs`, at most three in a row, saved as PNG.

    columns: name -> one number per entry of xs; NaN where there is none (the points beside it are joined).
    """
    panels = [curve(name, np.asarray(xs, float), np.asarray(values, float), x_label)
              for name, values in columns.items()]
    across = max(1, min(3, len(panels)))
    blank = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    panels += [blank] * (-len(panels) % across or (not panels))
    save_png(path, np.vstack([np.hstack(panels[i:i + across]) for i in range(0, len(panels), across)]))


def curve(name, xs, values, x_label):
    """One panel of `curves`, (HEIGHT, WIDTH, 3)."""
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    write(picture, name, LEFT, 22, 0.5, BLACK, outline=None)
    write(picture, x_label, (LEFT + WIDTH - RIGHT) // 2 - 4 * len(x_label), HEIGHT - 8, 0.4, BLACK, outline=None)
    known = np.isfinite(xs) & np.isfinite(values)
    if known.any():
        xs, values = xs[known], values[known]
        x_ticks, y_ticks = ticks(xs.min(), xs.max()), ticks(values.min(), values.max())
        x_low, x_high = min(xs.min(), x_ticks[0]), max(xs.max(), x_ticks[-1])
        y_low, y_high = min(values.min(), y_ticks[0]), max(values.max(), y_ticks[-1])
        across = lambda x: LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = lambda y: HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        for y in y_ticks:
            cv2.line(picture, (LEFT, round(down(y))), (WIDTH - RIGHT, round(down(y))), (230, 230, 230), 1)
            label = f"{y:.4g}"
            write(picture, label, LEFT - 8 - 7 * len(label), round(down(y)) + 4, 0.38, BLACK, outline=None)
        for x in x_ticks:
            cv2.line(picture, (round(across(x)), HEIGHT - BOTTOM), (round(across(x)), HEIGHT - BOTTOM + 4), BLACK, 1)
            label = f"{x:.6g}"
            write(picture, label, round(across(x)) - 3 * len(label), HEIGHT - BOTTOM + 18, 0.38, BLACK, outline=None)
        points = np.stack([across(xs), down(values)], -1).round().astype(np.int32)
        cv2.polylines(picture, [points], False, (30, 90, 200), 1, cv2.LINE_AA)
        if len(points) <= 60:
            for x, y in points.tolist():
                cv2.circle(picture, (x, y), 2, (30, 90, 200), -1, cv2.LINE_AA)
    else:
        write(picture, "no values yet", WIDTH // 2 - 50, HEIGHT // 2, 0.5, GREY, outline=None)
    cv2.rectangle(picture, (LEFT, TOP), (WIDTH - RIGHT, HEIGHT - BOTTOM), BLACK, 1)
    return picture


def ticks(low, high):
    """Round numbers that span low … high: three to nine of them, a step of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step


def save_png(path, picture: np.ndarray) -> None:
    """RGB uint8 (H, W, 3) -> PNG file, written beside it first and then renamed; makes the folder. OSError if it fails."""
    with whole_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1].tobytes())
