"""Sam = image encoder + prompt encoder + mask decoder, and the one table of the five published networks."""
from dataclasses import dataclass
from typing import Callable

import torch.nn as nn
from torch import Tensor

from .efficientvit import EfficientViTSam
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .tinyvit import TinyViT
from .vit import ImageEncoderViT


@dataclass(frozen=True)
class Network:
    title: str                       # as the paper's tables name it
    encoder: Callable[[], nn.Module]
    image_size: int                  # side of the square input in pixels
    resize: str                      # how its authors bring an image to that size: "bilinear" or "area"
    eps: float                       # of the decoder's layer norms


NETWORKS = {
    "medficientsam_l0": Network("MedficientSAM-L0", lambda: EfficientViTSam("l0"), 512, "bilinear", 1e-6),
    "medficientsam_l1": Network("MedficientSAM-L1", lambda: EfficientViTSam("l1"), 512, "bilinear", 1e-6),
    "medficientsam_l2": Network("MedficientSAM-L2", lambda: EfficientViTSam("l2"), 512, "bilinear", 1e-6),
    "medsam_vit_b": Network("MedSAM", ImageEncoderViT, 1024, "bilinear", 1e-5),
    "lite_medsam": Network("LiteMedSAM", TinyViT, 256, "area", 1e-5),
}


class Sam(nn.Module):
    """A network of the table, by name, with random weights (SAM, arXiv 2304.02643, figure 4)."""

    def __init__(self, name: str):
        super().__init__()
        network = NETWORKS[name]
        self.name = name
        self.image_size = network.image_size
        self.resize = network.resize
        self.image_encoder = network.encoder()
        self.prompt_encoder = PromptEncoder(network.image_size)
        self.mask_decoder = MaskDecoder(network.eps)

    def decode(self, embedding: Tensor, boxes: Tensor | None = None, points: tuple | None = None,
               masks: Tensor | None = None, image_index: Tensor | None = None,
               multimask: bool = False) -> tuple[Tensor, Tensor]:
        """Masks for N prompts on B images.

        embedding (B, 256, 64, 64); boxes (N, 4) x0 y0 x1 y1 and points ((N, P, 2), (N, P)) in pixels of the network
        input; masks (N, 1, 256, 256) logits; image_index (N,) int64 names each prompt's image (None: B is 1 or N).
        Returns logits (N, 1 or 3, 256, 256), above 0 inside, and the predicted IoU (N, 1 or 3).
        """
        sparse, dense = self.prompt_encoder(points, boxes, masks)             # (N, T, 256), (N or 1, 256, 64, 64)
        if image_index is not None:
            embedding = embedding[image_index]                                # (N, 256, 64, 64)
        return self.mask_decoder(embedding, self.prompt_encoder.dense_pe(), sparse, dense, multimask)


def build_sam(name: str) -> Sam:
    """The network `name` of NETWORKS with random weights. ValueError for another name."""
    if name not in NETWORKS:
        raise ValueError(f"network: expected one of {', '.join(NETWORKS)}, found {name!r}")
    return Sam(name)
