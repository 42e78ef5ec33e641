"""Stage 1: an EfficientViT-SAM encoder learns a frozen teacher's image embeddings (MedficientSAM, Sec. 2, Table 2).

    python train_distill.py --data cases --bs 2                               # the paper's settings, student L1
    python train_distill.py --data cases --embeddings runs/embeddings         # teacher's answers computed once, kept
    torchrun --nproc_per_node 4 train_distill.py --data cases                 # four GPUs

The checkpoints hold the encoder alone: infer.py --weights runs/distill/best.pt --decoder-weights lite_medsam.
"""
import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from medficient_mini.inference.checkpoint import load_state, load_strictly, resolve
from medficient_mini.inference.geometry import to_network
from medficient_mini.nets.sam import build_sam
from medficient_mini.show.progress import ProgressBar
from medficient_mini.training.cases import list_slices
from medficient_mini.training.losses import decode_boxes, dice_loss, dsc, embedding_mse
from medficient_mini.training.options import (add_option, common_parser, draw_slices, modality_means, read_data,
                                              run_script, single_batches)
from medficient_mini.training.samples import FLIPS, embedding_path, save_embedding, writing
from medficient_mini.training.trainer import Trainer, read_last

STATISTICS_SLICES = 128   # training slices from which the teacher's mean and variance are taken


def parse_arguments(argv=None):
    parser = common_parser(__doc__, out="runs/distill", lr=0.075, weight_decay=5e-4, bs=2, schedule="plateau", boxes=2)
    add = partial(add_option, parser.add_argument_group("distillation"))
    add("--student", "l1", "size of the EfficientViT-SAM that learns", choices=("l0", "l1", "l2"))
    add("--init", str, "start from this checkpoint's image encoder, e.g. of a run at a smaller --size")
    add("--teacher", "lite_medsam", "checkpoint of any of the five networks, also of its encoder alone, or lite_medsam; "
        "the paper's is MedSAM's medsam_vit_b.pth")
    add("--embeddings", str, "keep the teacher's embeddings in this folder (float16, 2 MB each, restartable) and train "
        "without the teacher. With flips and no mask loss all four flipped versions are kept")
    add("--embeddings-limit", int, "compute them for so many training slices (0: use what is there); the other slices "
        "serve the mask loss alone")
    add("--no-flips", True, "no random flips", dest="flips")
    add("--augment", False, "also random shift, scale and rotation; with --embeddings it needs --mask-loss or --plain")
    add("--plain", 0.0, "part of the samples left unaugmented: they keep the target of their cached embedding")
    add("--start-from-statistics", False, "the student's last norm starts from the teacher's mean and deviation")
    add("--embedding-loss", 1.0, "weight of the embedding error")
    add("--mask-loss", 0.0, "weight of Dice + 4 * cross-entropy of masks through the frozen decoder of "
        "--decoder-weights; the embedding error then counts in units of the teacher's variance")
    return parser.parse_args(argv)


def load_parts(model, weights, *parts):
    """Load parts of a network, strictly, from a checkpoint that may hold others too."""
    path = resolve(weights)
    state = {key: value for key, value in load_state(path)[1].items() if key.split(".")[0] in parts}
    load_strictly(nn.ModuleDict({part: getattr(model, part) for part in parts}), state, path)


def load_teacher(arguments, world):
    """The network of --teacher with its image encoder's weights; its decoder plays no part."""
    teacher = build_sam(load_state(resolve(arguments.teacher))[0])
    load_parts(teacher, arguments.teacher, "image_encoder")
    return world.to_device(teacher.eval().requires_grad_(False))


def build_student(arguments):
    """A student with random weights or those of --init, and the decoder of --decoder-weights, which stays as it is."""
    student = build_sam(f"medficientsam_{arguments.student}").eval()
    if arguments.init:
        load_parts(student, arguments.init, "image_encoder")
    if arguments.decoder_weights:
        load_parts(student, arguments.decoder_weights, "prompt_encoder", "mask_decoder")
    student.requires_grad_(False).image_encoder.requires_grad_(True)
    return student


@torch.no_grad()
def target(teacher, batch):
    """The teacher's embeddings, (B, 256, 64, 64), which the batch brings where there is no teacher."""
    return batch["embedding"] if teacher is None else teacher.image_encoder(batch["teacher_image"])


def statistics_of(embeddings):
    """Mean and variance per channel, float32 (256,) each, of an iterable of embeddings (256, 64, 64)."""
    moments = torch.stack([torch.stack([x.mean((1, 2)), (x ** 2).mean((1, 2))])
                           for x in map(torch.Tensor.double, embeddings)])
    mean, square = moments.mean(0)
    return {"teacher_mean": mean.float(), "teacher_variance": (square - mean ** 2).float()}


def claim_folder(folder, teacher_file):
    """One folder, one teacher: ValueError if the embeddings in `folder` come from another file."""
    mark, digest = Path(folder) / "teacher.json", hashlib.sha256(Path(teacher_file).read_bytes()).hexdigest()
    if not mark.exists():
        with writing(mark) as temporary:
            temporary.write_text(json.dumps({"file": str(teacher_file), "sha256": digest}))
    if digest not in mark.read_text():
        raise ValueError(f"{mark}: expected sha256 {digest} of {teacher_file}, found another; one folder per teacher")


@torch.inference_mode()
def keep_embeddings(arguments, world, dataset):
    """Compute what --embeddings lacks, each process its share, flipped too where flips have nothing else to teach."""
    flips = [(False, False)] if dataset.objects or dataset.mode == "none" else FLIPS
    items = [(dataset.cases[index], z, flip) for index, z in dataset.slices for flip in flips]
    # Each its share first: what is there already changes while the others are writing.
    wanted = [item for item in items[world.rank::world.size]
              if not embedding_path(arguments.embeddings, *item).exists()]
    teacher = load_teacher(arguments, world) if wanted else None
    for case, z, flip in ProgressBar(wanted, len(wanted), "teacher"):
        image = np.flip(dataset.cache.image_and_labels(case, z)[0], np.flatnonzero(flip[::-1]))     # rows are axis 0
        image = to_network(image.copy(), teacher.image_size, teacher.resize)[None]
        with world.autocast():
            embedding = target(teacher, world.to_device({"teacher_image": image}))[0]          # (256, 64, 64)
        save_embedding(embedding_path(arguments.embeddings, case, z, flip), embedding)
    world.sum({})                                                               # all wait for the slowest


def compute_targets(arguments, world, dataset, validation):
    """Fill the folder --embeddings. Returns the training slices that have one; `dataset` keeps all that are of use."""
    folder, cases, labelled = arguments.embeddings, dataset.cases, []
    with world.first_goes_ahead():
        claim_folder(folder, resolve(arguments.teacher))
        if arguments.mask_loss:
            labelled = list_slices(cases, dataset.cache, labelled_only=True, strict=arguments.strict)
    keep_embeddings(arguments, world, validation)
    chosen = draw_slices(cases, dataset.slices, arguments.embeddings_limit, arguments.seed, power=0.5)
    keep_embeddings(arguments, world, replace(dataset, slices=chosen))
    known = [(index, z) for index, z in dataset.slices if embedding_path(folder, cases[index], z).exists()]
    if not known:
        raise ValueError(f"{folder}: --embeddings-limit: expected an embedding of some training slice, found none")
    useful = {*known, *labelled}                                               # the others serve where they have masks
    dataset.slices = [item for item in dataset.slices if item in useful]
    dataset.embeddings = validation.embeddings = folder
    return known


class Distillation(nn.Module):
    """What stage 1 trains and how: the task of a Trainer (see trainer.py).

    With masks the embedding error counts in units of the teacher's variance; where validation has objects DSC decides.
    """
    frozen = ()

    def __init__(self, arguments, world, student, teacher, validation, statistics):
        super().__init__()
        self.student, self.teacher, self.world, self.network = student, teacher, world, student.name
        self.model = nn.ModuleDict({"image_encoder": student.image_encoder})
        self.validation, self.extra = validation, statistics
        self.variance = float(statistics["teacher_variance"].mean())
        self.weights = {"embedding": arguments.embedding_loss}
        if arguments.mask_loss:
            self.weights = {"embedding": arguments.embedding_loss / self.variance, "mask": arguments.mask_loss}
        self.criterion = ("dsc", 1) if validation.objects else ("val_error", -1)

    def count(self, batch):
        """The items of the two terms: images with a target, valid boxes."""
        known = batch["has_embedding"].sum().item() if self.teacher is None else len(batch["image"])
        return {"embedding": known, "mask": batch["box_valid"].sum().item() if "mask" in self.weights else 0}

    def loss(self, batch):
        """The terms of the loss, each averaged over its items."""
        embedding = self.model.image_encoder(batch["image"])                   # (B, 256, 64, 64)
        means = {"embedding": embedding_mse(embedding, target(self.teacher, batch), batch.get("has_embedding"))}
        if "mask" in self.weights and batch["box_valid"].any():
            logits, masks, _ = decode_boxes(self.student, embedding, batch)
            pixels = F.binary_cross_entropy_with_logits(logits[:, 0].float(), masks.float(), reduction="none")
            means["mask"] = dice_loss(logits, masks) + 4 * pixels.mean()
        return means

    forward = loss

    def validate(self, model):
        """Embedding error, also in units of the teacher's variance; with a decoder, DSC of loosened boxes."""
        error, scores = 0.0, {}
        for i, batch in single_batches(self.validation, self.world, "validation"):
            embedding = model.image_encoder(batch["image"])
            error += float(embedding_mse(embedding, target(self.teacher, batch)))
            if self.validation.objects:
                scores[i] = dsc(*decode_boxes(self.student, embedding, batch)[:2])
        error = self.world.sum({"error": error})["error"] / len(self.validation)
        result = {"val_error": error, "val_relative": error / self.variance}
        return result | (modality_means(self.validation, scores, self.world) if self.validation.objects else {})


def train(arguments, world):
    """Read the cases, build the task, train; returns the exit status. ValueError, one line, for bad input."""
    if arguments.mask_loss and not arguments.decoder_weights:
        raise ValueError("--mask-loss: expected --decoder-weights FILE beside it, e.g. lite_medsam, found none")
    has_targets = not arguments.embeddings or arguments.mask_loss or arguments.plain
    if (arguments.augment or arguments.photometric) and not has_targets:
        raise ValueError("--augment, --photometric: expected --mask-loss or --plain beside them, found none: with "
                         "--embeddings such samples have no target")
    student = build_student(arguments)
    resolve(arguments.teacher)                                                 # a missing one shows before long work
    dataset, validation = read_data(arguments, world, student, labelled=False, mask_size=256)       # as decoder
    dataset.mode = "full" if arguments.augment else "flips" if arguments.flips else "none"
    dataset.plain = arguments.plain
    if not arguments.mask_loss:
        dataset.objects = None
    known, teacher = dataset.slices, None
    if arguments.embeddings:
        known = compute_targets(arguments, world, dataset, validation)
    else:
        teacher = load_teacher(arguments, world)
        dataset.teacher_input = validation.teacher_input = teacher.image_size, teacher.resize
    if arguments.resume:
        statistics = read_last(arguments.out)["extra"]
    else:
        some = draw_slices(dataset.cases, known, STATISTICS_SLICES, arguments.seed, power=0.5)
        plain = replace(validation, cases=dataset.cases, slices=some, objects=None)
        batches = single_batches(plain, world, "the teacher's mean and variance", shared=False)
        with world.autocast():
            statistics = statistics_of(target(teacher, batch)[0] for _, batch in batches)
    if arguments.start_from_statistics:
        with torch.no_grad():
            student.image_encoder.norm.bias.copy_(statistics["teacher_mean"])
            student.image_encoder.norm.weight.copy_(statistics["teacher_variance"].sqrt())
    task = Distillation(arguments, world, world.to_device(student), teacher, validation, statistics)
    return Trainer(arguments, world, task, dataset).fit()


def main(argv=None):
    """Train as the command line says; returns the exit status."""
    return run_script(train, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
