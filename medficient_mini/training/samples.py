"""Training samples: find the cases, split them, draw slices, augment, load in batches.

A case is one NPZ file (`imgs`, optionally `gts`); a slice is (index of the case, z), z = 0 for a 2D image.
Everything random about a sample follows from (seed, epoch, position in the epoch), so that a resumed run, more
workers or more processes see exactly the samples that an undisturbed single process would have seen.
"""
import os
import re
import signal
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from .augment import Objects, draw_augmented
from ..inference.npz import UNREADABLE, list_cases, modality_of
from ..files import whole_file
from ..inference.geometry import to_network
from ..show.progress import progress
from .volume_cache import file_key

LOGITS_SIZE = 256  # side of the mask decoder's output, for every network


# ------------------------------------------------------------------------------------------------ cases and slices

@dataclass(frozen=True)
class TrainCase:
    """One NPZ file as its headers describe it; `shape` is that of `imgs`: (H, W[, 3]) or (D, H, W[, 3])."""
    path: Path
    name: str
    modality: str
    shape: tuple[int, ...]
    is_3d: bool
    has_masks: bool


def read_headers(path):
    """{name: (shape, dtype)} of an NPZ file's arrays from its zip directory and npy headers; no array is read."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
            headers[member[:-4]] = shape, dtype
    return headers


def scan_case(path, need_masks=False):
    """TrainCase of one NPZ file; ValueError with one line naming file, field and what was expected."""
    path = Path(path)
    try:
        headers = read_headers(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable NPZ file ({error})") from None
    if "imgs" not in headers:
        raise ValueError(f"{path}: imgs is missing")
    shape, dtype = headers["imgs"]
    if dtype != np.uint8:
        raise ValueError(f"{path}: imgs is {dtype}, expected uint8")
    # (5, 9, 3) is a colour image or a narrow volume: the name tells, else the masks, else colour is likelier.
    mask_shape, mask_dtype = headers.get("gts", (None, None))
    prefix = re.match(r"([23])D(Box)?_", path.name)
    if prefix:
        is_3d = prefix[1] == "3"
    else:
        is_3d = len(mask_shape) == 3 if mask_shape else len(shape) == 4 or (len(shape) == 3 and shape[-1] != 3)
    plain = 3 if is_3d else 2
    if not (len(shape) == plain or (len(shape) == plain + 1 and shape[-1] == 3)) or min(shape) < 1:
        wanted = "(D, H, W) or (D, H, W, 3) of a volume" if is_3d else "(H, W) or (H, W, 3) of an image"
        raise ValueError(f"{path}: imgs has shape {shape}, expected {wanted}")
    if mask_shape is not None:
        if mask_shape != shape[:plain]:
            raise ValueError(f"{path}: gts has shape {mask_shape}, expected {shape[:plain]} to match imgs")
        if mask_dtype.kind not in "iub":
            raise ValueError(f"{path}: gts is {mask_dtype}, expected integers")
    elif need_masks:
        raise ValueError(f"{path}: gts is missing, expected the masks to train on")
    return TrainCase(path, path.stem, modality_of(path), tuple(shape), is_3d, mask_shape is not None)


def scan_cases(folder, strict=False, workers=8, need_masks=False):
    """All training cases under `folder` (recursively), sorted by path, from the files' headers alone.

    A bad file costs one line on stderr and is skipped; with `strict` it raises ValueError. `need_masks`: a file
    without `gts` counts as bad. ValueError when nothing is left.
    """
    def scan(path):
        try:
            return scan_case(path, need_masks)
        except ValueError as error:
            return str(error)

    paths = list_cases(folder)
    with ThreadPoolExecutor(workers) as pool:
        results = list(progress(pool.map(scan, paths), len(paths), "checking cases"))
    bad = [result for result in results if isinstance(result, str)]
    for line in bad:
        print(line, file=sys.stderr)
    if bad and strict:
        raise ValueError(f"{folder}: {len(bad)} of {len(paths)} files are bad (the first: {bad[0]})")
    cases = [result for result in results if not isinstance(result, str)]
    if not cases:
        raise ValueError(f"{folder}: no usable case among {len(paths)} NPZ files")
    return cases


def patient_of(case):
    """Key shared by the files of one patient: the name without dimension and modality, its last field up to a dash.

    2D_CT_CURVAS_10001-458 and 2D_CT_CURVAS_10001-509 are slices of one patient, 3D_CT_STS_001 and 3D_PET_STS_001
    one patient in two modalities. A field such as Tr-001 is not cut: what stands before its dash holds no digit.
    """
    fields = re.sub(rf"^[23]D(Box)?_{re.escape(case.modality)}_", "", case.name).split("_")
    head = fields[-1].split("-")[0]
    return "_".join(fields[:-1] + [head if any(c.isdigit() for c in head) else fields[-1]])


def split_cases(cases, val_fraction, seed):
    """(train, val) lists: by patient, per modality, the same for the same cases and seed.

    Each side gets at least one case when there are two or more.
    """
    groups = {}
    for case in cases:
        groups.setdefault(patient_of(case), []).append(case)
    if len(groups) < 2:
        groups = {case.path: [case] for case in cases}
    strata = {}
    for key, group in groups.items():
        strata.setdefault(tuple(sorted({case.modality for case in group})), []).append(key)
    rng = np.random.default_rng(seed)
    order, chosen = [], set()
    for _, keys in sorted(strata.items()):
        keys = [keys[i] for i in rng.permutation(len(keys))]
        order += keys
        chosen.update(keys[:int(len(keys) * val_fraction + 0.5)])
    some = order[int(rng.integers(len(order)))]
    if not chosen and len(order) > 1:
        chosen.add(some)
    if len(chosen) == len(order):
        chosen.discard(some)
    train = [case for key, group in groups.items() if key not in chosen for case in group]
    val = [case for key, group in groups.items() if key in chosen for case in group]
    return train, val


def list_slices(cases, cache, labelled_only, strict=False, workers=4):
    """[(case index, z)] in order; `labelled_only` leaves out every slice (and 2D image) without a label.

    `labelled_only` opens every volume once and so fills the cache; a case that cannot be read then costs one line on
    stderr and is left out; with `strict` it raises ValueError.
    """
    def labelled(case):
        try:
            return cache.labelled_slices(case)
        except ValueError as error:
            if strict:
                raise
            print(error, file=sys.stderr)
            return []

    if labelled_only:
        with ThreadPoolExecutor(workers) as pool:
            per_case = list(progress(pool.map(labelled, cases), len(cases), "reading labels"))
    else:
        per_case = [range(case.shape[0] if case.is_3d else 1) for case in cases]
    return [(index, z) for index, zs in enumerate(per_case) for z in zs]


def balance_weights(cases, slices, power=0.5):
    """Sampling weight of each slice, float64, summing to 1: modality first, then case, then slice.

    A modality is drawn with probability proportional to (its number of cases) ** power (1: as it comes, 0: all
    modalities alike), within it every case alike, within a case every slice alike, so that volumes of many slices
    do not drown images.
    """
    slices_of = Counter(index for index, _ in slices)
    cases_of = Counter(cases[index].modality for index in slices_of)
    total = sum(count ** power for count in cases_of.values())
    share = {modality: count ** (power - 1) / total for modality, count in cases_of.items()}
    return np.array([share[cases[index].modality] / slices_of[index] for index, _ in slices])


# ------------------------------------------------------------------------------------------------ data sets

def embedding_path(folder, case, z, flip=(False, False)):
    """Where the teacher's embedding of one slice, flipped (horizontally, vertically) or not, is kept.

    The name changes with the NPZ file. The teacher is not part of it: one folder per teacher.
    """
    suffix = "".join(letter for letter, on in zip("hv", flip) if on)
    return Path(folder) / file_key(case.path) / f"{z}{'-' if suffix else ''}{suffix}.npy"


def save_embedding(path, embedding):
    """Write an embedding (256, 64, 64) as float16, atomically (2 MB). ValueError with one line on a full disk."""
    try:
        with whole_file(path) as temporary:
            np.save(temporary, np.asarray(torch.as_tensor(embedding).float().cpu(), np.float16))
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error.strerror or error}); make room, then the same command "
                         "goes on with the embeddings that are missing (a run that has trained: with --resume)") from None


class DistillDataset(torch.utils.data.Dataset):
    """Samples for distillation: the student's input, the teacher's input or embedding, objects if wanted.

    `sample` returns a dict of tensors:
      image (3, size, size) float32 in [0, 1]; flip (2,) bool, horizontal and vertical;
      teacher_image (3, teacher_size, teacher_size) float32 if `teacher_size` is not None;
      embedding (256, 64, 64) float16 and has_embedding () bool if `embeddings` names a folder;
      boxes (max_boxes, 4) float32 in pixels of a `prompt_size` frame (default: size), masks (max_boxes, 256, 256)
      uint8 in the frame of the decoder's logits, box_valid (max_boxes,) bool if max_boxes > 0.
    Masks are not needed: a slice without has no valid box.

    Flips and cached embeddings: a network is not equivariant and its padding stays right and below, so a flipped
    image needs an embedding of its own. The data set takes whichever is on disk: with only the unflipped one cached
    (2 MB a slice, one teacher forward; recommended) a flipped sample has `has_embedding` False and serves a mask
    loss only; with all four cached (4x) every sample has a target. A rotated sample (augment "full") never has.
    `plain` is the part of the samples left unaugmented, so that they keep the target of their unflipped embedding; so
    is, with boxes and embeddings, every slice without a label: augmented it would train nothing.
    """

    def __init__(self, cases, slices, cache, size, resize, teacher_size=None, teacher_resize="bilinear", flips=False,
                 seed=0, embeddings=None, max_boxes=0, augment="none", box_shift=5, box_jitter=0.0, prompt_size=None,
                 plain=0.0):
        self.cases, self.slices, self.cache, self.seed = cases, slices, cache, seed
        self.size, self.resize = size, resize
        self.teacher_size, self.teacher_resize = teacher_size, teacher_resize
        self.embeddings, self.plain = embeddings, plain
        self.mode = "full" if augment == "full" else "flips" if flips else "none"
        self.objects = None
        if max_boxes:
            self.objects = Objects(max_boxes, LOGITS_SIZE, prompt_size or size, box_shift, box_jitter)

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, key):
        return self.sample(*key)

    def sample(self, epoch, position, index):
        """Sample of slice `index` as drawn at `position` of `epoch`: the same arguments give the same sample."""
        rng = np.random.default_rng([self.seed, epoch, position])
        case_index, z = self.slices[index]
        case = self.cases[case_index]
        image = self.cache.image(case, z)
        labels = self.cache.masks(case, z) if self.objects else None
        mode = "none" if rng.random() < self.plain else self.mode
        if self.objects and self.embeddings is not None and (labels is None or not labels.any()):
            mode = "none"
        image, move, objects = draw_augmented(image, labels, rng, mode, max(self.size, self.teacher_size or 0),
                                              self.objects)
        sample = {"image": to_network(image, self.size, self.resize), "flip": torch.tensor(move.flip), **objects}
        if self.teacher_size is not None:
            sample["teacher_image"] = to_network(image, self.teacher_size, self.teacher_resize)
        if self.embeddings is not None:
            embedding = None if move.affine else self._embedding(case, z, move.flip)
            sample["has_embedding"] = torch.tensor(embedding is not None)
            sample["embedding"] = torch.zeros(256, 64, 64, dtype=torch.float16) if embedding is None else embedding
        return sample

    def _embedding(self, case, z, flip):
        path = embedding_path(self.embeddings, case, z, flip)
        try:
            embedding = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: not a readable embedding ({error}), delete it to compute it again") from None
        if embedding.shape != (256, 64, 64):
            raise ValueError(f"{path}: embedding has shape {embedding.shape}, expected (256, 64, 64)")
        return torch.from_numpy(embedding.astype(np.float16, copy=False))


class FinetuneDataset(torch.utils.data.Dataset):
    """Samples for fine-tuning on labelled slices: dict of image (3, size, size) float32 in [0, 1], boxes
    (max_boxes, 4) float32 in network pixels, masks (max_boxes, size, size) uint8, box_valid (max_boxes,) bool.

    Boxes are tight, each side moved outward by 0 ... `box_shift` pixels of the original image (0 for validation).
    augment "none" or "full" (see `augment`). At least one box is valid: ValueError for a slice without labels.
    """

    def __init__(self, cases, slices, cache, size, resize, augment="none", seed=0, max_boxes=5, box_shift=5,
                 box_jitter=0.0):
        self.cases, self.slices, self.cache, self.seed = cases, slices, cache, seed
        self.size, self.resize, self.mode = size, resize, augment
        self.objects = Objects(max_boxes, size, size, box_shift, box_jitter)

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, key):
        return self.sample(*key)

    def sample(self, epoch, position, index):
        """Sample of slice `index` as drawn at `position` of `epoch`: the same arguments give the same sample."""
        rng = np.random.default_rng([self.seed, epoch, position])
        case_index, z = self.slices[index]
        case = self.cases[case_index]
        image, labels = self.cache.image(case, z), self.cache.masks(case, z)
        if labels is None or not labels.any():
            raise ValueError(f"{case.path}: gts of slice {z} holds no label, expected one to train on")
        image, _, objects = draw_augmented(image, labels, rng, self.mode, self.size, self.objects)
        return {"image": to_network(image, self.size, self.resize), **objects}


# ------------------------------------------------------------------------------------------------ order and batches

class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, position, index) for one epoch from wherever `set_position` put it.

    Without weights the indices are one endless stream of random permutations of range(n), cut into epochs of
    `samples_per_epoch` (default n), so that short epochs together still see every slice. With weights they are drawn
    with replacement. Of `world` processes, process `rank` takes positions rank, rank + world, ...: together the
    batches of b of all processes hold what a single process would put into a batch of b * world. All processes get
    equally many; a remainder of the epoch is left out.
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
        if self.cumulative is not None:
            draws = np.random.default_rng([self.seed, epoch]).random(self.total)
            return np.minimum(np.searchsorted(self.cumulative, draws, side="right"), self.n - 1)
        first = epoch * self.total
        rounds = range(first // self.n, (first + self.total - 1) // self.n + 1)
        stream = np.concatenate([np.random.default_rng([self.seed, r]).permutation(self.n) for r in rounds])
        return stream[first - rounds[0] * self.n:][:self.total]


def _quiet_worker(_):
    cv2.setNumThreads(0)
    # Ctrl-C and `timeout` signal a whole process group: the trainer alone answers, it needs its workers to the end of
    # the step. Ignored is what of its handlers a fork leaves in force: for SIGTERM torch gives a worker its own.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset, sampler, batch_size, workers=0, pin_memory=False):
    """DataLoader over (epoch, position, index) of the sampler; the last batch of an epoch may be smaller.

    workers 0 reads in this process. Set the sampler's position before each iteration.
    """
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers,
                                       pin_memory=pin_memory, persistent_workers=workers > 0,
                                       worker_init_fn=_quiet_worker)
