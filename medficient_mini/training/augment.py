"""Augmentation and targets: an image and its labels moved together, then objects as boxes and masks for the network."""
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ..inference.geometry import box_of_mask, boxes_to_network, scaled_size


@dataclass(frozen=True)
class Move:
    """What augmentation did: flips, whether shift-scale-rotate followed, the image's size over the original's."""
    flip: tuple[bool, bool] = (False, False)  # horizontal, vertical
    affine: bool = False
    factor: float = 1.0


def augment(image, labels, rng, mode, limit):
    """Move image uint8 (H, W[, 3]) and labels int (H, W) or None together; returns image, labels, Move.

    mode "none"; "flips" (each axis with p 0.5); "full" (flips, then with p 0.5 shift by up to 0.0625 of the side,
    scale by 0.8 to 1.2 and rotate by up to 90 degrees: MedficientSAM, Sec. 3.3). Before shift-scale-rotate an image
    is shrunk to `limit` pixels on its longer side, more than any network sees of it.
    """
    if mode == "none":
        return image, labels, Move()
    horizontal, vertical = (bool(x) for x in rng.random(2) < 0.5)
    step = (slice(None, None, -1 if vertical else 1), slice(None, None, -1 if horizontal else 1))
    image = np.ascontiguousarray(image[step])
    labels = None if labels is None else np.ascontiguousarray(labels[step])
    if mode == "flips" or rng.random() >= 0.5:
        return image, labels, Move((horizontal, vertical))
    longest = max(image.shape[:2])
    factor = min(1.0, limit / longest)
    if factor < 1:
        height, width = scaled_size(*image.shape[:2], limit)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        if labels is not None:
            labels = cv2.resize(labels.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST)
    image, labels = shift_scale_rotate(image, labels, rng)
    return image, labels, Move((horizontal, vertical), True, factor)


def shift_scale_rotate(image, labels, rng):
    """One draw of the affine part of `augment`; what comes in from outside the image has its darkest value."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    height, width = image.shape[:2]
    move = dict(angle=float(rng.uniform(-90, 90)), scale=float(rng.uniform(0.8, 1.2)), shear=[0.0, 0.0],
                translate=[float(rng.uniform(-0.0625, 0.0625)) * width, float(rng.uniform(-0.0625, 0.0625)) * height])
    pixels = tv_tensors.Image(torch.from_numpy(image.reshape(height, width, -1)).permute(2, 0, 1))
    # The darkest value and not 0: a new minimum would change the contrast that min-max scaling gives the image.
    moved = v2.functional.affine(pixels, interpolation=v2.InterpolationMode.BILINEAR, fill=float(image.min()), **move)
    # Interpolation mixes the border with 0 first: hence the maximum.
    image = np.maximum(np.ascontiguousarray(moved.permute(1, 2, 0).numpy().reshape(image.shape)), image.min())
    if labels is not None:
        mask = tv_tensors.Mask(torch.from_numpy(labels.astype(np.int32))[None])
        labels = v2.functional.affine(mask, interpolation=v2.InterpolationMode.NEAREST, fill=0, **move)[0].numpy()
    return image, labels


def mask_to_network(mask, size):
    """bool (H, W) -> uint8 (size, size) of 0 and 1: resized as the image is, zeros to the right and below.

    A pixel is set where at least half of it is covered; of a structure thinner than a pixel the most covered
    pixels stay, so that a non-empty mask stays non-empty.
    """
    height, width = scaled_size(*mask.shape, size)
    shrinks = height < mask.shape[0]
    cover = cv2.resize(mask.astype(np.float32), (width, height),
                       interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    out = np.zeros((size, size), np.uint8)
    out[:height, :width] = cover >= min(0.5, max(cover.max(), 1e-6))
    return out


def loose_box(mask, rng, shift=5, jitter=0.0, factor=1.0):
    """float64 (4,) x_min, y_min, x_max, y_max round a non-empty bool (H, W), inside the image.

    Each side of the tight box moves outward by 0 ... `shift` whole pixels of the original image (`factor` of them
    make one pixel of this one), then either way by up to `jitter` (< 0.5) of the box's side.
    """
    height, width = mask.shape
    box = box_of_mask(mask)
    side = np.tile(box[2:] - box[:2] + 1, 2)
    box += np.array([-1, -1, 1, 1]) * rng.integers(0, shift + 1, 4) * factor
    box += rng.uniform(-jitter, jitter, 4) * side
    return np.clip(box, 0, [width - 1, height - 1] * 2)


@dataclass(frozen=True)
class Objects:
    """How the objects of a slice become prompts and targets; `prompt_size` is the side of the boxes' frame."""
    count: int
    mask_size: int
    prompt_size: int
    shift: int = 5
    jitter: float = 0.0

    def draw(self, labels, rng, factor):
        """Up to `count` different labels of an int (H, W) or None, in random order, the rest of the rows zero.

        boxes (count, 4) float32, masks (count, mask_size, mask_size) uint8, box_valid (count,) bool.
        """
        boxes = torch.zeros(self.count, 4)
        masks = np.zeros((self.count, self.mask_size, self.mask_size), np.uint8)
        valid = torch.zeros(self.count, dtype=torch.bool)
        values = [] if labels is None else np.flatnonzero(np.bincount(labels.ravel()))
        values = rng.permutation([value for value in values if value > 0])[:self.count]
        for row, value in enumerate(values):
            mask = labels == value
            box = loose_box(mask, rng, self.shift, self.jitter, factor)
            boxes[row] = boxes_to_network(box[None], *mask.shape, self.prompt_size)[0]
            masks[row] = mask_to_network(mask, self.mask_size)
            valid[row] = True
        return {"boxes": boxes, "masks": torch.from_numpy(masks), "box_valid": valid}


def draw_augmented(image, labels, rng, mode, limit, objects):
    """`augment`, then objects (None: no objects); returns image, Move, dict of boxes, masks and box_valid.

    Augmentation that moves every object out of the picture is drawn again, in the end left out.
    """
    labelled = objects is not None and labels is not None and bool(labels.any())
    for attempt in range(10):
        moved, moved_labels, move = augment(image, labels, rng, mode if attempt < 9 else "none", limit)
        if not labelled or moved_labels.any():
            break
    return moved, move, {} if objects is None else objects.draw(moved_labels, rng, move.factor)
