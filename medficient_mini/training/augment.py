"""Augmentation and targets: an image and its labels moved together, then objects as boxes and masks for the network."""
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ..inference.geometry import box_of_mask, boxes_to_network, scaled_size
from ..inference.volume import section_boxes


def augment(image, labels, rng, mode, limit):
    """Move an image, uint8 (H, W) or (H, W, 3), and its integer labels (H, W) together.

    "flips" flips each axis with probability 0.5. "full" flips, then with probability 0.5 shrinks to `limit` pixels on
    the longer side, shifts by up to 0.0625 of the side, scales by 0.8 to 1.2 and rotates by up to 90 degrees
    (MedficientSAM, Sec. 3.3). Returns image, labels and flip (horizontally, vertically), None if rotated.
    """
    if mode == "none":
        return image, labels, (False, False)
    flip = tuple((rng.random(2) < 0.5).tolist())
    axes = tuple(np.flatnonzero(flip[::-1]))                                   # rows are axis 0
    image, labels = np.flip(image, axes), np.flip(labels, axes)
    if mode == "full" and rng.random() < 0.5:
        return *shift_scale_rotate(image, labels, rng, limit), None
    return image, labels, flip


def shift_scale_rotate(image, labels, rng, limit):
    """Draw and apply the affine part of `augment`; what comes in from outside the image has its darkest value."""
    if max(labels.shape) > limit:
        size = scaled_size(*labels.shape, limit)[::-1]                         # OpenCV's order
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    size = labels.shape[::-1]
    matrix = cv2.getRotationMatrix2D(np.subtract(size, 1) / 2, rng.uniform(-90, 90), rng.uniform(0.8, 1.2))
    matrix[:, 2] += rng.uniform(-0.0625, 0.0625, 2) * size
    # The darkest value and not 0: a new minimum would change the contrast that min-max scaling gives the image.
    image = cv2.warpAffine(image, matrix, size, borderValue=[int(image.min())] * 3)
    return image, cv2.warpAffine(labels, matrix, size, flags=cv2.INTER_NEAREST)


def draw_augmented(image, labels, rng, mode, limit):
    """Apply `augment`; what moves every object out of the picture is drawn again, and left out after nine attempts."""
    for _ in range(9):
        moved = augment(image, labels, rng, mode, limit)
        if moved[1].any() or not labels.any():
            return moved
    return image, labels, (False, False)


def photometric(image, rng):
    """Change how bright, contrasted, sharp and noisy an image is, its colours, or swap black and white of a grey one.

    uint8 (H, W) or (H, W, 3) RGB gives uint8 of that shape; three of ten images are returned as they are.
    """
    is_same, gamma, contrast, inverse, colour, blur, noise = rng.random(7) < [0.3, 0.5, 0.4, 0.1, 0.5, 0.2, 0.2]
    if is_same:
        return image
    is_grey = image.ndim == 2 or (image == image[..., :1]).all()
    x = cv2.normalize(image, None, 0, 1, cv2.NORM_MINMAX, cv2.CV_32F).clip(0, 1)
    if gamma:
        x **= np.exp(rng.uniform(-0.5, 0.5))
    if contrast:
        x = (x - 0.5) * np.exp(rng.uniform(-0.35, 0.35)) + 0.5 + rng.uniform(-0.15, 0.15)
    if inverse and is_grey:
        x = 1 - x
    if colour and not is_grey:
        x = cv2.cvtColor(x.clip(0, 1).astype(np.float32), cv2.COLOR_RGB2HSV)   # hue in degrees, the others 0 to 1
        x[..., 0] = (x[..., 0] + rng.uniform(-15, 15)) % 360
        x[..., 1] *= np.exp(rng.uniform(-0.5, 0.5))
        x = cv2.cvtColor(x, cv2.COLOR_HSV2RGB)
    if blur:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 1.5))
    if noise:
        x = x + rng.normal(0, rng.uniform(0.005, 0.05), (*image.shape[:2], 1)[:image.ndim])
    return (x.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def mask_to_network(mask, size):
    """Resize a mask bool (H, W) as its image is, to uint8 (size, size) of 0 and 1 with zeros to the right and below.

    A pixel is set where half of it is covered; of a structure thinner than a pixel those that are covered most.
    """
    height, width = scaled_size(*mask.shape, size)
    interpolation = cv2.INTER_AREA if max(mask.shape) > size else cv2.INTER_LINEAR
    cover = cv2.resize(mask.astype(np.float32), (width, height), interpolation=interpolation)
    out = np.zeros((size, size), np.uint8)
    out[:height, :width] = cover >= min(0.5, max(cover.max(), 1e-6))
    return out


@dataclass(frozen=True)
class Objects:
    """How the objects of a slice become prompts and targets: at most `count` of them, in random order.

    They come as a dict of boxes (count, 4) float32, x0 y0 x1 y1 in pixels of a square of `prompt_size`, masks (count,
    mask_size, mask_size) uint8, and box_valid (count,) bool; other rows are zero. A side of a box moves outward by 0
    to `shift` pixels of the original image, then either way by up to `jitter` (below 0.5) of the box's side.
    """
    count: int
    mask_size: int
    prompt_size: int
    shift: int = 5
    jitter: float = 0.0

    def draw(self, labels, rng, factor=1.0):
        """Prompt the objects of integer labels (H, W), of which `factor` pixels are one of the original image."""
        values = rng.permutation(np.setdiff1d(labels, 0))[:self.count]
        boxes = [self.loosen(box_of_mask(labels == value), labels.shape, rng, factor) for value in values]
        return self._targets(labels, values, boxes)

    def draw_in_use(self, labels, rng, objects, z, flip):
        """Prompt the objects of slice z of a volume as inference does, by `section_boxes` of their loosened boxes.

        In z a box is loosened by up to one slice, where the right answer is an empty mask; in a slice without labels
        all are. `labels` (H, W) were flipped by `flip`, `objects` (see `SliceCache.objects`) were not.
        """
        objects = np.array(objects, float).reshape(-1, 7)
        objects[:, [3, 6]] += np.array([-1, 1]) * (rng.integers(0, 2, (len(objects), 2)) if labels.any() else 1)
        here = rng.permutation(np.flatnonzero((objects[:, 3] <= z) & (z <= objects[:, 6])))[:self.count]
        values, boxes = objects[here, 0], objects[here, 1:]
        boxes[:, [0, 1, 3, 4]] = self.loosen(boxes[:, [0, 1, 3, 4]], labels.shape, rng)
        prompts = section_boxes(boxes, z)
        for axis in np.flatnonzero(flip):
            prompts[:, [axis, axis + 2]] = labels.shape[1 - axis] - 1 - prompts[:, [axis + 2, axis]]
        return self._targets(labels, values, prompts)

    def loosen(self, boxes, shape, rng, factor=1.0):
        """Move the sides of tight boxes (..., 4), x0 y0 x1 y1, in an image of shape (H, W) at random."""
        side = np.tile(boxes[..., 2:] - boxes[..., :2] + 1, 2)
        boxes = boxes + np.array([-1, -1, 1, 1]) * rng.integers(0, self.shift + 1, boxes.shape) * factor
        boxes += rng.uniform(-self.jitter, self.jitter, boxes.shape) * side
        return np.clip(boxes, 0, [shape[1] - 1, shape[0] - 1] * 2)

    def _targets(self, labels, values, boxes):
        prompts, masks = torch.zeros(self.count, 4), np.zeros((self.count, self.mask_size, self.mask_size), np.uint8)
        for row, (value, box) in enumerate(zip(values, boxes)):
            prompts[row] = boxes_to_network(box, *labels.shape, self.prompt_size)
            masks[row] = mask_to_network(labels == value, self.mask_size)
        valid = torch.arange(self.count) < len(values)
        return {"boxes": prompts, "masks": torch.from_numpy(masks), "box_valid": valid}
