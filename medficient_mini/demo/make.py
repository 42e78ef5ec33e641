"""Draw the synthetic demo cases: `python -m medficient_mini.demo.make [FOLDER]`.

Phantoms, not patients: a skin lesion (RGB), a cyst in speckle (grey), stained nuclei (RGB, many boxes) and a small
CT-like volume with three organs. Each file has the challenge's fields `imgs`, `gts`, `boxes` (and `spacing`).
"""
import sys
from pathlib import Path

import cv2
import numpy as np


def smooth_noise(rng, shape, sigma: float) -> np.ndarray:
    """Gaussian-filtered white noise (H, W), zero mean, unit variance."""
    noise = cv2.GaussianBlur(rng.standard_normal(shape).astype(np.float32), (0, 0), sigma)
    return (noise - noise.mean()) / noise.std()


def blob(rng, shape, centre, radii, angle=0.0, roughness=0.08) -> np.ndarray:
    """bool (H, W): an ellipse (cy, cx), (ry, rx) with a wavy outline."""
    y, x = np.mgrid[:shape[0], :shape[1]].astype(np.float64)
    y, x = y - centre[0], x - centre[1]
    y, x = y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)
    direction = np.arctan2(y, x)
    wave = sum(rng.uniform(-1, 1) * np.cos(k * direction + rng.uniform(0, 6.28)) / k for k in range(2, 7))
    return np.hypot(y / radii[0], x / radii[1]) < 1 + roughness * wave


def boxes_of(gts: np.ndarray) -> np.ndarray:
    """Tight inclusive boxes of labels 1..N: (N, 4) x0 y0 x1 y1, or (N, 6) x0 y0 z0 x1 y1 z1 for a volume."""
    boxes = []
    for label in range(1, gts.max() + 1):
        where = np.nonzero(gts == label)[::-1]                               # x, y[, z]
        boxes.append([axis.min() for axis in where] + [axis.max() for axis in where])
    return np.array(boxes, np.int64)


def dermoscopy(rng) -> dict:
    shape = (300, 400)
    lesion = blob(rng, shape, (150, 205), (78, 105), 0.3)
    soft = cv2.GaussianBlur(lesion.astype(np.float32), (0, 0), 4)[..., None]
    skin = np.array([214, 168, 150.]) + 5 * smooth_noise(rng, shape, 12)[..., None]
    mole = np.array([112, 68, 55.]) + 14 * smooth_noise(rng, shape, 6)[..., None]
    image = skin * (1 - soft) + mole * soft + 3 * rng.standard_normal((*shape, 3))
    gts = lesion.astype(np.uint8)
    return {"imgs": image.clip(0, 255).astype(np.uint8), "gts": gts, "boxes": boxes_of(gts)}


def ultrasound(rng) -> dict:
    shape = (256, 320)
    gts = np.zeros(shape, np.uint8)
    gts[blob(rng, shape, (110, 110), (38, 52), 0.2)] = 1
    gts[blob(rng, shape, (165, 235), (26, 30))] = 2
    tissue = 105 + 22 * smooth_noise(rng, shape, 14)
    tissue = np.where(gts == 1, 22, np.where(gts == 2, 40, tissue))
    tissue = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), 1.5)
    speckle = np.abs(smooth_noise(rng, shape, 0.9) + 1j * smooth_noise(rng, shape, 0.9)) / 1.25
    image = tissue * (0.45 + 0.55 * speckle)
    return {"imgs": image.clip(0, 255).astype(np.uint8), "gts": gts, "boxes": boxes_of(gts)}


def microscopy(rng) -> dict:
    shape = (256, 256)
    gts, label = np.zeros(shape, np.uint8), 0
    for cy in range(32, 250, 48):
        for cx in range(30, 250, 49):
            if rng.random() < 0.6:
                label += 1
                centre = (cy + rng.uniform(-7, 7), cx + rng.uniform(-7, 7))
                gts[blob(rng, shape, centre, rng.uniform(9, 15, 2), rng.uniform(0, 3))] = label
    stain = cv2.GaussianBlur((gts > 0).astype(np.float32), (0, 0), 1.2)[..., None]
    tissue = np.array([228, 192, 222.]) + 9 * smooth_noise(rng, shape, 5)[..., None]
    nuclei = np.array([112, 72, 158.]) + 12 * smooth_noise(rng, shape, 2)[..., None]
    image = tissue * (1 - stain) + nuclei * stain + 3 * rng.standard_normal((*shape, 3))
    return {"imgs": image.clip(0, 255).astype(np.uint8), "gts": gts, "boxes": boxes_of(gts)}


def ct_volume(rng) -> dict:
    depth, shape = 20, (128, 160)
    gts = np.zeros((depth, *shape), np.uint8)
    image = np.zeros((depth, *shape), np.uint8)
    organs = [((60, 48), (30, 32), 9, 10, 165), ((58, 112), (20, 17), 11, 7, 130), ((92, 84), (12, 14), 8, 6, 205)]
    for z in range(depth):
        body = blob(rng, shape, (64, 80), (54, 72), 0, 0.0)
        slice_ = np.where(body, 92.0, 5.0)
        for label, (centre, radii, middle, half, grey) in enumerate(organs, 1):
            scale = 1 - ((z - middle) / half) ** 2
            if scale > 0.03:
                organ = blob(np.random.default_rng(label), shape, centre, np.sqrt(scale) * np.array(radii), 0.2, 0.06)
                gts[z][organ], slice_[organ] = label, grey
        slice_ = cv2.GaussianBlur(slice_.astype(np.float32), (0, 0), 1.0) + 5 * rng.standard_normal(shape)
        image[z] = slice_.clip(0, 255)
    return {"imgs": image, "gts": gts, "boxes": boxes_of(gts), "spacing": np.array([5.0, 2.0, 2.0])}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    cases = {"2D_Dermoscopy_demo": dermoscopy, "2D_US_demo": ultrasound, "2D_Microscopy_demo": microscopy,
             "3D_CT_demo": ct_volume}
    for seed, (name, draw) in enumerate(cases.items()):
        np.savez_compressed(folder / f"{name}.npz", **draw(np.random.default_rng(seed)))


if __name__ == "__main__":
    main()
