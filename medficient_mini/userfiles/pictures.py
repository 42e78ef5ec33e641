"""Pictures (PNG, JPEG, TIFF, BMP) and NIfTI volumes in and out, and how their intensities become 0–255.

A NIfTI volume is turned so that its slices lie along one anatomical axis and look as on a radiologist's screen (axial:
slices upward, rows to the back, columns to the patient's left); `Grid` knows the way there and back, so masks are
written on the file's own voxel grid with its own affine. nibabel is imported only where a NIfTI file is opened.
Errors are ValueErrors of one line, "<file name>: <field>: expected …, found …".
"""
import os
from pathlib import Path

import cv2
import numpy as np

from ..files import whole_file

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUMES = (".nii", ".nii.gz")
WINDOWS = {"soft-tissue": (40.0, 400.0), "lung": (-600.0, 1500.0), "bone": (400.0, 1800.0), "brain": (40.0, 80.0)}
PERCENTILES = (0.5, 99.5)            # of the non-zero numbers: MedSAM's preparation
SAMPLE = 1 << 23                     # numbers that percentiles are taken from; smaller images give all of theirs
LARGEST = 16 << 30                   # voxels × bytes of one volume; far above any scan
# What slices, rows and columns run towards: Superior, Inferior, Left, Posterior.
AXES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}


def is_picture(path) -> bool:
    return str(path).lower().endswith(PICTURES)


def is_nifti(path) -> bool:
    return str(path).lower().endswith(VOLUMES)


def stem_of(path) -> str:
    """File name without its ending, where .nii.gz is one ending."""
    name = Path(path).name
    for suffix in (".nii.gz", *PICTURES, ".nii", ".npz"):
        if name.lower().endswith(suffix):
            return name[:-len(suffix)]
    return name


def list_files(path, suffixes=PICTURES + VOLUMES) -> list[Path]:
    """The files with these endings in a folder and its subfolders, sorted, or the one file. ValueError if none."""
    path = Path(path)
    wanted = ", ".join(suffixes)
    if path.is_file():
        if not path.name.lower().endswith(suffixes):
            raise ValueError(f"{path}: expected a folder or a file that ends in {wanted}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder or a file, found nothing of that name")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ValueError(f"{path}: no permission to read this folder")
    found = sorted(p for p in path.rglob("*") if p.name.lower().endswith(suffixes) and p.is_file()
                   and not p.name.startswith("."))
    if not found:
        raise ValueError(f"{path}: expected files that end in {wanted} in this folder, found none")
    return found


# --------------------------------------------------------------------------------------------------- intensities

def parse_window(words: list[str] | None) -> tuple[float, float] | None:
    """["lung"] or ["-600", "1500"] -> (level, width). ValueError for an unknown name or a width that is not positive."""
    if words is None:
        return None
    if len(words) == 1 and words[0] in WINDOWS:
        return WINDOWS[words[0]]
    try:
        level, width = map(float, words)
        if np.isfinite([level, width]).all() and width > 0:
            return level, width
    except ValueError:
        pass
    raise ValueError(f"--window: expected LEVEL WIDTH with a width above 0, or one of {', '.join(WINDOWS)}, "
                     f"found {' '.join(words)}")


def intensity_range(sample: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float, str]:
    """(low, high, description): what becomes 0 and 255, from the window, else from percentiles of the sample."""
    if window is not None:
        level, width = window
        return level - width / 2, level + width / 2, f"window level {level:g} width {width:g}"
    numbers = sample[np.isfinite(sample) & (sample != 0)]
    low, high = map(float, np.percentile(numbers, PERCENTILES)) if len(numbers) else (0.0, 0.0)
    return low, high, f"{PERCENTILES[0]:g} and {PERCENTILES[1]:g} percentiles of non-zero values: {low:g} to {high:g}"


def to_uint8(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers of any type and shape -> uint8, low and below to 0, high and above to 255, linear between, NaN to 0."""
    scaled = (np.asarray(array, np.float32) - low) * (255 / max(high - low, 1e-12))
    return np.nan_to_num(scaled.clip(0, 255) + 0.5, nan=0.0).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ pictures

def read_pixels(path) -> np.ndarray:
    """A picture as it is: (H, W) grey or (H, W, 3) RGB in the file's type; palette expanded, alpha dropped (from a TIFF
    OpenCV hands over RGB already multiplied by it).

    A JPEG is turned as its EXIF orientation says, which is how every viewer shows it.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)    # its complaints would double our one line
    path = Path(path)
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ValueError(f"{path.name}: file: expected a readable picture, found {error.strerror}") from None
    jpeg = path.name.lower().endswith((".jpg", ".jpeg"))
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH if jpeg else cv2.IMREAD_UNCHANGED
    try:
        pixels = cv2.imdecode(data, flags) if len(data) else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ValueError(f"{path.name}: file: expected a PNG, JPEG, TIFF or BMP picture, found damaged or other data")
    if path.name.lower().endswith((".tif", ".tiff")) and cv2.imcount(str(path)) > 1:
        raise ValueError(f"{path.name}: file: expected one picture, found {cv2.imcount(str(path))} pages")
    if pixels.ndim == 3 and pixels.shape[2] not in (3, 4):
        raise ValueError(f"{path.name}: file: expected grey or RGB, found {pixels.shape[2]} channels")
    return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., 2::-1])


def load_picture(path, window: tuple[float, float] | None = None) -> tuple[np.ndarray, str]:
    """A picture as uint8 (H, W, 3) RGB, and a line that says how its intensities were mapped.

    8 bits stay as they are unless a window is given; 16 bits and floats are mapped (see `intensity_range`).
    """
    pixels = read_pixels(path)
    if pixels.dtype == np.uint8 and window is None:
        text = "8 bits as they are"
    else:
        low, high, text = intensity_range(pixels.ravel()[::-(-pixels.size // SAMPLE)], window)
        pixels = to_uint8(pixels, low, high)
    return (np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels), text


def load_label_picture(path) -> tuple[np.ndarray, str | None]:
    """A mask picture as uint16 labels (H, W), 0 the background, and a warning or None.

    Grey: the grey values are the labels, {0, 255} one object. Colour: every colour but black is an object, numbered in
    order of (R, G, B). A smoothed or JPEG-compressed black and white mask (more than 16 grey values, fewer pixels
    between black and white than white ones) is cut at 128, with a warning.
    """
    path = Path(path)
    pixels = read_pixels(path)
    if not are_labels(pixels):
        raise ValueError(f"{path.name}: gts: expected whole numbers 0 to 65535, found others ({pixels.dtype})")
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim == 3:
        code = (pixels.astype(np.int64) << np.array([32, 16, 0])).sum(-1)
        colours, labels = np.unique(code, return_inverse=True)
        if len(colours) > 256:
            raise ValueError(f"{path.name}: gts: expected at most 255 colours of objects on black, found {len(colours)} colours")
        black = int(colours[0] == 0)
        return (labels.reshape(code.shape) + 1 - black).astype(np.uint16), None
    values = np.unique(pixels)
    between = ((pixels > 15) & (pixels < 240)).sum()
    if pixels.dtype == np.uint8 and len(values) > 16 and between < (pixels >= 240).sum():
        return (pixels > 127).astype(np.uint16), f"{path.name}: gts: a black and white mask with soft edges, cut at 128"
    return pixels.astype(np.uint16), None


def are_labels(array: np.ndarray) -> bool:
    if array.dtype in (np.uint8, np.uint16):
        return True
    return bool(np.isfinite(array).all() and array.min() >= 0 and array.max() < 65536 and (array == np.rint(array)).all())


def save_label_picture(path, segs: np.ndarray) -> None:
    """Labels (H, W) uint8 or uint16 -> grey PNG of those numbers, whole or absent."""
    with whole_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", segs)[1].tobytes())
