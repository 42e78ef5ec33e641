"""SAM's mask decoder: embedding and prompt tokens -> low-resolution logits and predicted IoU. SAM, arXiv 2304.02643, appendix A."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .layers import MLP, LayerNorm2d, MLPBlock

WIDTH, HEADS, MASKS = 256, 8, 4      # four mask tokens: one for a single answer, three for an ambiguous prompt


class Attention(nn.Module):
    """Multi-head attention with projections to `inner` channels."""

    def __init__(self, inner: int):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, inner)
        self.k_proj = nn.Linear(WIDTH, inner)
        self.v_proj = nn.Linear(WIDTH, inner)
        self.out_proj = nn.Linear(inner, WIDTH)

    @staticmethod
    def split(x: Tensor) -> Tensor:                                           # (N, T, inner)
        return x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)             # (N, 8, T, inner / 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:             # (N, T, 256), (N, S, 256) twice
        q, k, v = self.split(self.q_proj(q)), self.split(self.k_proj(k)), self.split(self.v_proj(v))
        x = F.scaled_dot_product_attention(q, k, v)                           # (N, 8, T, inner / 8)
        return self.out_proj(x.transpose(1, 2).flatten(2))                    # (N, T, 256)


class TwoWayAttentionBlock(nn.Module):
    """Tokens attend to themselves and to the image; then the image attends to the tokens."""

    def __init__(self, first: bool, eps: float):
        super().__init__()
        self.self_attn = Attention(WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, eps=eps)
        self.cross_attn_token_to_image = Attention(WIDTH // 2)
        self.norm2 = nn.LayerNorm(WIDTH, eps=eps)
        self.mlp = MLPBlock(WIDTH, 2048, nn.ReLU())
        self.norm3 = nn.LayerNorm(WIDTH, eps=eps)
        self.norm4 = nn.LayerNorm(WIDTH, eps=eps)
        self.cross_attn_image_to_token = Attention(WIDTH // 2)
        self.first = first           # in the first block the tokens are still their own positional encoding

    def attend_self(self, tokens: Tensor, token_pe: Tensor) -> Tensor:        # (N, T, 256) all three
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens)
        return self.norm1(tokens)

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        # tokens, token_pe (N, T, 256); image (N, 4096, 256); image_pe (1, 4096, 256)
        tokens = self.attend_self(tokens, token_pe)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens))
        return tokens, image                                                  # (N, T, 256), (N, 4096, 256)


class TwoWayTransformer(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayAttentionBlock(i == 0, eps) for i in range(2))
        self.final_attn_token_to_image = Attention(WIDTH // 2)
        self.norm_final_attn = nn.LayerNorm(WIDTH, eps=eps)

    def forward(self, image: Tensor, image_pe: Tensor, token_pe: Tensor) -> tuple[Tensor, Tensor]:
        # image (N, 4096, 256), image_pe (1, 4096, 256), token_pe (N, T, 256)
        tokens = token_pe
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        attention = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attention), image                # (N, T, 256), (N, 4096, 256)


class MaskDecoder(nn.Module):
    """`eps`: of the transformer's layer norms (1e-6 in EfficientViT-SAM, torch's 1e-5 in SAM, MedSAM and LiteMedSAM)."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.transformer = TwoWayTransformer(eps)
        self.iou_token = nn.Embedding(1, WIDTH)
        self.mask_tokens = nn.Embedding(MASKS, WIDTH)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(WIDTH, 64, 2, stride=2), LayerNorm2d(64), nn.GELU(),
            nn.ConvTranspose2d(64, 32, 2, stride=2), nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(WIDTH, WIDTH, 32, 3) for _ in range(MASKS))
        self.iou_prediction_head = MLP(WIDTH, WIDTH, MASKS, 3)

    def with_output_tokens(self, sparse: Tensor) -> Tensor:
        """sparse (N, T, 256) -> (N, 5 + T, 256), the IoU token and the four mask tokens in front."""
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])           # (5, 256)
        return torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)

    def heads(self, tokens: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
        """tokens (N, 5 + T, 256) -> kernels (N, M, 32) and IoU (N, M) of the M = 1 or 3 masks asked for."""
        chosen = range(1, MASKS) if multimask else range(1)
        kernels = torch.stack([self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen], dim=1)
        return kernels, self.iou_prediction_head(tokens[:, 0])[:, chosen.start:chosen.stop]

    def forward(self, embedding: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor,
                multimask: bool) -> tuple[Tensor, Tensor]:
        """embedding (N or 1, 256, 64, 64), image_pe (1, 256, 64, 64), sparse (N, T, 256), dense (N or 1, 256, 64, 64).

        Returns logits (N, 1, 256, 256) and IoU (N, 1) of the single mask, or (N, 3, 256, 256) and (N, 3).
        """
        N = len(sparse)
        tokens = self.with_output_tokens(sparse)                                              # (N, 5 + T, 256)
        image = (embedding + dense).expand(N, -1, -1, -1).flatten(2).transpose(1, 2)          # (N, 4096, 256)
        tokens, image = self.transformer(image, image_pe.flatten(2).transpose(1, 2), tokens)
        image = image.transpose(1, 2).reshape(N, WIDTH, 64, 64)
        upscaled = self.output_upscaling(image)                                               # (N, 32, 256, 256)
        kernels, iou = self.heads(tokens, multimask)                                          # (N, M, 32), (N, M)
        return (kernels @ upscaled.flatten(2)).reshape(N, -1, 256, 256), iou
