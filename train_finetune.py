"""Stage 2: the whole network learns masks from boxes (MedficientSAM, Sec. 2, Table 3).

    python train_finetune.py --data cases --weights runs/distill/best.pt --decoder-weights lite_medsam
    python train_finetune.py --data cases --weights lite_medsam --augment full      # any of the five networks
    torchrun --nproc_per_node 4 train_finetune.py --data cases --weights …          # four GPUs

The checkpoints hold the whole network: infer.py --weights runs/finetune/best.pt.
"""
import sys
from functools import partial

from torch import nn

from medficient_mini.files import add_option
from medficient_mini.inference.checkpoint import load_model
from medficient_mini.training.losses import decode_boxes, dsc, finetune_loss
from medficient_mini.training.options import common_parser, modality_means, read_data, run_script, single_batches
from medficient_mini.training.trainer import Trainer


def parse_arguments(argv=None):
    parser = common_parser(__doc__, out="runs/finetune", lr=2e-6, weight_decay=0.01, bs=8, schedule="cosine", boxes=5)
    add = partial(add_option, parser.add_argument_group("fine-tuning"))
    add("--weights", "runs/distill/best.pt", "checkpoint to start from: a distilled encoder, which needs "
        "--decoder-weights, or a whole network, any of the five, or lite_medsam")
    add("--augment", "none", "full: flips, shift, scale, rotation", choices=("none", "full"))
    add("--freeze", "none", "part that keeps its weights", choices=("none", "encoder", "prompt"))
    add("--freeze-norm", False, "batch norms keep their running statistics: good for small batches")
    add("--published-loss", False, "as the published code: Dice and focal term without gradient, only the IoU head's "
        "error trains (for comparison)")
    return parser.parse_args(argv)


class Finetuning(nn.Module):
    """What stage 2 trains and how: the task of a Trainer (see trainer.py)."""
    weights, criterion, extra = {"mask": 1.0}, ("dsc", 1), {}

    def __init__(self, arguments, world, model, validation):
        super().__init__()
        self.model, self.network, self.world, self.validation = model, model.name, world, validation
        self.mask_gradient = not arguments.published_loss
        self.frozen = [module for module in model.modules()
                       if arguments.freeze_norm and isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
        if arguments.freeze != "none":
            part = model.image_encoder if arguments.freeze == "encoder" else model.prompt_encoder
            self.frozen.append(part.requires_grad_(False))

    def count(self, batch):
        """The items of the loss: valid boxes."""
        return {"mask": int(batch["box_valid"].sum())}

    def loss(self, batch):
        """The loss of a batch, averaged over its valid boxes."""
        embedding = self.model.image_encoder(batch["image"])                   # (B, 256, 64, 64)
        return {"mask": finetune_loss(*decode_boxes(self.model, embedding, batch), self.mask_gradient)}

    forward = loss

    def validate(self, model):
        """DSC of loosened boxes, averaged over objects, slices, cases, modalities."""
        scores = {}
        for i, batch in single_batches(self.validation, self.world, "validation"):
            scores[i] = dsc(*decode_boxes(model, model.image_encoder(batch["image"]), batch)[:2])
        return modality_means(self.validation, scores, self.world)


def train(arguments, world):
    """Read the cases, build the task, train; returns the exit status. ValueError, one line, for bad input."""
    model = world.to_device(load_model(arguments.weights, arguments.decoder_weights))
    dataset, validation = read_data(arguments, world, model, labelled=True)
    dataset.mode = arguments.augment
    return Trainer(arguments, world, Finetuning(arguments, world, model, validation), dataset).fit()


def main(argv=None):
    """Train as the command line says; returns the exit status."""
    return run_script(train, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
