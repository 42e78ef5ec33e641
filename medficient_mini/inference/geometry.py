"""Between an image of any size and a network's square input. The one convention for pixels:

- A coordinate is a pixel index: pixel i of a row has coordinate i, zero-based; a box x0 y0 x1 y1 holds its corner pixels.
- The longest side is scaled to the network's input size, the rest padded with zeros on the right and at the bottom.
- Boxes and points stay floating point, are scaled with the image, and the prompt encoder adds SAM's half pixel.
- Logits come back at 256×256 for the padded square: enlarged to the network's size, cropped, resized to the image
  (MedficientSAM, section 2.2).
"""
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}


def scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the longest side was brought to `size`, rounded half up, at least one pixel."""
    scale = size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def to_network(image: np.ndarray, size: int, resize: str = "bilinear") -> Tensor:
    """uint8 (H, W) or (H, W, 3) RGB -> float32 (3, size, size) in [0, 1].

    Resized on uint8 without antialiasing ("bilinear": MedficientSAM, MedSAM) or by area averaging ("area":
    LiteMedSAM), then min-max normalised over the whole image, then padded with zeros.
    """
    height, width = scaled_size(*image.shape[:2], size)
    image = cv2.resize(image, (width, height), interpolation=INTERPOLATION[resize]).astype(np.float32)
    image -= image.min()
    image /= max(image.max(), 1e-8)
    padded = np.zeros((3, size, size), np.float32)
    padded[:, :height, :width] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(padded)


def boxes_to_network(boxes: np.ndarray, height: int, width: int, size: int) -> Tensor:
    """(N, 4) boxes, or (N, 2) points, in pixels of the (height, width) image -> float32 in network pixels."""
    new_height, new_width = scaled_size(height, width, size)
    boxes = np.asarray(boxes, np.float64)
    scale = np.array([new_width / width, new_height / height] * (boxes.shape[-1] // 2))
    return torch.from_numpy((boxes * scale).astype(np.float32))


@lru_cache(maxsize=64)
def enlargement(length: int, scaled: int, size: int) -> Tensor:
    """(length, 256): what one axis of the logits undergoes, 256 -> size, crop to `scaled`, -> length, as a matrix.

    Both steps are bilinear and act on rows and columns alike, so the whole way is rows @ logits @ columns.T.
    """
    steps = F.interpolate(torch.eye(256)[None], size, mode="linear", align_corners=False)[..., :scaled]
    return F.interpolate(steps, length, mode="linear", align_corners=False)[0].T.contiguous()


def enlarged_logits(logits: Tensor, height: int, width: int, size: int, region: tuple[slice, slice]) -> np.ndarray:
    """One object's logits (256, 256) -> float32 logits of the pixels of `region` (rows, columns) of the image."""
    new_height, new_width = scaled_size(height, width, size)
    rows, columns = enlargement(height, new_height, size)[region[0]], enlargement(width, new_width, size)[region[1]]
    return (rows @ logits.float().cpu() @ columns.T).numpy()


def logits_to_mask(logits: Tensor, height: int, width: int, size: int) -> np.ndarray:
    """(N, 256, 256) logits -> (N, height, width) bool: inside where the enlarged logit is above 0.

    Only the rows and columns that a positive logit reaches are computed, one mask at a time: full-size logits of
    all masks are never held.
    """
    new_height, new_width = scaled_size(height, width, size)
    rows, columns = enlargement(height, new_height, size), enlargement(width, new_width, size)
    masks = np.zeros((len(logits), height, width), bool)
    for mask, one in zip(masks, logits.float().cpu()):
        positive = one > 0
        r, c = reached(rows, positive.any(1)), reached(columns, positive.any(0))
        mask[r, c] = enlarged_logits(one, height, width, size, (r, c)) > 0
    return masks


def reached(matrix: Tensor, source: Tensor) -> slice:
    """The range of rows of `matrix` that draw on any entry of the bool vector `source`."""
    hit = (matrix[:, source] > 0).any(1).nonzero()[:, 0]
    return slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0)


def box_of_mask(mask: np.ndarray) -> np.ndarray | None:
    """Tight box x0 y0 x1 y1 (inclusive) of a (H, W) mask as float64, None where it is empty."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float64)
