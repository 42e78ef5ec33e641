"""Small NPZ cases on disk for the tests of training."""
import numpy as np

LABELS_3D = np.zeros((6, 24, 30), np.int64)
LABELS_3D[1:4, 5:12, 6:20] = 1
LABELS_3D[3, 15:20, 3:9] = 2


def write_2d(folder, name, labels=2, shape=(40, 60), seed=0, **replace):
    """Noise with `labels` rectangles of 6 x 15 pixels; an array given by name replaces ours, None leaves it out."""
    gts = np.zeros(shape, np.uint8)
    for label in range(1, labels + 1):
        gts[8 * label:8 * label + 6, 10 * label:10 * label + 15] = label
    arrays = {"imgs": np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8), "gts": gts, **replace}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder / f"{name}.npz"


def write_3d(folder, name, seed=0, **replace):
    imgs = np.random.default_rng(seed).integers(0, 256, LABELS_3D.shape, dtype=np.uint8)
    return write_2d(folder, name, **{"imgs": imgs, "gts": LABELS_3D, **replace})
