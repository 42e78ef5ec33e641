"""Between an image of any size and a network's square input. The one convention for pixels:

- Coordinates are pixel indices, zero-based; a box x0 y0 x1 y1 holds its corner pixels.
- The longest side is scaled to the network's input size, the rest padded with zeros on the right and at the bottom.
- Boxes and points stay floating point, are scaled with the image, and the prompt encoder adds SAM's half pixel.
- Logits come back at 256×256 for the padded square: enlarged to the network's size, cropped, resized to the image
  (SAM's `postprocess_masks`; MedficientSAM, section 2.2).

`height` and `width` are always the image's, in pixels, and `size` is the side of the network's input.
"""
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)       # of red, green and blue
Region = tuple[slice, slice]         # rows and columns of an image


def scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width after the longest side was brought to `size`, rounded half up, at least one pixel."""
    scale = size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def to_network(image: ndarray, size: int, resize: str = "bilinear") -> Tensor:
    """Turn an image, uint8 (H, W) or (H, W, 3) RGB, into a network's input, float32 (3, size, size) in [0, 1].

    It is resized as uint8 without antialiasing ("bilinear": MedficientSAM, MedSAM) or by area averaging ("area":
    LiteMedSAM), min-max normalised over the whole image, and padded.
    """
    height, width = scaled_size(*image.shape[:2], size)
    method = cv2.INTER_AREA if resize == "area" else cv2.INTER_LINEAR
    image = cv2.resize(image, (width, height), interpolation=method).astype(np.float32)
    image -= image.min()
    image /= max(image.max(), 1e-8)
    padded = np.zeros((3, size, size), np.float32)
    padded[:, :height, :width] = np.atleast_3d(image).transpose(2, 0, 1)
    return torch.from_numpy(padded)


def sam_input(image: ndarray, size: int) -> Tensor:
    """Do the same in SAM's way: antialiased, colours normalised by mean and deviation of natural images."""
    height, width = scaled_size(*image.shape[:2], size)
    x = torch.from_numpy(np.atleast_3d(image).copy()).permute(2, 0, 1).expand(3, -1, -1)[None]
    x = F.interpolate(x.contiguous(), (height, width), mode="bilinear", antialias=True)[0].float()
    x = (x - torch.tensor(SAM_MEAN)[:, None, None]) / torch.tensor(SAM_STD)[:, None, None]
    return F.pad(x, (0, size - width, 0, size - height))


def boxes_to_network(boxes: ndarray, height: int, width: int, size: int) -> Tensor:
    """Scale boxes (..., 4) or points (..., 2) from pixels of the image to float32 pixels of the network."""
    new_height, new_width = scaled_size(height, width, size)
    boxes = np.asarray(boxes, np.float64)
    scale = np.array([new_width / width, new_height / height] * (boxes.shape[-1] // 2))
    return torch.from_numpy((boxes * scale).astype(np.float32))


def postprocess_masks(logits: Tensor, height: int, width: int, size: int) -> Tensor:
    """Enlarge logits (N, C, 256, 256) to the image as SAM does; `enlarged_logits` is the same up to rounding."""
    new_height, new_width = scaled_size(height, width, size)
    logits = F.interpolate(logits, (size, size), mode="bilinear")
    logits = logits[..., :new_height, :new_width]
    return F.interpolate(logits, (height, width), mode="bilinear")


@lru_cache(maxsize=2)                # 8 MB for 4000×4000 pixels; all slices of a volume share one pair
def enlargement(height: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the linear `postprocess_masks` as two matrices: rows (height, 256) @ logits @ columns (width, 256).T."""
    steps = F.interpolate(torch.eye(256)[None], size, mode="linear")
    return tuple(F.interpolate(steps[..., :scaled], length, mode="linear")[0].T.contiguous()
                 for scaled, length in zip(scaled_size(height, width, size), (height, width)))


def enlarged_logits(logits: Tensor, height: int, width: int, size: int, region: Region) -> ndarray:
    """Enlarge the logits (256, 256) of one object, on the CPU, in a region of the image alone; float32."""
    rows, columns = enlargement(height, width, size)
    return (rows[region[0]] @ logits @ columns[region[1]].T).numpy()


def reached_region(logits: Tensor, height: int, width: int, size: int) -> Region:
    """Return the smallest region of the image outside of which no positive logit of (256, 256) has any influence."""
    spans = []
    for matrix, axis in zip(enlargement(height, width, size), (1, 0)):
        hit = (matrix[:, (logits > 0).any(axis)] > 0).any(1).nonzero()
        spans.append(slice(hit[0].item(), hit[-1].item() + 1) if len(hit) else slice(0))
    return tuple(spans)


def logits_to_mask(logits: Tensor, height: int, width: int, size: int) -> ndarray:
    """Turn logits (N, 256, 256) into masks (N, height, width) bool: inside where the enlarged logit is above 0."""
    masks = np.zeros((len(logits), height, width), bool)
    for mask, one in zip(masks, logits):
        region = reached_region(one, height, width, size)
        mask[region] = enlarged_logits(one, height, width, size, region) > 0
    return masks


def box_of_mask(mask: ndarray) -> ndarray | None:
    """Return the tight box x0 y0 x1 y1 (inclusive) of a mask (H, W) as float64, None where it is empty."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + width - 1, y + height - 1], float) if width else None
