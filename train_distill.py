"""Stage 1: an EfficientViT-SAM encoder learns a frozen teacher's image embeddings (MedficientSAM, Sec. 2, Table 2).

    python train_distill.py --data cases --bs 2                               # the paper's settings, student L1
    python train_distill.py --data cases --embeddings runs/embeddings      # each of the teacher's answers computed once
    torchrun --nproc_per_node 4 train_distill.py --data cases                 # four GPUs

The checkpoints hold the encoder alone: infer.py --weights runs/distill/best.pt --decoder-weights lite_medsam.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from medficient_mini.files import add_option
from medficient_mini.inference.checkpoint import load_state, load_strictly, resolve
from medficient_mini.inference.origin import digest
from medficient_mini.nets.sam import build_sam
from medficient_mini.training.losses import decode_boxes, dice_loss, dsc, embedding_mse
from medficient_mini.training.options import (common_parser, draw_slices, modality_means, read_data, run_script,
                                              single_batches)
from medficient_mini.training.samples import load_embedding, save_embedding
from medficient_mini.training.trainer import Trainer, read_last

STATISTICS_SLICES = 128   # training slices from which the teacher's mean and variance are taken


def parse_arguments(argv=None):
    parser = common_parser(__doc__, out="runs/distill", lr=0.075, weight_decay=5e-4, bs=2, schedule="plateau", boxes=2)
    add = partial(add_option, parser.add_argument_group("distillation"))
    add("--student", "l1", "size of the EfficientViT-SAM that learns", choices=("l0", "l1", "l2"))
    add("--init", str, "start from this checkpoint's image encoder, e.g. of a run at a smaller --size")
    add("--teacher", "lite_medsam", "checkpoint of any of the five networks, also of its encoder alone, or lite_medsam;"
        " the paper's is MedSAM's medsam_vit_b.pth")
    add("--embeddings", str, "keep the teacher's answers in this folder (float16, 8 MB a slice with its flips) and ask "
        "it for none twice; those that are otherwise augmented are always new to it")
    add("--no-flips", True, "no random flips", dest="flips")
    add("--augment", False, "also random shift, scale and rotation")
    add("--start-from-statistics", False, "the student's last norm starts from the teacher's mean and deviation")
    add("--embedding-loss", 1.0, "weight of the embedding error")
    add("--mask-loss", 0.0, "weight of Dice + 4 * cross-entropy of masks through the frozen decoder of "
        "--decoder-weights; the embedding error then counts in units of the teacher's variance")
    return parser.parse_args(argv)


def load_parts(model, weights, *parts):
    """Load parts of a network, strictly, from a checkpoint that may hold others too."""
    path = resolve(weights)
    state = {key: value for key, value in load_state(path)[1].items() if key.startswith(parts)}
    load_strictly(nn.ModuleDict({part: getattr(model, part) for part in parts}), state, path)


def read_teacher(weights):
    """Return the network of --teacher, whose image encoder gives the targets; its decoder plays no part."""
    teacher = build_sam(load_state(resolve(weights))[0]).eval().requires_grad_(False)
    load_parts(teacher, weights, "image_encoder")
    return teacher


@torch.no_grad()
def teach(teacher, batch):
    """Return the teacher's embeddings of a batch, float32 (B, 256, 64, 64), from their files or computed for them."""
    embeddings = []
    for image, file in zip(batch["teacher_image"], batch["embedding_file"]):
        if file and Path(file).exists():
            embedding = load_embedding(file).to(image.device)
        else:
            embedding = teacher.image_encoder(image[None])[0]
            if file:
                embedding = save_embedding(file, embedding)
        embeddings.append(embedding.float())
    return torch.stack(embeddings)


def build_student(arguments):
    """A student with random weights or those of --init, and the decoder of --decoder-weights, which stays as it is."""
    student = build_sam(f"medficientsam_{arguments.student}").eval()
    if arguments.init:
        load_parts(student, arguments.init, "image_encoder")
    if arguments.decoder_weights:
        load_parts(student, arguments.decoder_weights, "prompt_encoder", "mask_decoder")
    student.requires_grad_(False).image_encoder.requires_grad_(True)
    return student


def statistics_of(embeddings):
    """Mean and variance per channel, float32 (256,) each, of an iterable of embeddings (256, 64, 64)."""
    moments = torch.stack([torch.stack([x.mean((1, 2)), (x ** 2).mean((1, 2))])
                           for x in map(torch.Tensor.double, embeddings)])
    mean, square = moments.mean(0)
    return {"teacher_mean": mean.float(), "teacher_variance": (square - mean ** 2).float()}


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
        """The items of the two terms: images, valid boxes."""
        boxes = batch["box_valid"].sum().item() if "mask" in self.weights else 0
        return {"embedding": len(batch["image"]), "mask": boxes}

    def loss(self, batch):
        """The terms of the loss, each averaged over its items."""
        embedding = self.model.image_encoder(batch["image"])                   # (B, 256, 64, 64)
        means = {"embedding": embedding_mse(embedding, teach(self.teacher, batch))}
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
            error += float(embedding_mse(embedding, teach(self.teacher, batch)))
            if self.validation.objects:
                scores[i] = dsc(*decode_boxes(self.student, embedding, batch)[:2])
        error = self.world.sum({"error": error})["error"] / len(self.validation)
        result = {"val_error": error, "val_relative": error / self.variance}
        return result | (modality_means(self.validation, scores, self.world) if self.validation.objects else {})


def train(arguments, world):
    """Read the cases, build the task, train; returns the exit status. ValueError, one line, for bad input."""
    if arguments.mask_loss and not arguments.decoder_weights:
        raise ValueError("--mask-loss: expected --decoder-weights FILE beside it, e.g. lite_medsam, found none")
    if arguments.augment and not arguments.flips:
        raise ValueError("--no-flips: expected no --augment beside it, which flips too, found it")
    student, teacher = build_student(arguments), world.to_device(read_teacher(arguments.teacher))
    dataset, validation = read_data(arguments, world, student, labelled=False, mask_size=256)       # as decoder
    dataset.mode = "full" if arguments.augment else "flips" if arguments.flips else "none"
    if not arguments.mask_loss:
        dataset.objects = None
    dataset.teacher_input = validation.teacher_input = teacher.image_size, teacher.resize
    if arguments.embeddings:
        # One folder per teacher.
        dataset.embeddings = validation.embeddings = Path(arguments.embeddings, digest([resolve(arguments.teacher)]))
        dataset.embeddings.mkdir(parents=True, exist_ok=True)
    if arguments.resume:
        statistics = read_last(arguments.out)["extra"]
        if not statistics:
            raise ValueError(f"{arguments.out}/last.pt: --resume: expected a run of this script, found another's")
    else:
        some = draw_slices(dataset.slices, STATISTICS_SLICES, arguments.seed, power=0.5)
        plain = replace(validation, slices=some, objects=None)
        batches = single_batches(plain, world, "the teacher's mean and variance", shared=False)
        with world.autocast():
            statistics = statistics_of(teach(teacher, batch)[0] for _, batch in batches)
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
