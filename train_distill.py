"""Stage 1: an EfficientViT-SAM encoder learns a frozen teacher's image embeddings (MedficientSAM, Sec. 2, Table 2).

    python train_distill.py --data cases --bs 2                               # the paper's settings, student L1
    python train_distill.py --data cases --embeddings runs/embeddings         # teacher's answers computed once, kept
    torchrun --nproc_per_node 4 train_distill.py --data cases                 # four GPUs

The checkpoints hold the encoder alone: infer.py --weights runs/distill/best.pt --decoder-weights lite_medsam.
"""
import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medficient_mini.inference.checkpoint import ENCODER, load_state, load_strictly, resolve
from medficient_mini.training.samples import DistillDataset, embedding_path, save_embedding
from medficient_mini.inference.geometry import to_network
from medficient_mini.training.losses import bce, dice_loss, embedding_mse
from medficient_mini.nets.sam import build_sam
from medficient_mini.training.options import (add_common_arguments, check_size, draw_slices, make_sampler, modality_means,
                                     run_script, slices_of, split_data, start, validation_slices)
from medficient_mini.show.progress import progress
from medficient_mini.training.trainer import Trainer, read_last

STATISTICS_SLICES = 128   # training slices from which the teacher's mean and variance are taken


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, out=Path("runs/distill"), lr=0.075, weight_decay=5e-4, batch_size=2,
                         schedule="plateau", schedules=("plateau", "halve", "cosine"), boxes=2)
    add = parser.add_argument_group("distillation").add_argument
    add("--student", choices=("l0", "l1", "l2"), default="l1", help="default: %(default)s")
    add("--init", metavar="FILE", help="start from this checkpoint's image encoder, e.g. of a run at a smaller --size")
    add("--teacher", default="lite_medsam", metavar="FILE", help="checkpoint of any of the five networks, also of its "
        "encoder alone, or lite_medsam (default; the paper's is MedSAM's medsam_vit_b.pth)")
    add("--embeddings", metavar="DIR", help="keep the teacher's embeddings there (float16, 2 MB each; computed once, "
        "restartable) and train without the teacher. With flips and no mask loss all four flipped versions are kept")
    add("--embeddings-limit", type=int, metavar="N", help="compute it for at most N training slices, all "
        "modalities served (0: use what is there); the other slices serve the mask loss alone")
    add("--flips", action=argparse.BooleanOptionalAction, default=True, help="random flips (default: on)")
    add("--augment", action="store_true", help="also random shift, scale and rotation; such a sample has no cached "
        "embedding, so with --embeddings it needs --mask-loss or --plain")
    add("--plain", type=float, default=0.0, metavar="PART", help="leave this part of the samples unaugmented: they keep "
        "the target of their cached embedding (default: 0)")
    add("--start-from-statistics", action="store_true", help="the student's last norm starts from the teacher's "
        "per-channel mean and standard deviation")
    add("--embedding-loss", type=float, default=1.0, metavar="W", help="weight of the embedding error (default: 1)")
    add("--mask-loss", type=float, default=0.0, metavar="W", help="weight of Dice + 4 * cross-entropy of masks through "
        "the frozen decoder of --decoder-weights; the embedding error then counts in units of the teacher's variance")
    add("--decoder-weights", metavar="FILE", help="prompt encoder and mask decoder for --mask-loss and the validation's "
        "DSC (default: none)")
    return parser.parse_args()


class TeacherImages(torch.utils.data.Dataset):
    """The teacher's input for each (case index, z, flip)."""

    def __init__(self, cases, wanted, cache, teacher):
        self.cases, self.wanted, self.cache = cases, wanted, cache
        self.size, self.resize = teacher.image_size, teacher.resize

    def __len__(self):
        return len(self.wanted)

    def __getitem__(self, k):
        index, z, (horizontal, vertical) = self.wanted[k]
        image = self.cache.image(self.cases[index], z)[::-1 if vertical else 1, ::-1 if horizontal else 1]
        return k, to_network(np.ascontiguousarray(image), self.size, self.resize)


@torch.inference_mode()
def keep_embeddings(arguments, world, cases, slices, cache, flips, label):
    """Compute the embeddings that --embeddings lacks; each process its share. The teacher is loaded only if needed."""
    # Each its share first: what is there already differs from one look to the next while the others are writing.
    mine = [(index, z, flip) for index, z in slices for flip in flips][world.rank::world.size]
    wanted = [(index, z, flip) for index, z, flip in mine
              if not embedding_path(arguments.embeddings, cases[index], z, flip).exists()]
    if wanted:
        teacher = load_teacher(arguments, world)
        loader = torch.utils.data.DataLoader(TeacherImages(cases, wanted, cache, teacher), batch_size=4,
                                             num_workers=arguments.workers)
        for ks, images in progress(loader, len(loader), label) if world.first else loader:
            with world.autocast():
                embeddings = teacher.image_encoder(world.to_device({"image": images})["image"])
            for k, embedding in zip(ks.tolist(), embeddings):
                index, z, flip = wanted[k]
                save_embedding(embedding_path(arguments.embeddings, cases[index], z, flip), embedding)
    world.wait()


def claim_folder(folder, teacher_file):
    """One folder, one teacher: ValueError if the embeddings in `folder` come from another file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark, digest = folder / "teacher.json", hashlib.sha256(Path(teacher_file).read_bytes()).hexdigest()
    if not mark.exists():
        mark.write_text(json.dumps({"file": str(teacher_file), "sha256": digest}))
    held = json.loads(mark.read_text())
    if held["sha256"] != digest:
        raise ValueError(f"{folder}: holds embeddings of {held['file']}, expected those of {teacher_file}; one folder per teacher")


def statistics_of(embeddings):
    """Mean and variance per channel, float32 (256,) each, of an iterable of embeddings (256, 64, 64)."""
    total = square = count = 0
    for embedding in embeddings:
        embedding = embedding.double().flatten(1)
        total, square, count = total + embedding.sum(1), square + (embedding ** 2).sum(1), count + embedding.shape[1]
    mean = total / count
    return mean.float(), (square / count - mean ** 2).float()


def load_encoder(model, state, path):
    """Only the image encoder of a state dict, strictly."""
    state = {key: value for key, value in state.items() if key.startswith(ENCODER)}
    load_strictly(nn.ModuleDict({"image_encoder": model.image_encoder}), state, path)


def load_teacher(arguments, world):
    """The network of --teacher with its image encoder's weights; its decoder plays no part and keeps random ones."""
    name, state = load_state(path := resolve(arguments.teacher))
    teacher = build_sam(name)
    load_encoder(teacher, state, path)
    return teacher.eval().to(world.device, memory_format=torch.channels_last)


def build_student(arguments):
    """Student with random weights or those of --init, and the decoder of --decoder-weights, which stays as it is."""
    student = build_sam(f"medficientsam_{arguments.student}")
    if arguments.init:
        name, state = load_state(resolve(arguments.init))
        if name != student.name:
            raise ValueError(f"{arguments.init}: --init: holds {name}, expected {student.name}")
        load_encoder(student, state, arguments.init)
    if arguments.decoder_weights:
        name, state = load_state(path := resolve(arguments.decoder_weights))
        state = {key: value for key, value in state.items() if not key.startswith(ENCODER)}
        load_strictly(nn.ModuleDict({"prompt_encoder": student.prompt_encoder, "mask_decoder": student.mask_decoder}),
                      state, path)
    student.prompt_encoder.requires_grad_(False)
    student.mask_decoder.requires_grad_(False)
    return student


def main():
    arguments = parse_arguments()
    world = start(arguments)
    if arguments.mask_loss and not arguments.decoder_weights:
        raise ValueError("--mask-loss: needs --decoder-weights FILE, e.g. lite_medsam")
    if arguments.embeddings and arguments.augment and not (arguments.mask_loss or arguments.plain):
        raise ValueError("--augment: expected --mask-loss or --plain beside it: with --embeddings a rotated sample has no target")
    student = build_student(arguments)
    size, teacher_file = check_size(arguments, student), resolve(arguments.teacher)
    train, val, cache = split_data(arguments, world)
    slices = slices_of(arguments, world, train, cache, labelled_only=False)
    if arguments.limit_samples:
        slices = draw_slices(train, slices, arguments.limit_samples, arguments.seed)
    val_slices = validation_slices(arguments, world, val, cache, labelled_only=bool(arguments.decoder_weights))
    teacher, embeddings = None, arguments.embeddings
    if embeddings:
        with world.first_goes_ahead():
            claim_folder(embeddings, teacher_file)
        flips = [(False, False), (True, False), (False, True), (True, True)] \
            if arguments.flips and not arguments.mask_loss else [(False, False)]
        chosen = draw_slices(train, slices, arguments.embeddings_limit, arguments.seed, power=0.5)
        keep_embeddings(arguments, world, val, val_slices, cache, flips[:1], "teacher on validation slices")
        keep_embeddings(arguments, world, train, chosen, cache, flips, "teacher on training slices")
        known = [(index, z) for index, z in slices if embedding_path(embeddings, train[index], z).exists()]
        if not known:
            raise ValueError(f"{embeddings}: holds no embedding of a training slice, expected some (--embeddings-limit)")
        if len(known) < len(slices):                                           # the others serve where they have masks
            useful = set(known) | set(slices_of(arguments, world, train, cache, True) if arguments.mask_loss else ())
            slices = [item for item in slices if item in useful]
    else:
        teacher = load_teacher(arguments, world)
    student.to(world.device, memory_format=torch.channels_last)

    given = dict(teacher_size=teacher.image_size, teacher_resize=teacher.resize) if teacher else dict(embeddings=embeddings)
    given |= dict(size=size, resize=student.resize, prompt_size=student.image_size, seed=arguments.seed)
    dataset = DistillDataset(train, slices, cache, flips=arguments.flips, max_boxes=arguments.boxes if arguments.mask_loss
                             else 0, augment="full" if arguments.augment else "none", box_shift=arguments.box_shift,
                             box_jitter=arguments.box_jitter, plain=arguments.plain, **given)
    val_dataset = DistillDataset(val, val_slices, cache, max_boxes=5 if arguments.decoder_weights else 0, box_shift=0, **given)

    def alone(samples, i):
        return world.to_device({key: value[None] for key, value in samples.sample(0, i, i).items()})

    def target(batch):                                                         # (B, 256, 64, 64)
        if teacher is None:
            return batch["embedding"]
        with torch.no_grad():
            return teacher.image_encoder(batch["teacher_image"])

    statistics = read_last(arguments.out)["extra"] if arguments.resume else {}
    if not statistics:
        some = draw_slices(train, slices if teacher else known, STATISTICS_SLICES, arguments.seed, power=0.5)
        some = DistillDataset(train, some, cache, **given)
        with torch.no_grad(), world.autocast():
            mean, variance = statistics_of(target(alone(some, i))[0] for i in range(len(some)))
        statistics = {"teacher_mean": mean, "teacher_variance": variance}
    mean, variance = statistics["teacher_mean"], statistics["teacher_variance"]
    if arguments.start_from_statistics:
        with torch.no_grad():
            student.image_encoder.norm.bias.copy_(mean)
            student.image_encoder.norm.weight.copy_(variance.sqrt())
    unit = float(variance.mean()) if arguments.mask_loss else 1.0
    terms = {"embedding": arguments.embedding_loss / unit} | ({"mask": arguments.mask_loss} if arguments.mask_loss else {})

    def count(batch):
        known = int(batch["has_embedding"].sum()) if teacher is None else len(batch["image"])
        return {"embedding": known} | ({"mask": int(batch["box_valid"].sum())} if arguments.mask_loss else {})

    def decode(embedding, batch):                                              # logits (N, 1, 256, 256) of the N valid boxes
        rows, _ = batch["box_valid"].nonzero(as_tuple=True)
        return student.decode(embedding, batch["boxes"][batch["box_valid"]], image_index=rows)[0]

    def losses(batch):
        embedding = student.image_encoder(batch["image"])
        means = {"embedding": embedding_mse(embedding, target(batch), batch.get("has_embedding"))}
        if arguments.mask_loss:
            masks = batch["masks"][batch["box_valid"]]
            logits = decode(embedding, batch) if len(masks) else embedding.new_zeros(0, 1, 256, 256)
            means["mask"] = dice_loss(logits, masks) + 4 * bce(logits, masks)
        return means

    def validate():
        """Embedding error, also in units of the teacher's variance, and DSC of masks of tight boxes at 256 x 256."""
        sums, scores = {"error": 0.0, "count": 0}, {}
        mine = range(world.rank, len(val_slices), world.size)
        for i in progress(mine, len(mine), "validation") if world.first else mine:
            batch = alone(val_dataset, i)
            embedding = student.image_encoder(batch["image"])
            sums["error"] += float(embedding_mse(embedding, target(batch)))
            sums["count"] += 1
            if arguments.decoder_weights and batch["box_valid"].any():
                found, truth = decode(embedding, batch)[:, 0] > 0, batch["masks"][batch["box_valid"]] > 0
                overlap, total = (found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))
                scores[i] = float((2 * overlap / total).mean())
        sums = world.sum(sums)
        error = sums["error"] / max(sums["count"], 1)
        result = {"val_error": error, "val_relative": error / float(variance.mean())}
        return result | (modality_means(val, val_slices, scores, world) if arguments.decoder_weights else {})

    trainer = Trainer(arguments, world, network=student.name, model=nn.ModuleDict({"image_encoder": student.image_encoder}),
                      dataset=dataset, sampler=make_sampler(arguments, world, train, slices), terms=terms, count=count,
                      losses=losses, validate=validate, extra=statistics,
                      frozen=[student.prompt_encoder, student.mask_decoder],
                      criterion=("dsc", "max") if arguments.decoder_weights else ("val_error", "min"))
    trainer.say(f"{len(slices)} training slices of {len(train)} cases, {len(val_slices)} validation slices of {len(val)}; "
                f"student {student.name} at {size}; {trainer.steps} updates of {trainer.batch} samples")
    return trainer.fit()


if __name__ == "__main__":
    run_script(main)
