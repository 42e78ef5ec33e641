"""Draw the synthetic demo cases: `python -m medficient_mini.demo.make [FOLDER]`.

Phantoms, not patients: a skin lesion (RGB), a cyst in speckle (grey), stained nuclei (RGB, many boxes) and a small
CT-like volume with three organs. Each file has the challenge's fields `imgs`, `gts`, `boxes` (and `spacing`).
"""
import itertools
import sys
from pathlib import Path

import cv2
import numpy as np


def smooth_noise(rng, shape, sigma: float) -> np.ndarray:
    """Return Gaussian-filtered white noise (H, W) of zero mean and unit variance."""
    noise = blurred(rng.standard_normal(shape), sigma)
    return (noise - noise.mean()) / noise.std()


def blurred(image, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma)


def blob(rng, shape, centre, radii, angle=0.0, roughness=0.08) -> np.ndarray:
    """Return bool (H, W): an ellipse (cy, cx), (ry, rx) with a wavy outline."""
    y, x = np.indices(shape) - np.reshape(centre, (2, 1, 1)).astype(float)
    y, x = y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)
    direction = np.arctan2(y, x)
    wave = sum(rng.uniform(-1, 1) * np.cos(k * direction + rng.uniform(0, 6.28)) / k for k in range(2, 7))
    return np.hypot(y / radii[0], x / radii[1]) < 1 + roughness * wave


def stained(rng, gts, softness: float, *layers) -> np.ndarray:
    """Return RGB (H, W, 3): outside and inside of the labels, each layer with its (colour, contrast, grain)."""
    outside, inside = [np.array(colour) + contrast * smooth_noise(rng, gts.shape, grain)[..., None]
                       for colour, contrast, grain in layers]
    soft = blurred(gts > 0, softness)[..., None]
    return outside * (1 - soft) + inside * soft + 3 * rng.standard_normal((*gts.shape, 3))


def dermoscopy(rng):
    gts = blob(rng, (300, 400), (150, 205), (78, 105), 0.3).astype(np.uint8)
    return stained(rng, gts, 4, ([214, 168, 150.], 5, 12), ([112, 68, 55.], 14, 6)), gts


def ultrasound(rng):
    shape = (256, 320)
    gts = np.zeros(shape, np.uint8)
    gts[blob(rng, shape, (110, 110), (38, 52), 0.2)] = 1
    gts[blob(rng, shape, (165, 235), (26, 30))] = 2
    tissue = blurred(np.choose(gts, [105 + 22 * smooth_noise(rng, shape, 14), 22, 40]), 1.5)
    speckle = np.abs(smooth_noise(rng, shape, 0.9) + 1j * smooth_noise(rng, shape, 0.9)) / 1.25
    return tissue * (0.45 + 0.55 * speckle), gts


def microscopy(rng):
    gts, label = np.zeros((256, 256), np.uint8), 0
    for cy, cx in itertools.product(range(32, 250, 48), range(30, 250, 49)):
        if rng.random() < 0.6:
            label += 1
            centre = (cy + rng.uniform(-7, 7), cx + rng.uniform(-7, 7))
            gts[blob(rng, gts.shape, centre, rng.uniform(9, 15, 2), rng.uniform(0, 3))] = label
    return stained(rng, gts, 1.2, ([228, 192, 222.], 9, 5), ([112, 72, 158.], 12, 2)), gts


def ct_volume(rng):
    gts = np.zeros((20, 128, 160), np.uint8)
    image = np.zeros(gts.shape)
    organs = [((60, 48), (30, 32), 9, 10, 165), ((58, 112), (20, 17), 11, 7, 130), ((92, 84), (12, 14), 8, 6, 205)]
    for z, labels in enumerate(gts):
        slice_ = np.where(blob(rng, labels.shape, (64, 80), (54, 72), 0, 0.0), 92.0, 5.0)
        for label, (centre, radii, middle, half, grey) in enumerate(organs, 1):
            scale = 1 - ((z - middle) / half) ** 2
            if scale > 0.03:
                radii = np.sqrt(scale) * np.array(radii)
                organ = blob(np.random.default_rng(label), labels.shape, centre, radii, 0.2, 0.06)
                labels[organ], slice_[organ] = label, grey
        image[z] = blurred(slice_, 1.0) + 5 * rng.standard_normal(labels.shape)
    return image, gts


CASES = {"2D_Dermoscopy_demo": dermoscopy, "2D_US_demo": ultrasound, "2D_Microscopy_demo": microscopy,
         "3D_CT_demo": ct_volume}


def draw(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of the case of this name, one of CASES, the same each time."""
    image, gts = CASES[name](np.random.default_rng(list(CASES).index(name)))
    places = [np.argwhere(gts == label)[:, ::-1] for label in range(1, gts.max() + 1)]         # x, y[, z]
    boxes = np.array([[*place.min(0), *place.max(0)] for place in places])
    spacing = {"spacing": np.array([5.0, 2.0, 2.0])} if gts.ndim == 3 else {}
    return {"imgs": image.clip(0, 255).astype(np.uint8), "gts": gts, "boxes": boxes, **spacing}


def main(argv=None) -> int:
    """Write the cases into the folder that the first argument names, else beside this file."""
    arguments = sys.argv[1:] if argv is None else argv
    folder = Path(arguments[0] if arguments else Path(__file__).parent)
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        np.savez_compressed(folder / f"{name}.npz", **draw(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
