"""Stage 2: the whole network learns masks from boxes (MedficientSAM, Sec. 2, Table 3).

    python train_finetune.py --data cases --weights runs/distill/best.pt --decoder-weights lite_medsam
    python train_finetune.py --data cases --weights lite_medsam --augment full      # any of the five networks
    torchrun --nproc_per_node 4 train_finetune.py --data cases --weights …          # four GPUs

The checkpoints hold the whole network: infer.py --weights runs/finetune/best.pt.
"""
import sys

from torch import nn

from medficient_mini.inference.checkpoint import load_model
from medficient_mini.training.augment import Objects
from medficient_mini.training.cases import with_neighbours
from medficient_mini.training.losses import dsc, finetune_loss
from medficient_mini.training.options import (VALIDATION, common_parser, modality_means, network_input, read_data,
                                              run_script, single_batches, train_task)
from medficient_mini.training.samples import SliceDataset


def parse_arguments(argv=None):
    parser = common_parser(__doc__, out="runs/finetune", lr=2e-6, weight_decay=0.01, bs=8, schedule="cosine", boxes=5)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--weights", default="runs/distill/best.pt", metavar="FILE", help="checkpoint to start from: a distilled "
        "encoder or a whole network, any of the five, or lite_medsam (default: %(default)s)")
    add("--decoder-weights", metavar="FILE", help="checkpoint whose prompt encoder and mask decoder complete "
        "--weights")
    add("--augment", choices=("none", "full"), default="none", help="full: flips, shift, scale, rotation (default: "
        "none)")
    add("--freeze", choices=("none", "encoder", "prompt"), default="none", help="part that keeps its weights "
        "(default: none)")
    add("--freeze-norm", action="store_true", help="batch norms keep their running statistics: good for small batches")
    add("--published-loss", action="store_true", help="as the published code: Dice and focal term without "
        "gradient, only the IoU head's error trains (for comparison)")
    return parser.parse_args(argv)


class Finetuning(nn.Module):
    """What stage 2 trains and how: the task of a Trainer (see trainer.py)."""
    weights, criterion, extra = {"mask": 1.0}, ("dsc", "max"), {}

    def __init__(self, arguments, world, model, validation):
        super().__init__()
        self.model, self.network, self.world, self.validation = model, model.name, world, validation
        self.mask_gradient = not arguments.published_loss
        self.frozen = [module for module in model.modules()
                       if arguments.freeze_norm and isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
        if arguments.freeze != "none":
            part = model.image_encoder if arguments.freeze == "encoder" else model.prompt_encoder
            self.frozen.append(part.requires_grad_(False))

    def decode(self, model, batch):
        """Logits (N, 1, 256, 256), IoU (N, 1) and masks (N, size, size) of the N valid boxes of a batch."""
        valid = batch["box_valid"]                                             # (B, M)
        embedding = model.image_encoder(batch["image"])                        # (B, 256, 64, 64)
        logits, iou = model.decode(embedding, batch["boxes"][valid], image_index=valid.nonzero(as_tuple=True)[0])
        return logits, iou, batch["masks"][valid]

    def count(self, batch):
        """The items of the loss: valid boxes."""
        return {"mask": int(batch["box_valid"].sum())}

    def loss(self, batch):
        """The loss of a batch, averaged over its valid boxes."""
        return {"mask": finetune_loss(*self.decode(self.model, batch), self.mask_gradient)}

    forward = loss

    def validate(self, model):
        """DSC of loosened boxes, averaged over objects, slices, cases, modalities."""
        scores = {}
        for i, batch in single_batches(self.validation, self.world, "validation"):
            logits, _, masks = self.decode(model, batch)
            scores[i] = dsc(logits, masks)
        return modality_means(self.validation, scores, self.world)


def train(arguments, world):
    """Read the cases, build the task, train; returns the exit status. ValueError, one line, for bad input."""
    model = world.to_device(load_model(arguments.weights, arguments.decoder_weights))
    size, resize = network_input(arguments, model)
    cases, slices, val_cases, val_slices, cache = read_data(arguments, world, labelled=True, val_labelled=True)
    if arguments.in_use:
        slices = with_neighbours(cases, slices)
    drawn = Objects(arguments.boxes, size, model.image_size, arguments.box_shift, arguments.box_jitter)
    dataset = SliceDataset(cases, slices, cache, (size, resize), drawn, arguments.seed, arguments.augment,
                           arguments.photometric, arguments.in_use)
    prompts = Objects(mask_size=size, prompt_size=model.image_size, **VALIDATION)
    validation = SliceDataset(val_cases, val_slices, cache, (size, resize), prompts)
    return train_task(arguments, world, Finetuning(arguments, world, model, validation), dataset)


def main(argv=None):
    """Train as the command line says; returns the exit status."""
    return run_script(train, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
