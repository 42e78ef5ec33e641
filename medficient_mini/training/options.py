"""What both training scripts are given: common options, the cases split in two, slices, the order of the samples."""
import io
import math
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import cv2
import numpy as np
import torch

from .samples import EpochSampler, balance_weights, list_slices, scan_cases, split_cases
from ..machine import keep_memory
from .distributed import World
from .volume_cache import SliceCache


def add_common_arguments(parser, *, out, lr, weight_decay, batch_size, schedule, schedules, boxes):
    """Options of both scripts; the keyword arguments are the defaults in which the paper's two tables differ."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data/train", metavar="DIR", help="NPZ cases, searched recursively (default: %(default)s)")
    add("--val", metavar="DIR", help="validation cases; without it --val-fraction of the patients of --data")
    add("--val-fraction", type=float, default=0.1, help="part of the patients kept for validation (default: %(default)s)")
    add("--val-limit", type=int, default=200, metavar="N", help="validate on at most N slices (default: %(default)s)")
    add("--strict", action="store_true", help="stop at a bad file instead of skipping it")
    add("--limit-samples", type=int, metavar="N", help="train on N slices drawn at random")
    add("--samples-per-epoch", type=int, metavar="N", help="length of an epoch (default: every slice once)")
    add("--balance", type=float, nargs="?", const=0.5, metavar="POWER", help="draw modalities in proportion to (number "
        "of cases) ** POWER, within one every case alike (POWER without a number: 0.5; off by default)")
    add("--cache", default="runs/cache", metavar="DIR", help="unpacked volumes (default: %(default)s)")
    add("--cache-mb", type=int, default=20000, help="size limit of --cache in MiB (default: %(default)s)")
    add("--size", type=int, metavar="PIXELS", help="side of the network's input (default: the network's own); a smaller "
        "multiple of 32 makes cheap early epochs of the EfficientViT networks")
    add("--boxes", type=int, default=boxes, metavar="N", help="objects drawn per image (default: %(default)s)")
    add("--box-shift", type=int, default=5, metavar="PIXELS", help="largest outward shift of a box's side (default: 5)")
    add("--box-jitter", type=float, default=0.0, metavar="PART", help="and shift either way by up to this part of the "
        "box's side, below 0.5 (default: 0)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--bs", type=int, default=batch_size, help="batch size of each process (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="add the gradients of N batches for one update")
    add("--epochs", type=int, default=8, help="default: %(default)s")
    add("--steps", type=int, metavar="N", help="stop after N updates instead of --epochs")
    add("--lr", type=float, default=lr, help="learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=weight_decay, help="default: %(default)s")
    add("--decay-matrices-only", action="store_true", help="no weight decay on biases and norms")
    add("--schedule", choices=schedules, default=schedule, help="plateau: halve after an epoch without gain; halve: "
        "after each epoch; cosine: to zero over all updates (default: %(default)s)")
    add("--warmup", type=int, default=0, metavar="STEPS", help="linear rise of the learning rate, with cosine")
    add("--clip", type=float, default=0.5, help="largest gradient norm (default: %(default)s)")
    add("--average", type=float, metavar="DECAY", help="validate and write a moving average of the weights, e.g. 0.999")
    add("--seed", type=int, default=42, help="default: %(default)s")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=out, metavar="DIR", help="folder of checkpoints and log (default: %(default)s)")
    add("--resume", action="store_true", help="go on from OUT/last.pt; give the other options as before")
    add("--minutes", type=float, metavar="M", help="stop after M minutes, saved; --resume goes on")
    add("--save-minutes", type=float, default=10, metavar="M", help="time between checkpoints (default: %(default)s)")
    add("--log-steps", type=int, default=50, metavar="N", help="updates per row of log.csv (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    add("--amp", choices=("auto", "off"), default="auto", help="auto: bfloat16 where the hardware has it")
    add("--threads", type=int, help="CPU threads of each process")
    add("--workers", type=int, default=1, help="processes that read samples (default: %(default)s)")


def start(arguments):
    """Check what is common, fix threads and seed, join the other processes: World. ValueError, one line."""
    for name, low in (("bs", 1), ("accumulate", 1), ("epochs", 1), ("steps", 1), ("samples_per_epoch", 1), ("lr", 0),
                      ("limit_samples", 1), ("val_limit", 1), ("log_steps", 1), ("workers", 0), ("warmup", 0),
                      ("boxes", 1), ("box_shift", 0)):
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {low}, found {value}")
    if not 0 <= arguments.box_jitter < 0.5:                                    # from there on a box may turn inside out
        raise ValueError(f"--box-jitter: expected at least 0 and below 0.5, found {arguments.box_jitter}")
    if arguments.warmup and arguments.schedule != "cosine":
        raise ValueError(f"--warmup: needs --schedule cosine, found {arguments.schedule}")
    if not 0 < arguments.val_fraction < 1:
        raise ValueError(f"--val-fraction: expected a number between 0 and 1, found {arguments.val_fraction}")
    if arguments.average is not None and not 0 < arguments.average < 1:
        raise ValueError(f"--average: expected a decay between 0 and 1, found {arguments.average}")
    last = arguments.out / "last.pt"
    if arguments.resume and not last.is_file():
        raise ValueError(f"{last}: --resume: no such checkpoint")
    if not arguments.resume and last.exists():
        raise ValueError(f"{last}: holds an earlier run; continue it with --resume or name another --out")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_memory()
    cv2.setNumThreads(1)
    torch.manual_seed(arguments.seed)
    return World(arguments.device, arguments.amp)


def check_size(arguments, network):
    """The input side of `network` (a Sam) in this run; EfficientViT networks take smaller ones."""
    size = arguments.size or network.image_size
    if size != network.image_size and (not network.name.startswith("medficientsam") or size % 32 or size < 64):
        expected = "a multiple of 32" if network.name.startswith("medficientsam") else f"{network.image_size}"
        raise ValueError(f"--size: expected {expected} for {network.name}, found {size}")
    return size


def split_data(arguments, world, need_masks=False):
    """(training cases, validation cases, SliceCache) of --data and --val. ValueError with one line."""
    with quiet(world):
        cases = scan_cases(arguments.data, arguments.strict, need_masks=need_masks)
        if arguments.val:
            train, val = cases, scan_cases(arguments.val, arguments.strict, need_masks=need_masks)
        else:
            train, val = split_cases(cases, arguments.val_fraction, arguments.seed)
    return train, val, SliceCache(arguments.cache, arguments.cache_mb)


def quiet(world):
    """The first process alone may speak."""
    return nullcontext() if world.first else redirect_stderr(io.StringIO())


def slices_of(arguments, world, cases, cache, labelled_only):
    with world.first_goes_ahead(), quiet(world):
        return list_slices(cases, cache, labelled_only, arguments.strict)


def validation_slices(arguments, world, cases, cache, labelled_only):
    """At most --val-limit slices, the same in every run. ValueError with one line where there is none."""
    slices = slices_of(arguments, world, cases, cache, labelled_only)
    if not slices:
        raise ValueError(f"{arguments.val or arguments.data}: no validation slice{' with a label' * labelled_only} in "
                         f"{len(cases)} cases, expected --val or more cases")
    return draw_slices(cases, slices, arguments.val_limit, seed=0, power=0.5)


def draw_slices(cases, slices, count, seed, power=None):
    """`count` different slices in random order; `power` favours small modalities as `balance_weights` does."""
    rng = np.random.default_rng(seed)
    weights = np.ones(len(slices)) if power is None else balance_weights(cases, slices, power)
    order = np.argsort(-np.log(1 - rng.random(len(slices))) / weights)  # Efraimidis & Spirakis 2006: no replacement
    return [slices[i] for i in order[:count]]


def make_sampler(arguments, world, cases, slices):
    """EpochSampler over the slices, balanced if asked. ValueError when they do not fill a batch."""
    batch = arguments.bs * world.size * arguments.accumulate
    total = arguments.samples_per_epoch or len(slices)
    if batch > min(total, len(slices)):
        raise ValueError(f"--bs: an update takes {batch} samples, more than the {len(slices)} slices"
                         + (f" or the {total} samples of an epoch" if arguments.samples_per_epoch else ""))
    weights = None if arguments.balance is None else balance_weights(cases, slices, arguments.balance)
    return EpochSampler(len(slices), arguments.seed, world.rank, world.size, weights, arguments.samples_per_epoch)


def modality_means(cases, slices, scores, world, label="dsc"):
    """Scores {index into slices: mean score}, from this process, -> {label: mean over modalities, label_CT: …}.

    Slices of one case are averaged first. The modalities are those of `slices`, whichever of them got a score.
    """
    sums = {}
    for index, (case_index, _) in enumerate(slices):
        total = sums.setdefault(f"{cases[case_index].modality}/{case_index}", 0.0)
        sums[f"{cases[case_index].modality}/{case_index}"] = total + scores.get(index, 0.0)
    counts = dict.fromkeys(sums, 0)
    for index in scores:
        case_index = slices[index][0]
        counts[f"{cases[case_index].modality}/{case_index}"] += 1
    sums, counts = world.sum(sums), world.sum(counts)
    by_modality = {}
    for key in sums:
        if counts[key]:
            by_modality.setdefault(key.split("/")[0], []).append(sums[key] / counts[key])
    means = {modality: float(np.mean(values)) for modality, values in sorted(by_modality.items())}
    return ({label: float(np.mean(list(means.values()))) if means else math.nan}
            | {f"{label}_{modality}": value for modality, value in means.items()})


def run_script(main):
    """Exit with main()'s status; a bad input is one line on stderr and status 1."""
    try:
        status = main()
    except (ValueError, OSError) as error:
        text = str(error)
        if text.startswith("Caught "):                                         # in a DataLoader's worker: after its traceback
            text = text.splitlines()[-1].split(": ", 1)[-1]
        print(text, file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on (with --resume if OUT/last.pt exists)", file=sys.stderr)
        status = 130
    sys.exit(status)
