"""What a box and a point must be: the same rules for NPZ files, users' own prompts and the Python functions."""
import numpy as np


class FieldError(ValueError):
    """A fault of one field, "<field>: expected …, found …", before a file's name is put in front."""


def check_boxes(boxes, shape: tuple[int, ...], name: str, z_exclusive: bool = False) -> tuple[np.ndarray, list[str]]:
    """Check boxes and clip them to their image.

    Args:
        boxes: numbers (N, 4), x0 y0 x1 y1, on an image, or (N, 6), x0 y0 z0 x1 y1 z1, on a volume; a single box may
            come without its first axis, and no box as any empty array.
        shape: (H, W) or (D, H, W).
        name: what the warnings start with.
        z_exclusive: z1 is the slice after the last one, as the authors of MedficientSAM read it.

    Returns:
        boxes: float64 (N, 4) or (N, 6) inside the image, z whole and inclusive.
        warnings: lines about boxes that reached over the border.

    Raises:
        ValueError: "boxes: expected …, found …" for another shape, numbers that are not finite, an upper corner below
            the lower, and boxes wholly outside.
    """
    boxes, axes, warnings = as_array(boxes, "boxes"), len(shape), []
    check_columns(boxes, 2 * axes)
    boxes = boxes.astype(np.float64).reshape(-1, 2 * axes)
    lower, upper = boxes[:, :axes], boxes[:, axes:]                       # parts of `boxes`: they change together
    last = np.array(shape[::-1]) - 1                                      # x, y[, z] of the last pixel
    size = "×".join(map(str, shape[::-1]))
    if axes == 3:
        boxes[:, 2::3] = np.rint(boxes[:, 2::3])                          # z0 and z1
    if axes == 3 and z_exclusive:
        several = lower[:, 2] < upper[:, 2]
        upper[:, 2] -= several
        if not several.all():
            warnings.append(f"{name}: boxes: expected z0 < z1 where z1 is exclusive, found z0 = z1: one slice")
    for wanted, bad in (("finite numbers", ~np.isfinite(boxes)),
                        ("the lower corner before the upper", lower > upper),
                        (f"a box that touches the {size} pixels, counted from 0", (upper < 0) | (lower > last))):
        if bad.any():
            raise FieldError(f"boxes: expected {wanted}, found box {_first(boxes, bad)}")
    # The upper border of the last pixel, W or H, is a usual way to write it and no mistake; of slices it is one.
    over = (lower < 0) | (upper > last + np.array([1, 1, 0])[:axes])
    if over.any():
        warnings.append(f"{name}: boxes: expected them inside the {size} pixels, found {over.any(1).sum()} reaching "
                        f"over the border (first: box {_first(boxes, over)}): clipped")
    return np.hstack([lower.clip(0, last), upper.clip(0, last)]), warnings


def check_points(points, labels, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Check points on an image (H, W) and their labels.

    Args:
        points: numbers (P, 2), x y, inside the image, one point at least.
        labels: (P,), 1 or True on the object, 0 or False beside it.

    Returns:
        points float64 (P, 2) and labels int64 (P,).

    Raises:
        ValueError: "points: expected …, found …" or "point labels: expected …, found …".
    """
    points, labels = as_array(points, "points"), as_array(labels, "point labels")
    if points.dtype.kind not in "iuf" or points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise FieldError(f"points: expected numbers of shape (P, 2), x y, P > 0, found {points.dtype} {points.shape}")
    outside = ~((points >= 0) & (points < shape[::-1]))                   # NaN is outside too
    if outside.any():
        raise FieldError(f"points: expected them inside the {shape[1]}×{shape[0]} pixels, "
                         f"found point {_first(points, outside)}")
    if labels.shape != points.shape[:1] or not np.isin(labels, (0, 1)).all():
        raise FieldError(f"point labels: expected {len(points)} of 0 or 1, found {labels.dtype} {labels.shape}")
    return points.astype(np.float64), labels.astype(np.int64)


def check_columns(boxes, columns: int) -> None:
    """Check shape and dtype of boxes, of an array or of what a file announces. ValueError as in `check_boxes`."""
    shape = boxes.shape
    if boxes.dtype.kind not in "iuf":
        raise FieldError(f"boxes: expected numbers, found {boxes.dtype}")
    if 0 not in shape and (len(shape) > 2 or shape[-1:] != (columns,)):
        order = "x0 y0 z0 x1 y1 z1 of a volume" if columns == 6 else "x0 y0 x1 y1 of an image"
        raise FieldError(f"boxes: expected shape (N, {columns}), {order}, found {shape}")
    if shape[0] > 65535:
        raise FieldError(f"boxes: expected at most 65535 boxes, found {shape[0]}")


def as_array(numbers, name: str) -> np.ndarray:
    """Return numbers as an array. ValueError, one line, for rows of different lengths."""
    try:
        return np.asarray(numbers)
    except ValueError:
        raise FieldError(f"{name}: expected rows of numbers, all of one length, found several lengths") from None


def as_text(numbers) -> str:
    """Write numbers on one line, however many there are."""
    return " ".join(f"{x:g}" for x in numbers)


def _first(rows: np.ndarray, bad: np.ndarray) -> str:
    k = int(bad.any(1).argmax())
    return f"{k + 1} of {len(rows)}: {as_text(rows[k])}"
