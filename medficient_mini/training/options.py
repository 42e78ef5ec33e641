"""What both training scripts share: their options, start and end, the data of training and validation."""
import gc
import io
import math
import shlex
import sys
from contextlib import nullcontext, redirect_stderr
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist

from ..files import add_option, complain, option_parser, show_any_name
from ..inference.names import patient_of
from ..machine import keep_memory
from ..show.progress import ProgressBar
from .augment import Objects
from .cases import balance_weights, describe_patients, list_slices, scan_cases, split_cases, with_neighbours
from .distributed import Distributed
from .samples import SliceDataset
from .trainer import say
from .volume_cache import SliceCache, file_key

RANGES = ((1, math.inf, "bs accumulate epochs steps samples_per_epoch limit_samples val_limit log_steps boxes threads"),
          (0, math.inf, "lr weight_decay minutes save_minutes cache_mb seed workers warmup box_shift"),
          (0.001, math.inf, "clip"), (0, 1, "in_use balance"), (0, 0.499, "box_jitter"), (0.001, 0.999, "val_fraction"),
          (0.001, 1 - 1e-9, "ema"))


def common_parser(doc, *, out, lr, weight_decay, bs, schedule, boxes):
    """Return a parser with the options of both scripts, or in an `@FILE`, read like a shell's."""
    parser, _ = option_parser(doc, fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = partial(shlex.split, comments=True)
    add = partial(add_option, parser.add_argument_group("data"))
    add("--data", "data/train", "folder of NPZ cases, searched recursively")
    add("--val", str, "folder of validation cases; without it --val-fraction of the patients of --data")
    add("--val-fraction", 0.1, "part of the patients for validation")
    add("--patient", str, "how to find the patient in a file's name (default: guessed, e.g. P001 of P001_slice01)",
        metavar="REGEX")
    add("--val-limit", 200, "validate on at most so many slices")
    add("--limit-samples", int, "train on so many slices drawn at random")
    add("--samples-per-epoch", int, "length of an epoch (default: every slice once)")
    add("--balance", float, "draw modalities in proportion to (number of cases) ** POWER (without a number 0.5)",
        nargs="?", const=0.5, metavar="POWER")
    add("--cache", "runs/cache", "folder of unpacked volumes")
    add("--cache-mb", 20000, "size limit of --cache in MiB")
    add("--size", int, "side of the input in pixels; smaller multiples of 32 make cheap early epochs of EfficientViT")
    add("--boxes", boxes, "objects drawn per image")
    add("--box-shift", 5, "largest outward shift of a box's side in pixels")
    add("--box-jitter", 0.0, "and shift either way by up to this part of the box's side, below 0.5")
    add("--in-use", 0.0, "part of volumes' samples with the boxes of inference, sometimes beyond the object's end")
    add("--photometric", False, "also change brightness, contrast, sharpness, noise, colours")
    add("--decoder-weights", str, "checkpoint whose prompt encoder and mask decoder are taken")
    add = partial(add_option, parser.add_argument_group("optimisation"))
    add("--bs", bs, "batch size of each process")
    add("--accumulate", 1, "add the gradients of so many batches for one update")
    add("--epochs", 8, "length of the run")
    add("--steps", int, "stop after so many updates instead of --epochs")
    add("--lr", lr, "learning rate")
    add("--weight-decay", weight_decay, "of AdamW")
    add("--decay-matrices-only", False, "no weight decay on biases and norms")
    add("--schedule", schedule, "halve the rate after an epoch without gain, after each epoch, or lower it along a "
        "cosine to zero over all updates", choices=("plateau", "halve", "cosine"))
    add("--warmup", 0, "updates of a linear rise of the learning rate, with cosine")
    add("--clip", 0.5, "largest gradient norm")
    add("--average --ema", float, "decay, e.g. 0.999, of an average of the weights, which is validated and written",
        dest="ema")
    add("--seed", 42, "another one gives other samples and other random weights")
    add = partial(add_option, parser.add_argument_group("run"))
    add("-o --out", out, "folder of checkpoints and log")
    add("--resume", False, "go on from OUT/last.pt; give the other options as before")
    add("--minutes", math.inf, "stop after so many minutes, saved; --resume goes on")
    add("--save-minutes", 10.0, "time between checkpoints")
    add("--log-steps", 50, "updates per row of log.csv")
    add("--device", "auto", "auto (a GPU where there is one), cpu, cuda, cuda:1, …")
    add("--amp", "auto", "auto: bfloat16 where the hardware has it", choices=("auto", "off"))
    add("--threads", int, "CPU threads of each process")
    add("--workers", 1, "processes that read samples")
    return parser


def run_script(train, arguments):
    """Return the exit status of train(arguments, Distributed); a bad input is one line on stderr and status 1."""
    show_any_name()
    try:
        world = start(arguments)
        with nullcontext() if world.first else redirect_stderr(io.StringIO()):
            return train(arguments, world)
    except Exception as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on (with --resume if OUT/last.pt exists)", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            # DistributedDataParallel is in a circle of references and would keep the group's threads to the end of
            # Python, where they can end the process with SIGABRT.
            gc.collect()
            dist.destroy_process_group()


def start(arguments):
    """Check what is common, fix threads and seed, join the other processes: Distributed. ValueError, one line."""
    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(arguments, name)
            if value is not None and not low <= value <= high:
                expected = f"at least {low}" if high == math.inf else f"{low:g} to {high:g}"
                raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, found {value}")
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


def read_data(arguments, world, network, labelled, mask_size=None):
    """Return the SliceDatasets of training and validation for `network`, a Sam. ValueError where nothing is left.

    All slices have labels if `labelled`, else those of validation with --decoder-weights; without it has no objects.
    """
    size, is_efficientvit = arguments.size or network.image_size, network.name.startswith("medficientsam")
    if size != network.image_size and (not is_efficientvit or size % 32 or size < 64):
        raise ValueError(f"--size: expected {network.image_size}, or with an EfficientViT network a multiple of 32 from"
                         f" 64, found {size} for {network.name}")
    cases = scan_cases(arguments.data, need_masks=labelled)
    if arguments.val:
        val_cases = scan_cases(arguments.val, need_masks=labelled)
        cases = outside_validation(cases, val_cases, arguments)
    else:
        cases, val_cases = split_cases(cases, arguments.val_fraction, arguments.seed, arguments.patient)
    say(describe_patients([*cases, *val_cases], arguments.patient))
    cache = SliceCache(arguments.cache, arguments.cache_mb)
    val_labelled = labelled or bool(arguments.decoder_weights)
    with world.first_goes_ahead():                                             # the others find its work in the cache
        slices = list_slices(cases, cache, labelled)
        val_slices = list_slices(val_cases, cache, val_labelled)
    if arguments.in_use and labelled:
        slices = with_neighbours(slices)                                       # without labels all are there already
    if arguments.limit_samples:
        slices = draw_slices(slices, arguments.limit_samples, arguments.seed)
    if not val_slices:
        raise ValueError(f"{arguments.val or arguments.data}: no validation slice{' with a label' * val_labelled} in "
                         f"{len(val_cases)} cases, expected --val or more cases")
    # The same slices and prompts in every run, whatever its seed; boxes are as loose as users draw them.
    val_slices = draw_slices(val_slices, arguments.val_limit, seed=0, power=0.5)
    mask_size = mask_size or size
    prompts = Objects(5, mask_size, network.image_size, jitter=0.03) if val_labelled else None
    drawn = Objects(arguments.boxes, mask_size, network.image_size, arguments.box_shift, arguments.box_jitter)
    training = SliceDataset(slices, cache, (size, network.resize), drawn, arguments.seed,
                            photometric=arguments.photometric, in_use=arguments.in_use)
    return training, SliceDataset(val_slices, cache, training.network_input, prompts)


def outside_validation(cases, val_cases, arguments):
    """Leave out cases of patients that --val holds, by a copy of a file or by name, where that is not a mere number."""
    def patient(case):
        return patient_of(case.path, arguments.patient)

    held = {file_key(case.path) for case in val_cases}
    taken = {patient(case) for case in val_cases if not patient(case).isdigit()}
    taken |= {patient(case) for case in cases if file_key(case.path) in held}
    left = [case for case in cases if patient(case) not in taken]
    if len(left) < len(cases):
        say(f"{arguments.val}: {len(cases) - len(left)} cases of {arguments.data} are of its patients, by name or by "
            "copies of files, and are not trained on")
    if not left:
        raise ValueError(f"{arguments.data}: --data: expected cases of patients that --val does not hold, found none")
    return left


def draw_slices(slices, count, seed, power=None):
    """Return `count` different slices in random order; `power` favours small modalities as `balance_weights` does."""
    weights = 1.0 if power is None else balance_weights(slices, power)
    keys = -np.log(1 - np.random.default_rng(seed).random(len(slices))) / weights
    return [slices[i] for i in np.argsort(keys)[:count]]               # Efraimidis & Spirakis 2006: no replacement


def single_batches(dataset, world, label, shared=True):
    """Yield (index, batch of that one sample), each time the same, for this process's share of a data set or all."""
    indices = range(world.rank, len(dataset), world.size) if shared else range(len(dataset))
    for index in ProgressBar(indices, len(indices), label):
        yield index, world.to_device(torch.utils.data.default_collate([dataset[0, index, index]]))


def modality_means(dataset, scores, world):
    """Average all processes' {index: score} over slices of a case, cases, modalities: {"dsc": mean, "dsc_CT": …}."""
    scores = np.array([*world.sum(dict.fromkeys(range(len(dataset)), 0.0) | scores).values()])
    weights = balance_weights(dataset.slices, power=0)
    modalities = np.array([case.modality for case, _ in dataset.slices])
    means = {f"dsc_{name}": np.average(scores, weights=weights * (modalities == name)).item()
             for name in sorted(set(modalities))}
    return {"dsc": (weights @ scores).item()} | means
