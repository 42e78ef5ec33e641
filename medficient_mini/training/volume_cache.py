"""Slices of compressed volumes without decompressing the volume each time.

A volume's arrays are unpacked once to .npy files and read through memory maps from then on: a slice costs some tens
of microseconds however random the order is, all worker processes share the pages, and a restarted run finds the
cache warm. (The alternative, several slices from each opened volume, puts similar slices into one batch and pays
for the decompression again in every epoch.)
"""
import hashlib
import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..inference.npz import UNREADABLE
from ..files import whole_file

OPEN_VOLUMES = 200  # each open volume holds two file descriptors; a process may often have only 1024
HASH_LENGTH = 12    # of a path, in the names of entries


def file_key(path):
    """Folder name for a file's derived data; another one as soon as the file's path, time or size changes."""
    path = Path(path).resolve()
    stat = path.stat()
    stamp = hashlib.sha1(f"{stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()[:8]
    return f"{_path_hash(path)}-{stamp}-{path.stem[:80]}"


def _path_hash(path):
    return hashlib.sha1(str(path).encode()).hexdigest()[:HASH_LENGTH]


def read_arrays(path, names):
    """[array or None] of an NPZ file; `gts` in the smallest unsigned type. ValueError with one line if unreadable."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive.files}
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable NPZ file ({error})") from None
    if arrays.get("gts") is not None:
        gts = arrays["gts"]
        low, high = int(gts.min()), int(gts.max())
        if low < 0 or high > 65535:
            raise ValueError(f"{path}: gts holds values {low} to {high}, expected labels 0 to 65535")
        arrays["gts"] = gts.astype(np.uint8 if high < 256 else np.uint16)
    return [arrays.get(name) for name in names]


class SliceCache:
    """Images and masks of training cases by (case, z), volumes through an unpacked copy under `folder`.

    `folder` holds at most about `max_mb` MiB. A volume for which there is no room drives out those that no run has
    used since this object was made, least recently used first; volumes in use stay, and what then does not fit is
    read from its NPZ file each time (slow, but without the thrashing that a plain LRU falls into when the data are
    larger than the cache). A changed NPZ file is unpacked anew. Several processes may share the folder: an entry
    appears by one atomic rename. 2D images, and volumes that did not fit, go through a small memory cache of
    `memory_mb` MiB per process.
    """

    def __init__(self, folder, max_mb, memory_mb=64):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes, self.memory_bytes = max_mb * 2 ** 20, memory_mb * 2 ** 20
        self.started = time.time()
        self._reset()
        for left_over in self.folder.glob(".tmp-*"):  # of a run that was killed
            with suppress(OSError):  # another process may be faster
                if left_over.stat().st_mtime < self.started - 3600:
                    _delete(left_over)

    def _reset(self):
        self._open = OrderedDict()    # path -> (imgs, gts or None), memory-mapped
        self._memory = OrderedDict()  # path -> (imgs, gts or None), in memory
        self._keys = {}
        self._found = {}              # hash of a file's path -> names of the entries that were there at the start
        for name in os.listdir(self.folder):
            self._found.setdefault(name[:HASH_LENGTH], []).append(name)
        self._refused = set()         # volumes that did not fit
        self._lock = threading.Lock()

    def __getstate__(self):
        # A worker process opens its own maps: pickling one would send the whole volume.
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._reset()

    def image(self, case, z=0):
        """uint8 (H, W) or (H, W, 3); z is ignored for a 2D case."""
        images = self._arrays(case)[0]
        return np.array(images[z] if case.is_3d else images)

    def masks(self, case, z=0):
        """Labels uint8 or uint16 (H, W), or None for a case without `gts`."""
        masks = self._arrays(case)[1]
        return None if masks is None else np.array(masks[z] if case.is_3d else masks)

    def labelled_slices(self, case):
        """Sorted z of the slices that hold a label ([0] or [] for a 2D case); kept on disk beside the volume."""
        if not case.has_masks:
            return []
        path = self.folder / f"{self._key(case)}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            pass
        masks = self._arrays(case)[1]
        labelled = [z for z, mask in enumerate(masks if case.is_3d else [masks]) if np.any(mask)]
        self._forget_older(case)
        with suppress(OSError), whole_file(path) as temporary:  # a full disk costs speed, not the run
            temporary.write_text(json.dumps(labelled))
        return labelled

    def _key(self, case):
        # Looked up once per run: a file that changes under a running training is not supported.
        if case.path not in self._keys:
            self._keys[case.path] = file_key(case.path)
        return self._keys[case.path]

    def _arrays(self, case):
        """(imgs, gts or None) of a case, memory-mapped or in memory."""
        with self._lock:
            for held in (self._open, self._memory):
                if case.path in held:
                    held.move_to_end(case.path)
                    return held[case.path]
        arrays = self._mapped(case) if case.is_3d and case.path not in self._refused else None
        with self._lock:
            if arrays is not None:
                self._open[case.path] = arrays
                while len(self._open) > OPEN_VOLUMES:
                    self._open.popitem(last=False)
                return arrays
        arrays = tuple(read_arrays(case.path, ("imgs", "gts")))
        with self._lock:
            self._memory[case.path] = arrays
            size = sum(_nbytes(pair) for pair in self._memory.values())
            while size > self.memory_bytes and self._memory:
                size -= _nbytes(self._memory.popitem(last=False)[1])
        return arrays

    def _mapped(self, case):
        """Memory maps of a volume's unpacked copy, made now if need be; None if there is no room for it."""
        entry = self.folder / self._key(case)
        for _ in range(2):  # a second time if another process removed the entry between making and opening
            if not entry.is_dir() and not self._unpack(case, entry):
                self._refused.add(case.path)
                return None
            try:
                os.utime(entry, (time.time(),) * 2)
                images = np.load(entry / "imgs.npy", mmap_mode="r", allow_pickle=False)
                masks = np.load(entry / "gts.npy", mmap_mode="r", allow_pickle=False) if case.has_masks else None
                return images, masks
            except FileNotFoundError:
                shutil.rmtree(entry, ignore_errors=True)
        return None

    def _unpack(self, case, entry):
        """Unpack a volume into the folder `entry`; False if it does not fit or the disk is full."""
        self._forget_older(case)
        images, masks = read_arrays(case.path, ("imgs", "gts"))
        if not self._make_room(_nbytes((images, masks))):
            return False
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        try:
            temporary.mkdir()
            np.save(temporary / "imgs.npy", images)
            if masks is not None:
                np.save(temporary / "gts.npy", masks)
            os.rename(temporary, entry)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not entry.is_dir():  # else another process was faster
                print(f"{self.folder}: {case.name} could not be cached ({error})", file=sys.stderr)
                return False
        return True

    def _make_room(self, size):
        """Remove volumes unused since this object was made until `size` bytes fit; False if they do not."""
        entries = []
        for entry in self.folder.iterdir():
            try:
                if entry.is_dir():
                    entries.append((entry.stat().st_mtime, sum(f.stat().st_size for f in entry.iterdir()), entry))
            except FileNotFoundError:  # removed or renamed by another process meanwhile
                continue
        excess = sum(entry[1] for entry in entries) + size - self.max_bytes
        idle = sorted(entry for entry in entries if entry[0] < self.started and not entry[2].name.startswith(".tmp-"))
        if excess > sum(entry[1] for entry in idle):
            return False
        for _, freed, entry in idle:
            if excess <= 0:
                break
            excess -= freed
            _remove(entry)
        return True

    def _forget_older(self, case):
        """Remove what was derived from an earlier version of the file."""
        key = self._key(case)
        for name in self._found.pop(key[:HASH_LENGTH], ()):
            if name not in (key, f"{key}.json"):
                _remove(self.folder / name)


def _nbytes(arrays):
    return sum(array.nbytes for array in arrays if array is not None)


def _remove(path):
    """Remove an entry so that no process ever sees half of it: maps that are open stay valid."""
    gone = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        os.rename(path, gone)
    except OSError:
        return
    _delete(gone)


def _delete(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
