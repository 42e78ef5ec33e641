"""What a box and a point must be: the same rules for NPZ files, users' own prompts and the Python functions."""
import numpy as np
from numpy import ndarray


class FieldError(ValueError):
    """A fault of one field, "<field>: expected …, found …", before a file's name is put in front."""


def as_numbers(values, name: str) -> ndarray:
    """Return values as a float64 array. ValueError where they are no numbers or rows of different lengths."""
    try:
        values = np.asarray(values)
    except ValueError:
        raise FieldError(f"{name}: expected rows of numbers, all of one length, found several lengths") from None
    if values.dtype.kind not in "biuf":
        raise FieldError(f"{name}: expected numbers, found {values.dtype}")
    return values.astype(np.float64)


def check_boxes(boxes, shape: tuple[int, ...], name: str, z_exclusive: bool = False) -> tuple[ndarray, list[str]]:
    """Check boxes and clip them to their image: float64 (N, 4) or (N, 6), and lines, after `name`, about those clipped.

    Boxes are x0 y0 x1 y1 on an image of `shape` (H, W), x0 y0 z0 x1 y1 z1 on a volume (D, H, W), in pixels counted
    from 0, inclusive; a single one may come without its first axis, and none as any empty array. With z_exclusive, z1
    is the slice after the last one, as the authors of MedficientSAM read it. ValueError, "boxes: expected …, found …",
    for another shape, numbers that are not finite, corners in the wrong order, and boxes wholly outside.
    """
    boxes, axes, warnings = as_numbers(boxes, "boxes"), len(shape), []
    if boxes.size and (boxes.ndim > 2 or boxes.shape[-1:] != (2 * axes,)):
        raise FieldError(f"boxes: expected shape (N, {2 * axes}), found {boxes.shape}")
    boxes = boxes.reshape(-1, 2 * axes)
    if len(boxes) > 65535:                                                # the largest label
        raise FieldError(f"boxes: expected at most 65535 boxes, found {len(boxes)}")
    lower, upper = boxes[:, :axes], boxes[:, axes:]                       # parts of `boxes`: they change together
    last = np.array(shape[::-1]) - 1                                      # x, y[, z] of the last pixel
    size = "×".join(map(str, shape[::-1]))
    if axes == 3:
        boxes[:, 2::3] = np.rint(boxes[:, 2::3])                          # z0 and z1
        if z_exclusive:
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
    over = (lower < 0) | (upper > last + [1, 1, 0][:axes])
    if over.any():
        warnings.append(f"{name}: boxes: expected them inside the {size} pixels, found {over.any(1).sum()} reaching "
                        f"over the border (first: box {_first(boxes, over)}): clipped")
    return np.hstack([lower.clip(0, last), upper.clip(0, last)]), warnings


def check_points(points, labels, shape: tuple[int, int]) -> tuple[ndarray, ndarray]:
    """Check points (P, 2), x y, on an image (H, W), and labels (P,), 1 or True on the object: float64 and int64."""
    points, labels = as_numbers(points, "points"), as_numbers(labels, "point labels")
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise FieldError(f"points: expected shape (P, 2), x y, P > 0, found {points.shape}")
    outside = ~((points >= 0) & (points < shape[::-1]))                   # NaN is outside too
    if outside.any():
        raise FieldError(f"points: expected them inside the {shape[1]}×{shape[0]} pixels, "
                         f"found point {_first(points, outside)}")
    if labels.shape != points.shape[:1] or not np.isin(labels, (0, 1)).all():
        raise FieldError(f"point labels: expected {len(points)} of 0 or 1, found {as_text(labels.flat)}")
    return points, labels.astype(np.int64)


def as_text(numbers) -> str:
    """Write numbers on one line, however many there are."""
    return " ".join(f"{x:g}" for x in numbers)


def _first(rows: ndarray, bad: ndarray) -> str:
    """Name the first of the rows in which something is bad."""
    k = int(bad.any(1).argmax())
    return f"{k + 1} of {len(rows)}: {as_text(rows[k])}"
