"""Slices of compressed volumes without decompressing the volume each time.

A volume's arrays are unpacked once to .npy files and read through memory maps, which worker processes share.
"""
import json
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..files import whole_file
from ..inference.npz import read_case


def file_key(path):
    """Name data derived from an NPZ file by checksums and sizes of images and labels: a copy has the same name."""
    with zipfile.ZipFile(path) as archive:
        return "-".join(f"{member.CRC:08x}{member.compress_size:x}" for member in archive.infolist()
                        if member.filename in ("imgs.npy", "gts.npy"))


class SliceCache:
    """Images and labels of training cases by case (see cases.py) and z, volumes through their unpacked copies.

    `folder` holds about `max_mb` MiB at most; further volumes are read from their NPZ files, as 2D images always are.
    Several processes may share it. ValueError, one line, for an NPZ file that cannot be read.
    """

    def __init__(self, folder, max_mb):
        self.folder, self.max_bytes, self.is_full = Path(folder), max_mb * 2 ** 20, False
        self.folder.mkdir(parents=True, exist_ok=True)

    def image_and_labels(self, case, z=0):
        """Return slice z or a 2D image, uint8 (H, W[, 3]), and its labels (H, W), None for a case without `gts`."""
        image, *labels = (np.array(array[z] if case.is_3d else array) for array in self._arrays(case))
        return image, labels[0] if labels else None

    def objects(self, case):
        """Find the slices with a label ([0] or [] for a 2D case) and the objects: label, x0, y0, z0, x1, y1, z1 each.

        Corners are inclusive. The answer is kept in the folder, for asking all volumes takes minutes.
        """
        path = self.folder / f"{file_key(case.path)}.json"
        with suppress(OSError, ValueError):
            return tuple(json.loads(path.read_text()))
        from scipy.ndimage import find_objects

        arrays, slices, boxes = self._arrays(case), [], []
        if case.has_gts:
            labels = arrays[1].reshape(-1, *arrays[1].shape[-2:])              # (D, H, W)
            slices = np.flatnonzero(labels.any((1, 2))).tolist()
            boxes = [[label, *(axis.start for axis in place[::-1]), *(axis.stop - 1 for axis in place[::-1])]
                     for label, place in enumerate(find_objects(labels), 1) if place]
        with suppress(OSError), whole_file(path) as temporary:                 # a full disk costs speed, not the run
            temporary.write_text(json.dumps([slices, boxes]))
        return slices, boxes

    def _arrays(self, case):
        """[images] or [images, labels] of a case, memory-mapped or in memory."""
        paths = [self.folder / f"{file_key(case.path)}.{name}.npy" for name in ("imgs", "gts")[:1 + case.has_gts]]
        if case.is_3d:
            with suppress(FileNotFoundError):
                return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        content = read_case(case.path, need_boxes=False, need_gts=case.has_gts)
        arrays = [content.pixels, content.gts][:len(paths)]
        if case.is_3d and not self.is_full:
            self._keep(paths, arrays)
        return arrays

    def _keep(self, paths, arrays):
        """Write a volume's arrays; where there is no room for them, say so once and try no other."""
        try:
            held = sum(path.stat().st_size for path in self.folder.glob("[!.]*.npy"))
            if held + sum(array.nbytes for array in arrays) > self.max_bytes:
                raise OSError("its size limit is reached")
            for path, array in zip(paths, arrays):
                with whole_file(path) as temporary:
                    np.save(temporary, array)
        except OSError as error:
            self.is_full = True
            print(f"{self.folder}: no further volume is unpacked ({error}); they are read from NPZ files, more slowly",
                  file=sys.stderr)
