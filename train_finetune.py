"""Stage 2: the whole network learns masks from boxes (MedficientSAM, Sec. 2, Table 3).

    python train_finetune.py --data cases --weights runs/distill/best.pt --decoder-weights lite_medsam
    python train_finetune.py --data cases --weights lite_medsam --augment full      # any of the five networks
    torchrun --nproc_per_node 4 train_finetune.py --data cases --weights …          # four GPUs

The checkpoints hold the whole network: infer.py --weights runs/finetune/best.pt.
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from medficient_mini.inference.checkpoint import load_model
from medficient_mini.training.samples import FinetuneDataset
from medficient_mini.training.losses import finetune_loss
from medficient_mini.training.options import (add_common_arguments, check_size, draw_slices, make_sampler, modality_means,
                                     run_script, slices_of, split_data, start, validation_slices)
from medficient_mini.show.progress import progress
from medficient_mini.training.trainer import Trainer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, out=Path("runs/finetune"), lr=2e-6, weight_decay=0.01, batch_size=8,
                         schedule="cosine", schedules=("cosine", "plateau", "halve"), boxes=5)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--weights", default="runs/distill/best.pt", metavar="FILE", help="checkpoint to start from: a distilled encoder "
        "or a whole network, any of the five, or lite_medsam (default: %(default)s)")
    add("--decoder-weights", metavar="FILE", help="checkpoint whose prompt encoder and mask decoder complete --weights")
    add("--augment", choices=("none", "full"), default="none", help="full: flips, shift, scale, rotation (default: none)")
    add("--freeze", choices=("none", "encoder", "prompt"), default="none", help="part that keeps its weights (default: none)")
    add("--freeze-norm", action="store_true", help="batch norms keep their running statistics: good for small batches")
    add("--published-loss", action="store_true", help="as the published code: Dice and focal term without gradient, only "
        "the IoU head's error trains (for comparison)")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    world = start(arguments)
    model = load_model(arguments.weights, arguments.decoder_weights).to(world.device, memory_format=torch.channels_last)
    size = check_size(arguments, model)
    train, val, cache = split_data(arguments, world, need_masks=True)
    slices = slices_of(arguments, world, train, cache, labelled_only=True)
    if not slices:
        raise ValueError(f"{arguments.data}: gts of all training cases are empty, expected labels")
    if arguments.limit_samples:
        slices = draw_slices(train, slices, arguments.limit_samples, arguments.seed)
    val_slices = validation_slices(arguments, world, val, cache, labelled_only=True)
    common = dict(size=size, resize=model.resize, max_boxes=arguments.boxes)
    dataset = FinetuneDataset(train, slices, cache, augment=arguments.augment, seed=arguments.seed,
                              box_shift=arguments.box_shift, box_jitter=arguments.box_jitter, **common)
    val_dataset = FinetuneDataset(val, val_slices, cache, box_shift=0, **common)

    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] if arguments.freeze_norm else []
    if arguments.freeze != "none":
        part = model.image_encoder if arguments.freeze == "encoder" else model.prompt_encoder
        part.requires_grad_(False)
        frozen.append(part)

    def forward(batch):
        """Logits (N, 1, 256, 256), IoU (N, 1) and masks (N, size, size) of the batch's N valid boxes."""
        valid = batch["box_valid"]                                             # (B, M)
        embedding = model.image_encoder(batch["image"])                        # (B, 256, 64, 64)
        boxes = batch["boxes"][valid] * (model.image_size / size)              # (N, 4) in the prompt encoder's pixels
        logits, iou = model.decode(embedding, boxes, image_index=valid.nonzero(as_tuple=True)[0])
        return logits, iou, batch["masks"][valid]

    def count(batch):
        return {"mask": int(batch["box_valid"].sum())}

    def losses(batch):
        return {"mask": finetune_loss(*forward(batch), mask_gradient=not arguments.published_loss)}

    def validate():
        """DSC of tight boxes, at the network's input size, averaged over objects, slices, cases, modalities."""
        scores = {}
        mine = range(world.rank, len(val_slices), world.size)
        for i in progress(mine, len(mine), "validation") if world.first else mine:
            logits, _, masks = forward(world.to_device({key: value[None] for key, value in val_dataset.sample(0, i, i).items()}))
            found = nn.functional.interpolate(logits.float(), masks.shape[-2:], mode="bilinear")[:, 0] > 0
            overlap, total = (found & (masks > 0)).sum((1, 2)), found.sum((1, 2)) + masks.sum((1, 2))
            scores[i] = float((2 * overlap / total).mean())
        return modality_means(val, val_slices, scores, world)

    trainer = Trainer(arguments, world, network=model.name, model=model, dataset=dataset,
                      sampler=make_sampler(arguments, world, train, slices), terms={"mask": 1.0}, count=count,
                      losses=losses, validate=validate, frozen=frozen, criterion=("dsc", "max"))
    trainer.say(f"{len(slices)} training slices of {len(train)} cases, {len(val_slices)} validation slices of {len(val)}; "
                f"{model.name} at {size}; {trainer.steps} updates of {trainer.batch} samples")
    return trainer.fit()


if __name__ == "__main__":
    run_script(main)
