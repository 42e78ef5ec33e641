"""Training samples: read a slice, augment it, draw its objects, load samples in batches.

Everything random about a sample follows from (seed, epoch, position in the epoch), however a run is resumed or shared.
"""
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from ..files import whole_file
from ..inference.geometry import to_network
from .augment import Objects, draw_augmented, photometric
from .volume_cache import SliceCache, file_key


def save_embedding(path, embedding):
    """Write an embedding (256, 64, 64) as float16, 2 MB, where there is room; return what `load_embedding` will."""
    embedding = embedding.half()
    with suppress(OSError), whole_file(path) as temporary:                     # a full disk costs speed, not the run
        np.save(temporary, embedding.numpy(force=True))
    return embedding


def load_embedding(path):
    """Read what `save_embedding` wrote: float16 (256, 64, 64). ValueError, one line, for a damaged file."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).reshape(256, 64, 64))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: embedding: expected numbers (256, 64, 64), found it unreadable ({error}); delete it "
                         "to compute it again") from None


@dataclass(eq=False)
class SliceDataset(torch.utils.data.Dataset):
    """Samples of both stages, dicts of tensors: `image` (3, size, size) float32 in [0, 1] and what `objects` draw.

    For distillation also `teacher_image`, and the `embedding_file` that keeps the teacher's answer. A network is not
    equivariant, so a flipped image has a file of its own; "" is that of an image rotated or photometrically changed.
    """
    slices: list                            # of (case, z), see cases.py
    cache: SliceCache
    network_input: tuple[int, str]          # side, and how images come to it: see `to_network`
    objects: Objects | None = None
    seed: int = 0
    mode: str = "none"                      # of `augment`
    photometric: bool = False
    in_use: float = 0.0                     # part of volumes' samples for `Objects.draw_in_use`; flipped at most
    teacher_input: tuple[int, str] | None = None
    embeddings: Path | None = None          # the folder of the teacher's kept answers

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, key):
        """Draw the sample of a key (epoch, position in it, index of the slice); the same key gives the same sample."""
        epoch, position, index = key
        rng = np.random.default_rng([self.seed, epoch, position])
        (case, z), mode = self.slices[index], self.mode
        original, labels = self.cache.image_and_labels(case, z)
        image = photometric(original, rng) if self.photometric else original
        if labels is None or not self.objects:
            labels = np.zeros(image.shape[:2], np.uint8)
        in_use = (self.in_use and self.objects and case.is_3d and case.has_gts
                  and (rng.random() < self.in_use or not labels.any()))
        if in_use and mode == "full":                                          # boxes of a volume cannot be rotated
            mode = "flips"
        limit = max(self.network_input[0], (self.teacher_input or [0])[0])
        moved, labels, flip = draw_augmented(image, labels, rng, mode, limit)
        sample = {"image": to_network(moved, *self.network_input)}
        if in_use:
            sample |= self.objects.draw_in_use(labels, rng, self.cache.objects(case)[1], z, flip)
        elif self.objects:
            sample |= self.objects.draw(labels, rng, max(labels.shape) / max(image.shape[:2]))
        if self.teacher_input:
            sample["teacher_image"] = to_network(moved, *self.teacher_input)
            sample["embedding_file"] = ""
            if self.embeddings and flip and image is original:
                flipped = "-" * any(flip) + "h" * flip[0] + "v" * flip[1]      # "" or -h, -v, -hv
                sample["embedding_file"] = str(self.embeddings / file_key(case.path) / f"{z}{flipped}.npy")
        return sample


def epoch_keys(n, seed, epoch, length, weights=None):
    """Return the keys (epoch, position, index) of the `length` samples of an epoch, their indices below n.

    Epochs cut one stream of random permutations of range(n); with weights (n,), of sum 1, they draw with replacement.
    """
    if weights is not None:
        indices = np.random.default_rng([seed, epoch]).choice(n, length, p=weights)
    else:
        first, skipped = divmod(epoch * length, n)
        rounds = range(first, first + length // n + 2)                         # perhaps one more than are needed
        stream = np.concatenate([np.random.default_rng([seed, number]).permutation(n) for number in rounds])
        indices = stream[skipped:skipped + length]
    return [(epoch, position, index) for position, index in enumerate(indices.tolist())]


def make_loader(dataset, keys, batch_size, workers=0, pin_memory=False):
    """Return a DataLoader of the samples of a list of keys, which may change between two iterations."""
    return torch.utils.data.DataLoader(dataset, batch_size, sampler=keys, num_workers=workers, pin_memory=pin_memory,
                                       persistent_workers=workers > 0, worker_init_fn=_start_worker)


def _start_worker(_):
    cv2.setNumThreads(0)
    # Ctrl-C and `timeout` signal a whole process group, but the trainer needs its workers to the end of the step.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
