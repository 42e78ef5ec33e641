"""Training samples: read a slice, augment it, draw its objects, load samples in batches.

Everything random about a sample follows from (seed, epoch, position in the epoch), so that a resumed run, more
workers or more processes see exactly the samples that an undisturbed single process would have seen.
"""
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import torch

from ..files import whole_file
from ..inference.geometry import to_network
from .augment import Objects, draw_augmented, photometric
from .cases import scan_cases  # noqa: F401  (the name before, for tests/userfiles/test_user_files.py)
from .volume_cache import file_key

LOGITS_SIZE = 256  # side of the mask decoder's output, for every network


# ------------------------------------------------------------------------------------------------ data sets

def embedding_path(folder, case, z, flip=(False, False)):
    """Return where the teacher's embedding of a slice, flipped (horizontally, vertically) or not, is kept.

    The name follows from the content of the NPZ file. The teacher is not part of it: one folder per teacher.
    """
    suffix = "".join(letter for letter, is_flipped in zip("hv", flip) if is_flipped)
    return Path(folder) / file_key(case.path) / f"{z}{'-' if suffix else ''}{suffix}.npy"


def save_embedding(path, embedding):
    """Write an embedding (256, 64, 64) as float16 (2 MB), whole or not at all. ValueError, one line, on a full disk."""
    try:
        with whole_file(path) as temporary:
            np.save(temporary, torch.as_tensor(embedding).half().numpy(force=True))
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error.strerror or error}); make room, then the same "
                         "command goes on with the embeddings that are missing (a run that has trained: with "
                         "--resume)") from None


def load_embedding(path):
    """Read what `save_embedding` wrote: float16 (256, 64, 64), None where there is none. ValueError, one line."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).reshape(256, 64, 64).astype(np.float16))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: embedding: expected numbers (256, 64, 64), found it unreadable ({error}); delete it "
                         "to compute it again") from None


class SliceDataset(torch.utils.data.Dataset):
    """Samples of both stages: the network's input, the objects in it, and for distillation the teacher's part.

    A sample is a dict of tensors:
        image: (3, size, size) float32 in [0, 1].
        boxes: (max_boxes, 4) float32 x0 y0 x1 y1 in pixels of a `prompt_size` square, if max_boxes > 0; as well as
            masks, (max_boxes, mask_size, mask_size) uint8, and box_valid, (max_boxes,) bool. Rows that are not valid
            are zero; a slice without labels has no valid one.
        teacher_image: (3, teacher_size, teacher_size) float32 in [0, 1], if there is a `teacher_size`.
        embedding: (256, 64, 64) float16, if there is a folder of `embeddings`; and has_embedding, () bool.

    A network is not equivariant and its padding stays right and below, so a flipped image needs an embedding of its
    own. The data set takes whichever is on disk. With only the unflipped one (one teacher forward and 2 MB a slice;
    recommended) a flipped sample serves a mask loss only; with all four each has a target. A sample that is rotated,
    or photometrically changed, never has.
    """

    def __init__(self, cases, slices, cache, size, resize, *, seed=0, augment="none", photometric=False, max_boxes=0,
                 mask_size=LOGITS_SIZE, prompt_size=None, box_shift=5, box_jitter=0.0, in_use=0.0, teacher_size=None,
                 teacher_resize="bilinear", embeddings=None, plain=0.0):
        """Describe the samples.

        Args:
            cases, slices: list of npz.Header, and of (index of the case, z).
            cache: the SliceCache that they are read through.
            size, resize: side of the network's input, and how images come to it (see `to_network`).
            seed: another one gives other samples.
            augment: "none", "flips" or "full" (see `augment`).
            photometric: also change brightness, contrast, colours and so on (see `photometric`).
            max_boxes, mask_size, prompt_size, box_shift, box_jitter: see `Objects`; prompt_size is `size` by default.
            in_use: part of the samples of volumes that get the prompts which inference gives (see
                `Objects.draw_in_use`); they are flipped at most.
            teacher_size, teacher_resize: as size and resize, for a teacher that runs beside.
            embeddings: folder of the teacher's embeddings.
            plain: part of a distillation's samples left as they are, so that they keep the target of their unflipped
                embedding. With max_boxes and embeddings so is every slice without a label: it would train nothing.
        """
        self.cases, self.slices, self.cache, self.seed = cases, slices, cache, seed
        self.size, self.resize, self.augment, self.photometric = size, resize, augment, photometric
        self.teacher_size, self.teacher_resize = teacher_size, teacher_resize
        self.embeddings, self.plain, self.in_use = embeddings, plain, in_use
        self.distils = embeddings is not None or teacher_size is not None
        self.objects = Objects(max_boxes, mask_size, prompt_size or size, box_shift, box_jitter) if max_boxes else None

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, key):
        return self.sample(*key)

    def sample(self, epoch, position, index):
        """Draw the sample of slice `index` at `position` of `epoch`: the same arguments give the same sample."""
        rng = np.random.default_rng([self.seed, epoch, position])
        case_index, z = self.slices[index]
        case = self.cases[case_index]
        image, labels = self.cache.image_and_labels(case, z)
        if labels is None or not self.objects:
            labels = np.zeros(image.shape[:2], np.uint8)
        is_labelled = labels.any()
        # Moved, a slice without labels would have neither a mask nor an embedding to learn from.
        must_stay = self.embeddings and self.objects and not is_labelled
        is_plain = self.distils and (rng.random() < self.plain or must_stay)
        mode = "none" if is_plain else self.augment
        shown = photometric(image, rng) if self.photometric and not is_plain else image
        can_use = self.in_use and self.objects and case.is_3d and case.has_gts
        in_use = can_use and (rng.random() < self.in_use or not is_labelled)
        if in_use and mode == "full":                                          # boxes of a volume cannot be rotated
            mode = "flips"
        moved, labels, flip = draw_augmented(shown, labels, rng, mode, max(self.size, self.teacher_size or 0))
        sample = {"image": to_network(moved, self.size, self.resize)}
        if in_use:
            boxes = np.array(self.cache.objects(case)[1], int).reshape(-1, 7)
            sample |= self.objects.draw_in_use(labels, rng, boxes, z, flip)
        elif self.objects:
            sample |= self.objects.draw(labels, rng, max(labels.shape) / max(image.shape[:2]))
        if self.teacher_size is not None:
            sample["teacher_image"] = to_network(moved, self.teacher_size, self.teacher_resize)
        if self.embeddings is not None:
            is_unlike = flip is None or shown is not image
            known = None if is_unlike else load_embedding(embedding_path(self.embeddings, case, z, flip))
            sample["has_embedding"] = torch.tensor(known is not None)
            sample["embedding"] = torch.zeros(256, 64, 64).half() if known is None else known
        return sample


# ------------------------------------------------------------------------------------------------ order and batches

class EpochSampler(torch.utils.data.Sampler):
    """Yield (epoch, position, index) for one epoch from wherever `set_position` put it.

    Without weights the indices are one endless stream of random permutations of range(n), cut into epochs of
    `samples_per_epoch` (default n), so that short epochs together still see every slice. With weights they are drawn
    with replacement. Of `world` processes, process `rank` takes positions rank, rank + world, ...: together the
    batches of b of all processes hold what a single process would put into a batch of b * world. All processes get
    equally many; a remainder of the epoch is left out. ValueError where there is less than one for each process.
    """

    def __init__(self, n, seed, rank=0, world=1, weights=None, samples_per_epoch=None):
        self.n, self.seed, self.rank, self.world = n, seed, rank, world
        self.total = samples_per_epoch or n
        if n < 1 or self.total < world:
            raise ValueError(f"{n} slices and {self.total} samples per epoch, expected at least one for each process")
        self.total -= self.total % world
        self.cumulative = None if weights is None else np.cumsum(np.asarray(weights, float) / np.sum(weights))
        self.set_position(0, 0)

    def set_position(self, epoch, position=0):
        """Continue at `position` of `epoch`: the number of samples that all processes together have used of it."""
        self.epoch, self.position = epoch, position

    def __len__(self):
        return (self.total - self.position) // self.world

    def __iter__(self):
        epoch, indices = self.epoch, self._indices(self.epoch)
        for position in range(self.position + self.rank, self.total, self.world):
            yield epoch, position, int(indices[position])

    def _indices(self, epoch):
        """The indices of all samples of an epoch, int (total,)."""
        if self.cumulative is not None:
            draws = np.random.default_rng([self.seed, epoch]).random(self.total)
            return np.minimum(np.searchsorted(self.cumulative, draws, side="right"), self.n - 1)
        first = epoch * self.total
        rounds = range(first // self.n, (first + self.total - 1) // self.n + 1)
        stream = np.concatenate([np.random.default_rng([self.seed, r]).permutation(self.n) for r in rounds])
        return stream[first - rounds[0] * self.n:][:self.total]


def _start_worker(_):
    cv2.setNumThreads(0)
    # Ctrl-C and `timeout` signal a whole process group. Only the trainer shall answer, since it needs its workers to
    # the end of the step, so they form groups of their own. A worker inherits the trainer's handler of Ctrl-C, which
    # must not run here either; torch itself replaces that of SIGTERM.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset, sampler, batch_size, workers=0, pin_memory=False):
    """Return a DataLoader over the sampler's (epoch, position, index); an epoch's last batch may be smaller.

    With 0 `workers` this process reads the samples. Set the sampler's position before each iteration.
    """
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers,
                                       pin_memory=pin_memory, persistent_workers=workers > 0,
                                       worker_init_fn=_start_worker)
