"""SAM's prompt encoder: points, boxes and mask prompts -> sparse tokens and a dense map. SAM, arXiv 2304.02643, appendix A."""
import math

import torch
import torch.nn as nn
from torch import Tensor

from .layers import LayerNorm2d

EMBEDDING_SIDE = 64


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of a position in [0, 1]² (x, y): (..., 2) -> (..., 256)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, 128))

    def forward(self, position: Tensor) -> Tensor:                            # (..., 2)
        angle = 2 * math.pi * ((2 * position - 1) @ self.positional_encoding_gaussian_matrix)    # (..., 128)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)                  # (..., 256)


class PromptEncoder(nn.Module):
    """`image_size`: side of the network input in pixels; prompts are given in those pixels."""

    def __init__(self, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.pe_layer = PositionEmbeddingRandom()
        # background point, foreground point, top-left corner, bottom-right corner
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, 256) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, 256)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2), LayerNorm2d(4), nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2), LayerNorm2d(16), nn.GELU(),
            nn.Conv2d(16, 256, 1))
        self.no_mask_embed = nn.Embedding(1, 256)

    def dense_pe(self) -> Tensor:
        """Positional encoding of the embedding's pixel centres, (1, 256, 64, 64)."""
        centre = (torch.arange(EMBEDDING_SIDE, device=self.no_mask_embed.weight.device) + 0.5) / EMBEDDING_SIDE
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        return self.pe_layer(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]

    def embed_points(self, coords: Tensor, labels: Tensor, pad: bool) -> Tensor:  # (N, P, 2), (N, P)
        if pad:                                    # without a box SAM adds one "not a point" token
            coords = torch.cat([coords, coords.new_zeros(len(coords), 1, 2)], dim=1)
            labels = torch.cat([labels, labels.new_full((len(labels), 1), -1)], dim=1)
        embedding = self.pe_layer((coords + 0.5) / self.image_size)           # (N, P, 256)
        labels = labels[..., None]
        embedding = torch.where(labels == -1, self.not_a_point_embed.weight, embedding)
        embedding = torch.where(labels == 0, embedding + self.point_embeddings[0].weight, embedding)
        return torch.where(labels == 1, embedding + self.point_embeddings[1].weight, embedding)

    def embed_boxes(self, boxes: Tensor) -> Tensor:                           # (N, 4)
        corners = self.pe_layer((boxes.reshape(-1, 2, 2) + 0.5) / self.image_size)    # (N, 2, 256)
        return corners + torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight])

    def forward(self, points: tuple | None, boxes: Tensor | None, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """points: (coords (N, P, 2), labels (N, P): 1 foreground, 0 background, -1 padding); boxes (N, 4);
        masks (N, 1, 256, 256) logits. Each may be None, but not all. Returns sparse tokens (N, T, 256) and the
        dense map (N or 1, 256, 64, 64)."""
        sparse = []
        if points is not None:
            sparse.append(self.embed_points(*points, pad=boxes is None))
        if boxes is not None:
            sparse.append(self.embed_boxes(boxes))
        if masks is not None:
            dense = self.mask_downscaling(masks)                              # (N, 256, 64, 64)
        else:
            dense = self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(-1, -1, EMBEDDING_SIDE, EMBEDDING_SIDE)
        if not sparse:
            if masks is None:
                raise ValueError("prompts: expected points, boxes or masks, found none")
            sparse.append(dense.new_zeros(len(masks), 0, 256))
        return torch.cat(sparse, dim=1), dense
