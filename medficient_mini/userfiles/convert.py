"""Pictures or NIfTI volumes with masks -> the challenge's NPZ files, for training and evaluation.

    python -m medficient_mini.userfiles.convert -i images -g masks -o npz --modality US
    python -m medficient_mini.userfiles.convert -i ct -g ct_masks -o npz --modality CT --window soft-tissue --instances --min-size 100

An image and its mask share their path below the two folders, the mask's with an ending such as _mask or
_segmentation if it likes, the image's with nnU-Net's _0000. `case.png` becomes 2D_US_case.npz, `case.nii.gz`
3D_CT_case.npz; objects are numbered 1…N in `gts`, box k belongs to object k.
"""
import argparse
import re
import sys
import zlib
from pathlib import Path

import numpy as np

from ..inference.npz import write_npz
from .formats import (AXES, WINDOWS, is_nifti, list_files, load_label_nifti, load_label_picture, load_nifti,
                      load_picture, parse_window, stem_of)
from ..show.progress import progress

MASK_ENDING = re.compile(r"[-_. ]+(mask|masks|seg|segmentation|label|labels|gt)$", re.IGNORECASE)


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(prog="python -m medficient_mini.userfiles.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--images", required=True, type=Path, help="folder of pictures or NIfTI files, or one file")
    parser.add_argument("-g", "--masks", required=True, type=Path, help="folder of their masks, or one file")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the NPZ files")
    parser.add_argument("--modality", required=True,
                        help="CT, MR, PET, US, XRay, Dermoscopy, Endoscopy, Fundus, Mammography, Microscopy, OCT or another")
    parser.add_argument("--window", nargs="+", metavar=("LEVEL", "WIDTH"),
                        help=f"intensities that become 0-255: two numbers, or {', '.join(WINDOWS)} "
                             "(default: 0.5 and 99.5 percentiles; 8 bits stay as they are)")
    parser.add_argument("--axis", choices=AXES, default="axial", help="direction of a volume's slices (default: axial)")
    parser.add_argument("--instances", action="store_true", help="every connected part of a label is an object of its own")
    parser.add_argument("--min-size", type=int, default=1, metavar="N", help="drop objects of fewer pixels or voxels")
    parser.add_argument("--margin", type=int, default=0, metavar="M",
                        help="loosen each side of a box by a random 0…M pixels (not along z)")
    parser.add_argument("--seed", type=int, default=0, help="of the random margins")
    return parser.parse_args(words)


def pair_files(images: Path, masks: Path) -> list[tuple[Path, list[Path]]]:
    """Each image with the masks that bear its name: one where all is well. ValueError where a folder has no files."""
    image_files, mask_files = list_files(images), list_files(masks)
    if images.is_file() and masks.is_file():
        return [(images, [masks])]
    if images.resolve() in masks.resolve().parents:
        image_files = [path for path in image_files if masks.resolve() not in path.resolve().parents]
    if images.resolve() == masks.resolve():
        image_files = [p for p in image_files if not MASK_ENDING.search(stem_of(p))]
        mask_files = [p for p in mask_files if MASK_ENDING.search(stem_of(p))]
    by_name: dict[tuple, list[Path]] = {}
    for path in mask_files:
        for stem in {stem_of(path), MASK_ENDING.sub("", stem_of(path))}:
            by_name.setdefault((_parent(path, masks), stem), []).append(path)
    pairs = []
    for path in image_files:
        keys = [(_parent(path, images), stem) for stem in (stem_of(path), stem_of(path).removesuffix("_0000"))]
        pairs.append((path, next((by_name[key] for key in keys if key in by_name), [])))
    return pairs


def _parent(path: Path, root: Path) -> Path:
    """The folder of a file below `root`; that of `root` itself where root is the file."""
    return path.parent.relative_to(root) if root.is_dir() else Path()


def number_objects(labels: np.ndarray, instances: bool, min_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Integer labels (H, W) or (D, H, W) -> gts (objects 1…N in order of label), boxes int64, objects dropped.

    gts uint8, uint16 above 255 objects. boxes tight and inclusive, (N, 4) x0 y0 x1 y1 or (N, 6) x0 y0 z0 x1 y1 z1.
    instances: parts that touch in no direction, diagonals included, are objects of their own (a box around
    scattered lesions is a known way to fail). ValueError above 65535 objects.
    """
    from scipy.ndimage import find_objects, generate_binary_structure, label
    gts, boxes, dropped = np.zeros(labels.shape, np.uint16), [], 0
    for value, place in enumerate(find_objects(labels), 1):
        if place is None:
            continue
        parts = (labels[place] == value).astype(np.int32)
        if instances:
            parts, _ = label(parts, generate_binary_structure(labels.ndim, labels.ndim))
        for k, inner in enumerate(find_objects(parts), 1):
            part = parts[inner] == k
            if part.sum() < min_size:
                dropped += 1
                continue
            low = [p.start + i.start for p, i in zip(place, inner)][::-1]
            boxes.append(low + [p.start + i.stop - 1 for p, i in zip(place, inner)][::-1])
            if len(boxes) > 65535:
                raise ValueError("gts: expected at most 65535 objects, found more (see --min-size)")
            gts[place][inner][part] = len(boxes)
    gts = gts.astype(np.uint8) if len(boxes) <= 255 else gts
    return gts, np.array(boxes, np.int64).reshape(-1, 2 * labels.ndim), dropped


def loosen(boxes: np.ndarray, shape: tuple[int, ...], margin: int, rng: np.random.Generator) -> np.ndarray:
    """Each side in x and y moved outward by 0…margin pixels, kept inside the image or volume of `shape`."""
    half = boxes.shape[1] // 2
    moved = boxes.copy()
    moved[:, :2] -= rng.integers(0, margin + 1, (len(boxes), 2))
    moved[:, half:half + 2] += rng.integers(0, margin + 1, (len(boxes), 2))
    limits = np.array(shape[::-1]) - 1
    return moved.clip(0, np.concatenate([limits, limits]))


def read_pair(image: Path, mask: Path, window, axis: str) -> tuple[dict, np.ndarray, str | None]:
    """(arrays `imgs`, `intensity` and for volumes `spacing`; labels on the image's pixels; warning or None)."""
    if is_nifti(image) != is_nifti(mask):
        raise ValueError(f"{mask.name}: gts: expected {'NIfTI' if is_nifti(image) else 'a picture'} as {image.name} is")
    if is_nifti(image):
        volume, grid, text = load_nifti(image, axis, window)
        return {"imgs": volume, "spacing": grid.spacing, "intensity": text}, load_label_nifti(mask, grid), None
    pixels, text = load_picture(image, window)
    labels, warning = load_label_picture(mask)
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"{mask.name}: gts: expected the image's size {pixels.shape[:2]}, found {labels.shape}")
    return {"imgs": pixels, "intensity": text}, labels, warning


def convert(arguments) -> int:
    """Convert every pair; the number of images that failed. One line on stderr for each that is left out."""
    window = parse_window(arguments.window)
    if not re.fullmatch(r"[A-Za-z0-9-]+", arguments.modality):
        raise ValueError(f"--modality: expected letters and digits (it becomes part of file names), found {arguments.modality}")
    if arguments.min_size < 0 or arguments.margin < 0:
        raise ValueError("--min-size, --margin: expected 0 or more")
    pairs = pair_files(arguments.images, arguments.masks)
    names: dict[str, Path] = {}
    failed = empty = objects = dropped = 0
    for image, masks in progress(pairs, len(pairs), "converting"):
        try:
            if len(masks) != 1:
                found = " and ".join(m.name for m in masks) or "none"
                raise ValueError(f"{image.name}: gts: expected one mask of this name in {arguments.masks}, found {found}")
            stem = "-".join([*_parent(image, arguments.images).parts, stem_of(image)])
            name = f"{3 if is_nifti(image) else 2}D_{arguments.modality}_{stem}.npz"
            if names.setdefault(name, image) != image:
                raise ValueError(f"{image.name}: name: expected one image for {name}, found {names[name].name} too")
            arrays, labels, warning = read_pair(image, masks[0], window, arguments.axis)
            gts, boxes, small = number_objects(labels, arguments.instances, arguments.min_size)
            dropped += small
            if warning:
                print(warning, file=sys.stderr)
            if not len(boxes):
                empty += 1
                print(f"{image.name}: left out, its mask holds no object"
                      + (f" of {arguments.min_size} pixels" if small else ""), file=sys.stderr)
                continue
            rng = np.random.default_rng([arguments.seed, zlib.crc32(name.encode())])      # whatever the order of files
            boxes = loosen(boxes, gts.shape, arguments.margin, rng)
            write_npz(arguments.output / name, gts=gts, boxes=boxes, **arrays)
            objects += len(boxes)
        except (ValueError, OSError, MemoryError) as error:
            failed += 1
            line = str(error)
            print(line if image.name in line or masks and masks[0].name in line else f"{image.name}: {line}", file=sys.stderr)
    print(f"{len(pairs) - failed - empty} written to {arguments.output} with {objects} objects, {dropped} objects below "
          f"--min-size dropped, {empty} images without objects left out, {failed} failed")
    return failed


def main(words=None) -> int:
    try:
        return 1 if convert(parse_arguments(words)) else 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
