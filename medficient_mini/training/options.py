"""What both training scripts are given: their common options, the cases split in two, slices, validation."""
import argparse
import gc
import io
import math
import shlex
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist

from ..files import first_line
from ..inference.names import patient_of, show_any_name
from ..machine import keep_memory
from ..show.progress import ProgressBar
from .cases import balance_weights, describe_patients, list_slices, scan_cases, split_cases
from .distributed import Distributed
from .samples import EpochSampler
from .trainer import Trainer, say
from .volume_cache import SliceCache, file_key


def common_parser(doc, **defaults):
    """Return a parser with the options of both scripts; `defaults` are those in which the paper's two tables differ.

    `@FILE` on the command line stands for the options in that file, which are read like a shell's: several on a line,
    quotes, comments behind #.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data/train", metavar="DIR", help="NPZ cases, searched recursively (default: %(default)s)")
    add("--val", metavar="DIR", help="validation cases; without it --val-fraction of the patients of --data")
    add("--val-fraction", type=float, default=0.1, help="part of the patients for validation (default: %(default)s)")
    add("--patient", metavar="REGEX", help="what in a file's name tells the patient: the first group or the whole "
        "match (default: guessed, e.g. P001 of P001_slice01)")
    add("--val-limit", type=int, default=200, help="validate on at most N slices (default: %(default)s)")
    add("--strict", action="store_true", help="stop at a bad file instead of skipping it")
    add("--limit-samples", type=int, help="train on N slices drawn at random")
    add("--samples-per-epoch", type=int, help="length of an epoch (default: every slice once)")
    add("--balance", type=float, nargs="?", const=0.5, metavar="POWER", help="draw modalities in proportion to (number "
        "of cases) ** POWER, within one every case alike (POWER without a number: 0.5; off by default)")
    add("--cache", default="runs/cache", metavar="DIR", help="unpacked volumes (default: %(default)s)")
    add("--cache-mb", type=int, default=20000, help="size limit of --cache in MiB (default: %(default)s)")
    add("--size", type=int, metavar="PIXELS", help="side of the network's input (default: the network's own); a "
        "smaller multiple of 32 makes cheap early epochs of the EfficientViT networks")
    add("--boxes", type=int, help="objects drawn per image (default: %(default)s)")
    add("--box-shift", type=int, default=5, metavar="PIXELS", help="largest outward shift of a box's side (default: 5)")
    add("--box-jitter", type=float, default=0.0, metavar="PART", help="and shift either way by up to this part of the "
        "box's side, below 0.5 (default: 0)")
    add("--in-use", type=float, default=0.0, metavar="PART", help="part of the samples of volumes whose boxes are "
        "those that inference gives each slice, sometimes beyond the object's end, where masks are empty (default: 0)")
    add("--photometric", action="store_true", help="also change brightness, contrast, sharpness, noise, colours")
    add = parser.add_argument_group("optimisation").add_argument
    add("--bs", type=int, help="batch size of each process (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="add the gradients of N batches for one update")
    add("--epochs", type=int, default=8, help="default: %(default)s")
    add("--steps", type=int, help="stop after N updates instead of --epochs")
    add("--lr", type=float, help="learning rate (default: %(default)s)")
    add("--weight-decay", type=float, help="default: %(default)s")
    add("--decay-matrices-only", action="store_true", help="no weight decay on biases and norms")
    add("--schedule", choices=("plateau", "halve", "cosine"), help="plateau: halve after an epoch without gain; halve: "
        "after each epoch; cosine: to zero over all updates (default: %(default)s)")
    add("--warmup", type=int, default=0, help="linear rise of the learning rate, with cosine")
    add("--clip", type=float, default=0.5, help="largest gradient norm (default: %(default)s)")
    add("--average", "--ema", dest="ema", type=float, metavar="DECAY", help="validate and write an exponential moving "
        "average of the weights, e.g. 0.999")
    add("--seed", type=int, default=42, help="default: %(default)s")
    add = parser.add_argument_group("run").add_argument
    add("-o", "--out", metavar="DIR", help="folder of checkpoints and log (default: %(default)s)")
    add("--resume", action="store_true", help="go on from OUT/last.pt; give the other options as before")
    add("--minutes", type=float, help="stop after M minutes, saved; --resume goes on")
    add("--save-minutes", type=float, default=10, help="time between checkpoints (default: %(default)s)")
    add("--log-steps", type=int, default=50, help="updates per row of log.csv (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    add("--amp", choices=("auto", "off"), default="auto", help="auto: bfloat16 where the hardware has it")
    add("--threads", type=int, help="CPU threads of each process")
    add("--workers", type=int, default=1, help="processes that read samples (default: %(default)s)")
    parser.set_defaults(**defaults)
    return parser


def run_script(train, arguments):
    """Return the exit status of train(arguments, Distributed); a bad input is one line on stderr and status 1.

    Of several processes the first alone speaks, but for such lines.
    """
    show_any_name()
    try:
        world = start(arguments)
        with nullcontext() if world.first else redirect_stderr(io.StringIO()):
            return train(arguments, world)
    except (ValueError, OSError) as error:
        text = str(error)
        in_worker = text.startswith("Caught ")                                 # its last line is the error itself
        print(text.splitlines()[-1].split(": ", 1)[-1] if in_worker else first_line(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on (with --resume if OUT/last.pt exists)", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            # DistributedDataParallel is in a circle of references and would keep the group's threads to the very end of
            # Python, where they can end the process with SIGABRT.
            gc.collect()
            dist.destroy_process_group()


def start(arguments):
    """Check what is common, fix threads and seed, join the other processes: Distributed. ValueError, one line."""
    ranges = dict.fromkeys(("bs", "accumulate", "epochs", "steps", "samples_per_epoch", "limit_samples", "val_limit",
                            "log_steps", "boxes"), (1, math.inf))
    ranges |= dict.fromkeys(("lr", "weight_decay", "workers", "warmup", "box_shift"), (0, math.inf))
    ranges |= {"in_use": (0, 1), "box_jitter": (0, 0.499), "val_fraction": (0.001, 0.999), "ema": (0.001, 1 - 1e-9)}
    for name, (low, high) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, found {value}")
    if arguments.warmup and arguments.schedule != "cosine":
        raise ValueError(f"--warmup: needs --schedule cosine, found {arguments.schedule}")
    last = Path(arguments.out) / "last.pt"
    if arguments.resume != last.is_file():
        raise ValueError(f"{last}: --resume: no such checkpoint" if arguments.resume else
                         f"{last}: holds an earlier run; continue it with --resume or name another --out")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_memory()
    cv2.setNumThreads(1)
    torch.manual_seed(arguments.seed)
    return Distributed(arguments.device, arguments.amp)


def network_input(arguments, network):
    """Return side and resizing of the input of `network` (a Sam) in this run; EfficientViT ones take smaller sides."""
    size = arguments.size or network.image_size
    flexible = network.name.startswith("medficientsam")
    if size != network.image_size and (not flexible or size % 32 or size < 64):
        expected = "a multiple of 32 from 64" if flexible else network.image_size
        raise ValueError(f"--size: expected {expected} for {network.name}, found {size}")
    return size, network.resize


def train_task(arguments, world, task, dataset):
    """Train a task (see trainer.py), whose validation set is `task.validation`, on a SliceDataset: the exit status."""
    trainer = Trainer(arguments, world, task, dataset, make_sampler(arguments, world, dataset.cases, dataset.slices))
    say(f"{len(dataset)} training slices of {len(dataset.cases)} cases, {len(task.validation)} validation slices of "
        f"{len(task.validation.cases)}; {task.network} at {dataset.network_input[0]}; {trainer.steps} updates of "
        f"{trainer.batch} samples")
    return trainer.fit()


# ------------------------------------------------------------------------------------------------- cases and slices

def read_data(arguments, world, labelled, val_labelled):
    """Find the cases of --data and --val and their slices, those with labels alone if `labelled` or `val_labelled`.

    Returns:
        cases, slices, val_cases, val_slices, cache: lists of npz.Header and of (index of the case, z), at most
        --limit-samples and --val-limit slices, and the SliceCache to read them through.
    """
    cases = scan_cases(arguments.data, arguments.strict, need_masks=labelled)
    if arguments.val:
        val_cases = scan_cases(arguments.val, arguments.strict, need_masks=labelled)
        cases = outside_validation(cases, val_cases, arguments)
    else:
        cases, val_cases = split_cases(cases, arguments.val_fraction, arguments.seed, arguments.patient)
    say(describe_patients([*cases, *val_cases], arguments.patient))
    cache = SliceCache(arguments.cache, arguments.cache_mb)
    slices = slices_of(arguments, world, cases, cache, labelled)
    if arguments.limit_samples:
        slices = draw_slices(cases, slices, arguments.limit_samples, arguments.seed)
    val_slices = slices_of(arguments, world, val_cases, cache, val_labelled)
    if not val_slices:
        raise ValueError(f"{arguments.val or arguments.data}: no validation slice{' with a label' * val_labelled} in "
                         f"{len(val_cases)} cases, expected --val or more cases")
    # The same in every run, whatever its seed.
    val_slices = draw_slices(val_cases, val_slices, arguments.val_limit, seed=0, power=0.5)
    return cases, slices, val_cases, val_slices, cache


def outside_validation(cases, val_cases, arguments):
    """Leave out of the cases of --data those of patients that --val holds, by their name or by a copy of a file.

    A patient who is a number alone is another one in another folder, so that copies alone tell.
    """
    held = {file_key(case.path) for case in val_cases}
    patients = {patient_of(case.path, arguments.patient) for case in val_cases}
    patients = {patient for patient in patients if not patient.isdigit()}
    patients |= {patient_of(case.path, arguments.patient) for case in cases if file_key(case.path) in held}
    left = [case for case in cases if patient_of(case.path, arguments.patient) not in patients]
    if len(left) < len(cases):
        say(f"{arguments.val}: {len(cases) - len(left)} cases of {arguments.data} are of its patients, by name or by "
            "copies of files, and are not trained on")
    if not left:
        raise ValueError(f"{arguments.data}: --data: expected cases of patients that --val does not hold, found none")
    return left


def slices_of(arguments, world, cases, cache, labelled_only):
    """Return [(case index, z)]; the first process reads the labels, the others then find them in the cache."""
    with world.first_goes_ahead():
        return list_slices(cases, cache, labelled_only, arguments.strict)


def draw_slices(cases, slices, count, seed, power=None):
    """Return `count` different slices in random order; `power` favours small modalities as `balance_weights` does."""
    rng = np.random.default_rng(seed)
    weights = np.ones(len(slices)) if power is None else balance_weights(cases, slices, power)
    order = np.argsort(-np.log(1 - rng.random(len(slices))) / weights)  # Efraimidis & Spirakis 2006: no replacement
    return [slices[i] for i in order[:count]]


def make_sampler(arguments, world, cases, slices):
    """Return an EpochSampler over the slices, balanced if asked. ValueError when they do not fill a batch."""
    weights = None if arguments.balance is None else balance_weights(cases, slices, arguments.balance)
    sampler = EpochSampler(len(slices), arguments.seed, world.rank, world.size, weights, arguments.samples_per_epoch)
    batch = arguments.bs * world.size * arguments.accumulate
    if batch > min(sampler.n, sampler.total):
        raise ValueError(f"--bs: expected at most the {sampler.n} slices and the {sampler.total} samples of an epoch, "
                         f"found {batch} samples in an update")
    return sampler


# ------------------------------------------------------------------------------------------------------- validation

# Prompts of validation: boxes as loose as users draw them, the same in every run, stage and network.
VALIDATION = dict(count=5, shift=5, jitter=0.03)


def single_batches(dataset, world, label, shared=True):
    """Yield (index, batch of that one sample), each time the same, for this process's share of a data set or all."""
    indices = range(world.rank, len(dataset), world.size) if shared else range(len(dataset))
    for index in ProgressBar(indices, len(indices), label):
        sample = dataset.sample(0, index, index)
        yield index, world.to_device({key: value[None] for key, value in sample.items()})


def modality_means(dataset, scores, world):
    """Average validation scores over the slices of a case, then the cases of a modality, then modalities.

    `scores` {index of the sample: score} are those of this process; returns {"dsc": mean, "dsc_CT": mean of CT, …}.
    """
    scores = world.sum({index: scores.get(index, 0.0) for index in range(len(dataset))})
    of_case, of_modality = {}, {}
    for (case, _), score in zip(dataset.slices, scores.values()):
        of_case.setdefault(case, []).append(score)
    for case, values in of_case.items():
        of_modality.setdefault(f"dsc_{dataset.cases[case].modality}", []).append(np.mean(values))
    means = {key: float(np.mean(values)) for key, values in sorted(of_modality.items())}
    return {"dsc": float(np.mean(list(means.values())))} | means
