"""Pictures or NIfTI volumes with masks -> the challenge's NPZ files, for training and evaluation.

    python -m medficient_mini.userfiles.convert -i images -g masks -o npz --modality US
    python -m medficient_mini.userfiles.convert -i ct -g ct_masks -o npz --modality CT --window soft-tissue --instances

An image and its mask share their path below the two folders, the mask's with an ending such as _mask or
_segmentation if it likes, the image's with nnU-Net's _0000. `case.png` becomes 2D_US_case.npz, `anna/case.nii.gz`
3D_CT_anna-case.npz; objects are numbered 1…N in `gts`, box k belongs to object k.
"""
import argparse
import re
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ..files import first_line, list_files
from ..inference.npz import write_npz
from ..show.progress import ProgressBar
from .labels import load_label_picture
from .nifti import AXES, load_label_nifti, load_nifti
from .pictures import PICTURES, TURNED, VOLUMES, WINDOWS, is_nifti, load_picture, parse_window, stem_of

MASK_ENDING = re.compile(r"[-_. ]+(mask|masks|seg|segmentation|label|labels|gt)$", re.IGNORECASE)


def parse_arguments(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m medficient_mini.userfiles.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-i", "--images", required=True, type=Path, help="folder of pictures or NIfTI files, or one file")
    add("-g", "--masks", required=True, type=Path, help="folder of their masks, or one file")
    add("-o", "--output", required=True, type=Path, help="folder for the NPZ files")
    add("--modality", required=True, help="CT, MR, PET, US, XRay, Dermoscopy, Endoscopy, Fundus, Mammography, "
                                          "Microscopy, OCT or another")
    add("--window", nargs="+", metavar=("LEVEL", "WIDTH"),
        help=f"intensities that become 0-255: two numbers, or {', '.join(WINDOWS)} "
             "(default: 0.5 and 99.5 percentiles; 8 bits stay as they are)")
    add("--axis", choices=AXES, default="axial", help="direction of a volume's slices (default: axial)")
    add("--instances", action="store_true", help="every connected part of a label is an object of its own")
    add("--min-size", type=int, default=1, metavar="N", help="drop objects of fewer pixels or voxels")
    add("--margin", type=int, default=0, metavar="M",
        help="loosen each side of a box by a random 0…M pixels (not along z)")
    add("--seed", type=int, default=0, help="of the random margins")
    return parser.parse_args(argv)


def pair_files(images: Path, masks: Path) -> list[tuple[Path, list[Path]]]:
    """Find the masks that bear each image's name: one where all is well.

    Raises:
        ValueError: a folder has no files.
    """
    image_files, mask_files = (list_files(path, PICTURES + VOLUMES) for path in (images, masks))
    if images.is_file() and masks.is_file():
        return [(images, mask_files)]
    if images.resolve() == masks.resolve():
        image_files = [path for path in image_files if not MASK_ENDING.search(stem_of(path))]
        mask_files = [path for path in mask_files if MASK_ENDING.search(stem_of(path))]
    else:                                             # the masks' folder may lie within that of the images
        image_files = [path for path in image_files if masks.resolve() not in path.resolve().parents]
    by_name = defaultdict(list)
    for path in mask_files:
        name = name_below(masks, path)
        for key in {name, MASK_ENDING.sub("", name)}:
            by_name[key].append(path)
    pairs = []
    for path in image_files:
        name = name_below(images, path)
        pairs.append((path, by_name.get(name) or by_name.get(name.removesuffix("_0000"), [])))
    return pairs


def name_below(root: Path, path: Path) -> str:
    """Join the folders of a file below `root` and its stem by slashes: patient1/slice_01."""
    folder = path.parent.relative_to(root) if root.is_dir() else Path()
    return (folder / stem_of(path)).as_posix()


def number_objects(labels: np.ndarray, instances: bool, min_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Number the objects of a label picture or volume and put a box round each.

    Args:
        labels: integers (H, W) or (D, H, W), 0 the background.
        instances: parts that touch in no direction, diagonals included, are objects of their own (a box around
            scattered lesions is a known way to fail).
        min_size: objects of fewer pixels or voxels are dropped.

    Returns:
        gts, the objects 1…N in order of label, of the same shape, uint8 or above 255 objects uint16; boxes, int64
        (N, 4) x0 y0 x1 y1 or (N, 6) x0 y0 z0 x1 y1 z1, tight and inclusive; the number of objects dropped.

    Raises:
        ValueError: there are more than 65535 objects.
    """
    from scipy.ndimage import find_objects, label
    gts, count, dropped = np.zeros(labels.shape, np.uint16), 0, 0
    for value, place in enumerate(find_objects(labels), 1):
        if place is None:
            continue
        parts = (labels[place] == value).astype(np.int32)
        if instances:
            parts, _ = label(parts, np.ones((3,) * labels.ndim))
        for part, inner in enumerate(find_objects(parts), 1):
            inside = parts[inner] == part
            if inside.sum() < min_size:
                dropped += 1
                continue
            if count == 65535:
                raise ValueError("gts: expected at most 65535 objects, found more (see --min-size)")
            count += 1
            gts[place][inner][inside] = count
    boxes = [[*(side.start for side in place[::-1]), *(side.stop - 1 for side in place[::-1])]
             for place in find_objects(gts)]
    kind = np.uint8 if count <= 255 else np.uint16
    return gts.astype(kind), np.array(boxes, np.int64).reshape(-1, 2 * labels.ndim), dropped


def loosen(boxes: np.ndarray, shape: tuple[int, ...], margin: int, rng: np.random.Generator) -> np.ndarray:
    """Move each side of boxes (N, 4 or 6) in x and y outward by 0…margin pixels, within an image of `shape`."""
    half = boxes.shape[1] // 2
    moved = boxes.copy()
    moved[:, :2] -= rng.integers(0, margin + 1, (len(boxes), 2))
    moved[:, half:half + 2] += rng.integers(0, margin + 1, (len(boxes), 2))
    return moved.clip(0, np.tile(shape[::-1], 2) - 1)


def read_pair(image: Path, mask: Path, window, axis: str) -> tuple[dict, np.ndarray, list[str]]:
    """Read an image and its mask.

    Returns:
        The arrays `imgs`, `intensity` and for volumes `spacing`; labels uint16 on the image's pixels; lines for the
        user.

    Raises:
        ValueError: one of them cannot be read, or they do not fit together.
    """
    if is_nifti(image) != is_nifti(mask):
        raise ValueError(f"{mask.name}: gts: expected {'NIfTI' if is_nifti(image) else 'a picture'} as {image.name} is")
    if is_nifti(image):
        imgs, grid, text = load_nifti(image, axis, window)
        labels, remark = load_label_nifti(mask, grid), ""
        arrays = {"imgs": imgs, "intensity": text, "spacing": grid.spacing}
    else:
        imgs, text = load_picture(image, window)
        labels, remark = load_label_picture(mask)
        arrays = {"imgs": imgs, "intensity": text}
    turned = ""
    if TURNED in text:
        turned = f" (the image was {TURNED}, its mask was {'too' if remark and TURNED in remark else 'not'})"
    if labels.shape != imgs.shape[:labels.ndim]:
        raise ValueError(f"{mask.name}: gts: expected the image's size {imgs.shape[:2]}, found {labels.shape}{turned}")
    lines = [remark, turned and f"{mask.name}: gts: see that it fits{turned}", drop_ignored(labels, mask.name)]
    return arrays, labels, list(filter(None, lines))


def drop_ignored(labels: np.ndarray, name: str) -> str | None:
    """Set 255 to 0 where it stands for "ignore", as beside the small numbers of classes; give a line that says so."""
    values = np.flatnonzero(np.bincount(labels.ravel()))
    if len(values) < 3 or values[-1] != 255:
        return None
    highest = values[-2]
    # Evenly spaced greys, say 0, 128, 255, are labels all; so are 0…255 without a gap.
    if highest == 254 or highest > 63 and highest != len(values) - 2:
        return None
    labels[labels == 255] = 0
    return f'{name}: gts: 255 beside labels up to {highest} is taken as "ignore" and left out'


def convert(arguments) -> int:
    """Convert every pair, with one line on stderr for each that is left out; return how many failed.

    Raises:
        ValueError: an option is wrong, or there are no files.
    """
    window = parse_window(arguments.window)
    if not re.fullmatch(r"[A-Za-z0-9-]+", arguments.modality):
        raise ValueError("--modality: expected letters and digits (it becomes part of file names), "
                         f"found {arguments.modality}")
    if arguments.min_size < 0 or arguments.margin < 0:
        raise ValueError("--min-size, --margin: expected 0 or more")
    pairs = pair_files(arguments.images, arguments.masks)
    names: dict[str, Path] = {}
    count = Counter()
    bar = ProgressBar(pairs, len(pairs), "converting")
    for image, masks in bar:
        try:
            if len(masks) != 1:
                found = " and ".join(mask.name for mask in masks) or "none"
                raise ValueError(f"{image.name}: gts: expected one mask of this name in {arguments.masks}, found {found}")
            # The subfolder, which often is the patient, stays part of the name: training splits by patient.
            stem = name_below(arguments.images, image).replace("/", "-")
            name = f"{3 if is_nifti(image) else 2}D_{arguments.modality}_{stem}.npz"
            if names.setdefault(name, image) != image:
                raise ValueError(f"{image.name}: name: expected one image for {name}, found {names[name].name} too")
            arrays, labels, lines = read_pair(image, masks[0], window, arguments.axis)
            gts, boxes, small = number_objects(labels, arguments.instances, arguments.min_size)
            count["dropped"] += small
            if not len(boxes):
                count["empty"] += 1
                size = f" of {arguments.min_size} pixels" if small else ""
                lines.append(f"{image.name}: left out, its mask holds no object{size}")
            else:
                rng = np.random.default_rng([arguments.seed, zlib.crc32(name.encode())])  # in whatever order of files
                boxes = loosen(boxes, gts.shape, arguments.margin, rng)
                write_npz(arguments.output / name, gts=gts, boxes=boxes, **arrays)
                count["written"] += 1
                count["objects"] += len(boxes)
            for line in lines:
                bar.write(line)
        except Exception as error:                    # whatever is wrong with one pair, the others are converted
            count["failed"] += 1
            line = first_line(error)
            known = any(line.startswith(path.name) for path in (image, *masks))
            bar.write(line if known else f"{image.name}: {line}")
    print(f"{count['written']} written to {arguments.output} with {count['objects']} objects, {count['dropped']} objects "
          f"below --min-size dropped, {count['empty']} images without objects left out, {count['failed']} failed")
    return count["failed"]


def main(argv=None) -> int:
    """Run the command line; return 1 if an image failed or an option was wrong."""
    try:
        return 1 if convert(parse_arguments(argv)) else 0
    except (ValueError, OSError) as error:
        print(first_line(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
