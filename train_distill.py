"""Stage 1: an EfficientViT-SAM encoder learns a frozen teacher's image embeddings (MedficientSAM, Sec. 2, Table 2).

    python train_distill.py --data cases --bs 2                               # the paper's settings, student L1
    python train_distill.py --data cases --embeddings runs/embeddings         # teacher's answers computed once, kept
    torchrun --nproc_per_node 4 train_distill.py --data cases                 # four GPUs

The checkpoints hold the encoder alone: infer.py --weights runs/distill/best.pt --decoder-weights lite_medsam.
"""
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from medficient_mini.inference.checkpoint import load_state, load_strictly, resolve
from medficient_mini.inference.geometry import to_network
from medficient_mini.nets.sam import build_sam
from medficient_mini.show.progress import ProgressBar
from medficient_mini.training.augment import Objects
from medficient_mini.training.losses import dice_loss, dsc, embedding_mse
from medficient_mini.training.options import (VALIDATION, common_parser, draw_slices, modality_means, network_input,
                                              read_data, run_script, single_batches, slices_of, train_task)
from medficient_mini.training.samples import FLIPS, SliceDataset, embedding_path, save_embedding, writing
from medficient_mini.training.trainer import read_last

LOGITS_SIZE = 256         # side of the mask decoder's output
STATISTICS_SLICES = 128   # training slices from which the teacher's mean and variance are taken


def parse_arguments(argv=None):
    parser = common_parser(__doc__, out="runs/distill", lr=0.075, weight_decay=5e-4, bs=2, schedule="plateau", boxes=2)
    add = parser.add_argument_group("distillation").add_argument
    add("--student", choices=("l0", "l1", "l2"), default="l1", help="default: %(default)s")
    add("--init", metavar="FILE", help="start from this checkpoint's image encoder, e.g. of a run at a smaller --size")
    add("--teacher", default="lite_medsam", metavar="FILE", help="checkpoint of any of the five networks, also of its "
        "encoder alone, or lite_medsam (default; the paper's is MedSAM's medsam_vit_b.pth)")
    add("--embeddings", metavar="DIR", help="keep the teacher's embeddings there (float16, 2 MB each; computed once, "
        "restartable) and train without the teacher. With flips and no mask loss all four flipped versions are kept")
    add("--embeddings-limit", type=int, metavar="N", help="compute it for at most N training slices, all "
        "modalities served (0: use what is there); the other slices serve the mask loss alone")
    add("--no-flips", dest="flips", action="store_false", help="no random flips")
    add("--augment", action="store_true", help="also random shift, scale and rotation; such a sample has no cached "
        "embedding, so with --embeddings it needs --mask-loss or --plain")
    add("--plain", type=float, default=0.0, metavar="PART", help="leave this part of the samples unaugmented: they "
        "keep the target of their cached embedding (default: 0)")
    add("--start-from-statistics", action="store_true", help="the student's last norm starts from the teacher's "
        "per-channel mean and standard deviation")
    add("--embedding-loss", type=float, default=1.0, metavar="W", help="weight of the embedding error (default: 1)")
    add("--mask-loss", type=float, default=0.0, metavar="W", help="weight of Dice + 4 * cross-entropy of masks through "
        "the frozen decoder of --decoder-weights; the embedding error then counts in units of the teacher's variance")
    add("--decoder-weights", metavar="FILE", help="prompt encoder and mask decoder for --mask-loss and the "
        "validation's DSC (default: none)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------- teacher and student

def load_parts(model, path, *parts):
    """Load the named parts of a network, strictly, from a checkpoint that may hold others too."""
    state = {key: value for key, value in load_state(path)[1].items() if key.split(".")[0] in parts}
    load_strictly(nn.ModuleDict({part: getattr(model, part) for part in parts}), state, path)


def load_teacher(arguments, world):
    """The network of --teacher with its image encoder's weights; its decoder plays no part and keeps random ones."""
    path = resolve(arguments.teacher)
    teacher = build_sam(load_state(path)[0])
    load_parts(teacher, path, "image_encoder")
    return world.to_device(teacher.eval().requires_grad_(False))


def build_student(arguments):
    """A student with random weights or those of --init, and the decoder of --decoder-weights, which stays as it is."""
    student = build_sam(f"medficientsam_{arguments.student}").eval()
    if arguments.init:
        load_parts(student, resolve(arguments.init), "image_encoder")
    if arguments.decoder_weights:
        load_parts(student, resolve(arguments.decoder_weights), "prompt_encoder", "mask_decoder")
    student.prompt_encoder.requires_grad_(False)
    student.mask_decoder.requires_grad_(False)
    return student


def claim_folder(folder, teacher_file):
    """One folder, one teacher: ValueError if the embeddings in `folder` come from another file."""
    mark, digest = Path(folder) / "teacher.json", hashlib.sha256(Path(teacher_file).read_bytes()).hexdigest()
    if not mark.exists():
        with writing(mark) as temporary:
            temporary.write_text(json.dumps({"file": str(teacher_file), "sha256": digest}))
    if digest not in mark.read_text():
        raise ValueError(f"{mark}: expected sha256 {digest} of {teacher_file}, found another; one folder per teacher")


def read_images(cache, teacher_input, wanted):
    """Paths and the teacher's inputs, (N, 3, size, size), of a list of (path, case, z, (horizontal, vertical flip))."""
    images = []
    for _, case, z, (horizontal, vertical) in wanted:
        image = cache.image_and_labels(case, z)[0][::-1 if vertical else 1, ::-1 if horizontal else 1]
        images.append(to_network(image.copy(), *teacher_input))
    return [path for path, *_ in wanted], torch.stack(images)


@torch.inference_mode()
def keep_embeddings(arguments, world, cases, slices, cache, flips, label):
    """Compute the embeddings that --embeddings lacks; each process its share. The teacher is loaded only if needed."""
    items = [(embedding_path(arguments.embeddings, cases[index], z, flip), cases[index], z, flip)
             for index, z in slices for flip in flips]
    # Each its share first: what is there already differs from one look to the next while the others are writing.
    wanted = [item for item in items[world.rank::world.size] if not item[0].exists()]
    if wanted:
        teacher = load_teacher(arguments, world)
        read = partial(read_images, cache, (teacher.image_size, teacher.resize))
        loader = torch.utils.data.DataLoader(wanted, batch_size=4, num_workers=arguments.workers, collate_fn=read)
        for paths, images in ProgressBar(loader, len(loader), label):
            with world.autocast():
                embeddings = teacher.image_encoder(world.to_device({"image": images})["image"])   # (N, 256, 64, 64)
            for path, embedding in zip(paths, embeddings):
                save_embedding(path, embedding)
    world.wait()


def statistics_of(embeddings):
    """Mean and variance per channel, float32 (256,) each, of an iterable of embeddings (256, 64, 64)."""
    moments = torch.stack([torch.stack([x.mean((1, 2)), (x ** 2).mean((1, 2))])
                           for x in (embedding.double() for embedding in embeddings)])
    mean, square = moments.mean(0)
    return {"teacher_mean": mean.float(), "teacher_variance": (square - mean ** 2).float()}


# ------------------------------------------------------------------------------------------------------------- task

@torch.no_grad()
def target(teacher, batch):
    """The teacher's embeddings, (B, 256, 64, 64), which the batch brings where there is no teacher."""
    return batch["embedding"] if teacher is None else teacher.image_encoder(batch["teacher_image"])


class Distillation(nn.Module):
    """What stage 1 trains and how: the task of a Trainer (see trainer.py).

    Args:
        teacher: the network whose embeddings are the targets, None where the batches bring them.
        validation: the SliceDataset for validation; with `objects` if the student's decoder is a trained one.
        statistics: what `statistics_of` found. With masks the embedding error is in units of the teacher's variance.
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
        self.criterion = ("dsc", "max") if validation.objects else ("val_error", "min")

    def count(self, batch):
        """The items of the two terms: images with a target, valid boxes."""
        known = int(batch["has_embedding"].sum()) if self.teacher is None else len(batch["image"])
        return {"embedding": known, "mask": int(batch["box_valid"].sum()) if "mask" in self.weights else 0}

    def decode(self, embedding, batch):
        """Logits (N, 1, 256, 256) and masks (N, 256, 256) of the N valid boxes of a batch."""
        valid = batch["box_valid"]                                             # (B, M)
        rows = valid.nonzero(as_tuple=True)[0]
        return self.student.decode(embedding, batch["boxes"][valid], image_index=rows)[0], batch["masks"][valid]

    def loss(self, batch):
        """The terms of the loss, each averaged over its items."""
        embedding = self.model.image_encoder(batch["image"])                   # (B, 256, 64, 64)
        means = {"embedding": embedding_mse(embedding, target(self.teacher, batch), batch.get("has_embedding"))}
        if "mask" in self.weights:
            means["mask"] = embedding.new_zeros(())
            if batch["box_valid"].any():
                logits, masks = self.decode(embedding, batch)
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
                scores[i] = dsc(*self.decode(embedding, batch))
        error = self.world.sum({"error": error})["error"] / len(self.validation)
        result = {"val_error": error, "val_relative": error / self.variance}
        return result | (modality_means(self.validation, scores, self.world) if self.validation.objects else {})


# ------------------------------------------------------------------------------------------------------------ script

def compute_targets(arguments, world, cases, slices, val_cases, val_slices, cache):
    """Fill the folder --embeddings. Returns the training slices with an embedding, and all that are of use."""
    folder = arguments.embeddings
    with world.first_goes_ahead():
        claim_folder(folder, resolve(arguments.teacher))
    flips = list(FLIPS) if arguments.flips and not arguments.mask_loss else [(False, False)]
    chosen = draw_slices(cases, slices, arguments.embeddings_limit, arguments.seed, power=0.5)
    keep_embeddings(arguments, world, val_cases, val_slices, cache, [(False, False)], "teacher on validation slices")
    keep_embeddings(arguments, world, cases, chosen, cache, flips, "teacher on training slices")
    known = [(index, z) for index, z in slices if embedding_path(folder, cases[index], z).exists()]
    if not known:
        raise ValueError(f"{folder}: --embeddings-limit: expected an embedding of some training slice, found none")
    labelled = slices_of(arguments, world, cases, cache, labelled_only=True) if arguments.mask_loss else []
    useful = {*known, *labelled}                                               # the others serve where they have masks
    return known, [item for item in slices if item in useful]


def train(arguments, world):
    """Read the cases, build the task, train; returns the exit status. ValueError, one line, for bad input."""
    if arguments.mask_loss and not arguments.decoder_weights:
        raise ValueError("--mask-loss: expected --decoder-weights FILE beside it, e.g. lite_medsam, found none")
    changed = arguments.augment or arguments.photometric
    if arguments.embeddings and changed and not (arguments.mask_loss or arguments.plain):
        raise ValueError("--augment, --photometric: expected --mask-loss or --plain beside them, found none: with "
                         "--embeddings such samples have no target")
    student = build_student(arguments)
    student_input = network_input(arguments, student)
    resolve(arguments.teacher)                                                 # a missing one shows before long work
    cases, slices, val_cases, val_slices, cache = read_data(arguments, world, False, bool(arguments.decoder_weights))
    common, known, teacher = dict(embeddings=arguments.embeddings), slices, None
    if arguments.embeddings:
        known, slices = compute_targets(arguments, world, cases, slices, val_cases, val_slices, cache)
    else:
        teacher = load_teacher(arguments, world)
        common = dict(teacher_input=(teacher.image_size, teacher.resize))
    common |= dict(cache=cache, network_input=student_input)
    drawn = Objects(arguments.boxes, LOGITS_SIZE, student.image_size, arguments.box_shift, arguments.box_jitter)
    dataset = SliceDataset(
        cases, slices, objects=drawn if arguments.mask_loss else None, seed=arguments.seed,
        mode="full" if arguments.augment else "flips" if arguments.flips else "none", plain=arguments.plain,
        photometric=arguments.photometric, in_use=arguments.in_use, **common)
    prompts = Objects(mask_size=LOGITS_SIZE, prompt_size=student.image_size, **VALIDATION)
    validation = SliceDataset(val_cases, val_slices, objects=prompts if arguments.decoder_weights else None, **common)
    if arguments.resume:
        statistics = read_last(arguments.out)["extra"]
    else:
        some = SliceDataset(cases, draw_slices(cases, known, STATISTICS_SLICES, arguments.seed, power=0.5), **common)
        batches = single_batches(some, world, "the teacher's mean and variance", shared=False)
        with world.autocast():
            statistics = statistics_of(target(teacher, batch)[0] for _, batch in batches)
    if arguments.start_from_statistics:
        with torch.no_grad():
            student.image_encoder.norm.bias.copy_(statistics["teacher_mean"])
            student.image_encoder.norm.weight.copy_(statistics["teacher_variance"].sqrt())
    task = Distillation(arguments, world, world.to_device(student), teacher, validation, statistics)
    return train_task(arguments, world, task, dataset)


def main(argv=None):
    """Train as the command line says; returns the exit status."""
    return run_script(train, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
