"""Pictures or volumes with masks -> the challenge's NPZ files, for training and evaluation.

    python -m medficient_mini.userfiles.convert -i images -g masks -o npz --modality US
    python -m medficient_mini.userfiles.convert -i ct -g ct_masks -o npz --modality CT --window soft-tissue --instances

An image and its mask share their path below the two folders, the mask's with an ending such as _mask or
_segmentation if it likes, the image's with nnU-Net's _0000. `case.png` becomes 2D_US_case.npz, `anna/case.nii.gz`
3D_CT_anna-case.npz; objects are numbered 1…N in `gts`, box k belongs to object k.
"""
import re
import sys
from pathlib import Path

import numpy as np

from ..files import exit_status, first_line, option_parser
from ..inference.names import composed
from ..inference.npz import write_npz
from ..show.progress import ProgressBar
from .labels import load_label_picture
from .pictures import TURNED, is_picture, load_picture, parse_window, stem_of
from .prompts import add_reading_options
from .volumes import list_images, load_labels, load_volume

MASK_ENDING = re.compile(r"[-_. ]+(masks?|seg|segmentation|labels?|gt)$", re.IGNORECASE)


def parse_arguments(argv=None):
    """Read the command line."""
    parser, add = option_parser(__doc__, prog="python -m medficient_mini.userfiles.convert")
    add("-i --images", Path, "folder of pictures or volumes, or one", required=True)
    add("-g --masks", Path, "folder of their masks, or one file", required=True)
    add("-o --output", Path, "folder for the NPZ files", required=True)
    add("--modality", str, "CT, MR, PET, US, XRay, Dermoscopy, Endoscopy, Fundus, Mammography, Microscopy, OCT or "
        "another", required=True)
    add_reading_options(parser)
    add("--instances", False, "every connected part of a label is an object of its own")
    add("--min-size", 1, "drop objects of fewer pixels or voxels", metavar="N")
    return parser.parse_args(argv)


def pair_files(images: Path, masks: Path) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Find the masks that bear each image's name, one where all is well; and the masks of a folder without an image."""
    image_files, mask_files = list_images(images), list_images(masks)
    if [images, masks] == image_files + mask_files:
        return {images: mask_files}, []
    if images.resolve() == masks.resolve():
        mask_files = [path for path in mask_files if MASK_ENDING.search(stem_of(path))]
    taken = {path.resolve() for path in mask_files}           # the masks' folder may lie within that of the images
    names = {path: common_name(images, path) for path in image_files if path.resolve() not in taken}
    by_name, lonely = {name: [] for name in names.values()}, []
    for path in mask_files:
        by_name.get(common_name(masks, path), lonely).append(path)
    return {path: by_name[name] for path, name in names.items()}, lonely if images.is_dir() else []


def common_name(root: Path, path: Path) -> str:
    """Return what an image and its mask have in common: their `name_below` without the usual endings."""
    return MASK_ENDING.sub("", name_below(root, path)).removesuffix("_0000")


def name_below(root: Path, path: Path) -> str:
    """Join the folders of a file below `root` and its stem by slashes: patient1/slice_01."""
    return composed((path.relative_to(root).parent / stem_of(path)).as_posix())


def number_objects(labels: np.ndarray, instances: bool, min_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the objects of a label picture or volume, integers (H, W) or (D, H, W), and put a box round each.

    With `instances`, parts that do not touch, diagonals included, are objects; those below `min_size` pixels are
    dropped. Returned are gts, 1…N of the same shape, uint8 or uint16, and tight inclusive boxes, int64 (N, 4) or
    (N, 6) x0 y0 z0 x1 y1 z1. OverflowError for more than 65535 objects.
    """
    from scipy.ndimage import find_objects, label
    objects, count = np.zeros(labels.shape, np.int32), 0
    for value, place in enumerate(find_objects(labels), 1):
        if place is not None:
            inside = labels[place] == value
            parts, found = label(inside, np.ones((3,) * labels.ndim)) if instances else (inside, 1)
            objects[place][inside] = parts[inside] + count
            count += found
    kept = np.bincount(objects.ravel()) >= min_size
    kept[0] = False
    numbers = kept.cumsum() * kept
    if numbers.max() > 65535:
        raise OverflowError("gts: expected at most 65535 objects, found more (see --min-size)")
    gts = numbers.astype(np.min_scalar_type(numbers.max()))[objects]
    boxes = [[side.start for side in place[::-1]] + [side.stop - 1 for side in place[::-1]]
             for place in find_objects(gts)]
    return gts, np.array(boxes, np.int64).reshape(-1, 2 * labels.ndim)


def convert_pair(image: Path, mask: Path, target: Path, arguments) -> tuple[int, list[str]]:
    """Write an image and its mask as `target`, unless the mask is empty; return the number of objects, and remarks."""
    lines, spacing = [], {}
    if is_picture(image):
        imgs, text = load_picture(image, arguments.window)
        labels, lines = load_label_picture(mask)
        if TURNED in text:
            lines.append(f"{image.name}: imgs: {TURNED}, see that {mask.name} fits")
        if labels.shape != imgs.shape[:2]:
            raise ValueError(f"{mask.name}: gts: expected the image's size {imgs.shape[:2]}, found {labels.shape}")
    else:
        imgs, grid, text = load_volume(image, arguments.axis, arguments.window, arguments.series)
        labels, spacing = load_labels(mask, grid), {"spacing": grid.spacing}
    # Beside the small numbers of classes the greatest number stands for "ignore"; 0, 128, 255 are labels all.
    values = np.unique(labels)
    if len(values) > 2 and values[-1] in (255, 65535) and values[-2] < 64:
        highest, ignored = values[-2:]
        labels[labels == ignored] = 0
        lines.append(f'{mask.name}: gts: {ignored} beside labels up to {highest} is taken as "ignore" and left out')
    gts, boxes = number_objects(labels, arguments.instances, arguments.min_size)
    if not len(boxes):
        return 0, [*lines, f"{image.name}: left out, its mask holds no object of {arguments.min_size} or more pixels"]
    write_npz(target, imgs=imgs, gts=gts, boxes=boxes, intensity=text, **spacing)
    return len(boxes), lines


def convert(arguments) -> int:
    """Convert every pair; return how many failed, each with its line. ValueError if an option is wrong."""
    arguments.window = parse_window(arguments.window)
    if not re.fullmatch(r"[A-Za-z0-9-]+", arguments.modality):
        raise ValueError(f"--modality: expected letters and digits, for file names, found {arguments.modality}")
    pairs, lonely = pair_files(arguments.images, arguments.masks)
    for mask in lonely:
        print(f"{mask.name}: gts: expected an image of the same name, found none", file=sys.stderr)
    arguments.output.mkdir(parents=True, exist_ok=True)                       # a file of that name costs one line
    targets, objects = set(), []
    bar = ProgressBar(pairs.items(), len(pairs), "converting")
    for image, masks in bar:
        try:
            if len(masks) != 1:
                raise ValueError(f"{image.name}: gts: expected one mask of its name, found {len(masks)}")
            # The subfolder, which often is the patient, stays part of the name: training splits by patient.
            stem = name_below(arguments.images, image).replace("/", "-")
            target = arguments.output / f"{2 if is_picture(image) else 3}D_{arguments.modality}_{stem}.npz"
            if target in targets:
                raise ValueError(f"{image.name}: name: expected one image for {target.name}, found two")
            targets.add(target)
            count, lines = convert_pair(image, masks[0], target, arguments)
            objects.append(count)
            for line in lines:
                bar.write(line)
        except Exception as error:                    # whatever is wrong with one pair, the others are converted
            bar.write(first_line(error) if isinstance(error, ValueError) else f"{image.name}: {first_line(error)}")
    failed = len(pairs) - len(objects)
    print(f"{np.count_nonzero(objects)} of {len(pairs)} written to {arguments.output} with {sum(objects)} objects, "
          f"{failed} failed")
    return failed


def main(argv=None) -> int:
    """Run the command line; return 1 if an image failed or an option was wrong."""
    return exit_status(lambda: convert(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
