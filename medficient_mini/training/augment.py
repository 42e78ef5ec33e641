"""Augmentation and targets: an image and its labels moved together, then objects as boxes and masks for the network."""
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ..inference.geometry import box_of_mask, boxes_to_network, scaled_size
from ..inference.volume import section_boxes


def augment(image, labels, rng, mode, limit):
    """Move an image and its labels together.

    Args:
        image: uint8 (H, W) or (H, W, 3).
        labels: integers (H, W).
        mode: "none"; "flips", of each axis with probability 0.5; or "full", flips and then, with probability 0.5, a
            shift by up to 0.0625 of the side, a scale of 0.8 to 1.2 and a rotation by up to 90 degrees
            (MedficientSAM, section 3.3).
        limit: before shift-scale-rotate an image is shrunk to so many pixels on its longer side.

    Returns:
        image, labels: moved.
        flip: whether they were flipped (horizontally, vertically), None where they were rotated too.
    """
    if mode == "none":
        return image, labels, (False, False)
    flip = tuple((rng.random(2) < 0.5).tolist())
    axes = tuple(np.flatnonzero(flip[::-1]))                                   # rows are axis 0
    # Copies, since torch takes no negative strides, which np.ascontiguousarray leaves an axis of length 1.
    image, labels = np.flip(image, axes).copy(), np.flip(labels, axes).copy()
    if mode == "flips" or rng.random() >= 0.5:
        return image, labels, flip
    if max(labels.shape) > limit:
        height, width = scaled_size(*labels.shape, limit)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        labels = cv2.resize(labels.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST)
    return *shift_scale_rotate(image, labels, rng), None


def shift_scale_rotate(image, labels, rng):
    """Draw and apply the affine part of `augment`; what comes in from outside the image has its darkest value."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import affine

    move = dict(angle=rng.uniform(-90, 90), scale=rng.uniform(0.8, 1.2), shear=[0.0, 0.0],
                translate=list(rng.uniform(-0.0625, 0.0625, 2) * labels.shape[::-1]))
    pixels = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)                          # (1 or 3, H, W)
    # The darkest value and not 0: a new minimum would change the contrast that min-max scaling gives the image.
    moved = affine(pixels, interpolation=InterpolationMode.BILINEAR, fill=float(image.min()), **move)
    # Interpolation mixes the border with 0 first: hence the maximum.
    image = np.maximum(moved.permute(1, 2, 0).numpy().reshape(image.shape), image.min(), order="C")
    labels = torch.from_numpy(labels.astype(np.int32))[None]
    return image, affine(labels, interpolation=InterpolationMode.NEAREST, **move)[0].numpy()


def photometric(image, rng):
    """Change how bright, contrasted, sharp and noisy an image is, its colours, or swap black and white of a grey one.

    Clinics' devices differ in just that. Three of ten images are returned as they are, the same array.

    image uint8 (H, W) or (H, W, 3) RGB -> uint8 of the same shape; its range of values is spread to 0-255 first.
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

    A pixel is set where at least half of it is covered. Of a structure thinner than a pixel those that are covered
    most are set, so that a mask that is not empty stays so.
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

    Boxes are given in pixels of a square of `prompt_size`, masks in one of `mask_size`, as the image is scaled and
    padded to it. Each side of a tight box moves outward by 0 to `shift` whole pixels of the original image, then
    either way by up to `jitter` (below 0.5) of the box's side, and stays inside the image.
    """
    count: int
    mask_size: int
    prompt_size: int
    shift: int = 5
    jitter: float = 0.0

    def draw(self, labels, rng, factor=1.0):
        """Prompt the objects of an image with their own loosened boxes.

        Args:
            labels: integers (H, W), 0 for the background; `factor` pixels of them are one of the original image.

        Returns:
            dict of boxes (count, 4) float32, x0 y0 x1 y1, masks (count, mask_size, mask_size) uint8 and box_valid
            (count,) bool; the rows that are not valid are zero.
        """
        values = rng.permutation(np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1)[:self.count]
        boxes = [self.loosen(box_of_mask(labels == value), labels.shape, rng, factor) for value in values]
        return self._targets(labels, values, boxes)

    def draw_in_use(self, labels, rng, objects, z, flip):
        """Prompt the objects of slice z of a volume as inference does, by `section_boxes` of their loosened boxes.

        In z a box is loosened by up to one slice: where it reaches beyond its object the right answer is an empty
        mask. In a slice without any label all boxes reach so far.

        Args:
            labels: integers (H, W) of the slice, which was flipped by `flip` (horizontally, vertically).
            objects: N lists of label and tight box x0 y0 z0 x1 y1 z1, not flipped (see `SliceCache.objects`).

        Returns:
            dict as that of `draw`.
        """
        objects = np.array(objects, float).reshape(-1, 7)
        values, boxes = objects[:, 0], objects[:, 1:]
        boxes[:, [2, 5]] += np.array([-1, 1]) * (rng.integers(0, 2, (len(boxes), 2)) if labels.any() else 1)
        here = rng.permutation(np.flatnonzero((boxes[:, 2] <= z) & (z <= boxes[:, 5])))[:self.count]
        boxes = boxes[here]
        boxes[:, [0, 1, 3, 4]] = self.loosen(boxes[:, [0, 1, 3, 4]], labels.shape, rng)
        prompts = section_boxes(boxes, z)
        for axis, length in enumerate(labels.shape[::-1]):
            if flip[axis]:
                prompts[:, [axis, axis + 2]] = length - 1 - prompts[:, [axis + 2, axis]]
        return self._targets(labels, values[here], prompts)

    def loosen(self, boxes, shape, rng, factor=1.0):
        """Move the sides of tight boxes (..., 4), x0 y0 x1 y1, in an image of shape (H, W) at random."""
        side = np.tile(boxes[..., 2:] - boxes[..., :2] + 1, 2)
        boxes = boxes + np.array([-1, -1, 1, 1]) * rng.integers(0, self.shift + 1, boxes.shape) * factor
        boxes += rng.uniform(-self.jitter, self.jitter, boxes.shape) * side
        return np.clip(boxes, 0, [shape[1] - 1, shape[0] - 1] * 2)

    def _targets(self, labels, values, boxes):
        targets = {"boxes": torch.zeros(self.count, 4),
                   "masks": torch.zeros(self.count, self.mask_size, self.mask_size, dtype=torch.uint8),
                   "box_valid": torch.arange(self.count) < len(values)}
        for row, (value, box) in enumerate(zip(values, boxes)):
            targets["boxes"][row] = boxes_to_network(box[None], *labels.shape, self.prompt_size)[0]
            targets["masks"][row] = torch.from_numpy(mask_to_network(labels == value, self.mask_size))
        return targets


def draw_augmented(image, labels, rng, mode, limit):
    """Apply `augment`; what moves every object out of the picture is drawn again, and left out after nine attempts."""
    for _ in range(9):
        moved = augment(image, labels, rng, mode, limit)
        if moved[1].any() or not labels.any():
            return moved
    return image, labels, (False, False)
