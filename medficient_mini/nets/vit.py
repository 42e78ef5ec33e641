"""SAM's ViT-B image encoder, the one of MedSAM: image (B, 3, 1024, 1024) -> embedding (B, 256, 64, 64).

SAM: arXiv 2304.02643, appendix A; windowed attention and decomposed relative positions: ViTDet, arXiv 2203.16527.
MedSAM: Nat. Commun. 15:654 (2024).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .layers import MLPBlock, sam_neck

WIDTH, DEPTH, HEADS = 768, 12, 12
WINDOW = 14                          # tokens per window side
GLOBAL_BLOCKS = (2, 5, 8, 11)        # the blocks that attend over the whole 64×64 grid
EPS = 1e-6


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, 16, stride=16)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, 3, 1024, 1024)
        return self.proj(x).permute(0, 2, 3, 1)                               # (B, 64, 64, 768)


class Attention(nn.Module):
    """Multi-head attention on a square of tokens; q·(relative row + relative column embedding) is added to the logits."""

    def __init__(self, side: int):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, WIDTH // HEADS))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:                                   # (B, S, S, 768)
        B, S = x.shape[:2]
        qkv = self.qkv(x).reshape(B, S * S, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # each (B, 12, S·S, 64)
        index = torch.arange(S, device=x.device)
        index = index[:, None] - index[None, :] + S - 1                       # (S, S): query minus key
        grid = q.reshape(B, HEADS, S, S, -1)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.rel_pos_h[index].to(q.dtype))   # (B, 12, S, S, S)
        cols = torch.einsum("bnhwc,wkc->bnhwk", grid, self.rel_pos_w[index].to(q.dtype))
        bias = (rows[..., :, None] + cols[..., None, :]).reshape(B, HEADS, S * S, S * S)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)           # (B, 12, S·S, 64)
        return self.proj(x.transpose(1, 2).reshape(B, S, S, WIDTH))           # (B, S, S, 768)


class Block(nn.Module):
    def __init__(self, window: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=EPS)
        self.attn = Attention(window or 64)
        self.norm2 = nn.LayerNorm(WIDTH, eps=EPS)
        self.mlp = MLPBlock(WIDTH, 4 * WIDTH, nn.GELU())
        self.window = window

    def forward(self, x: Tensor) -> Tensor:                                   # (B, 64, 64, 768)
        y = self.norm1(x)
        if self.window:
            y = from_windows(self.attn(to_windows(y, self.window)), self.window, x.shape[1])
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))                                    # (B, 64, 64, 768)


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, H, C) -> (B·n·n, window, window, C), zero padded right and bottom to whole windows."""
    B, H, _, C = x.shape
    pad = -H % window
    x = F.pad(x, (0, 0, 0, pad, 0, pad))
    n = (H + pad) // window
    return x.reshape(B, n, window, n, window, C).transpose(2, 3).reshape(-1, window, window, C)


def from_windows(x: Tensor, window: int, side: int) -> Tensor:
    """The inverse of `to_windows`: (B·n·n, window, window, C) -> (B, side, side, C)."""
    n = -(-side // window)
    x = x.reshape(-1, n, n, window, window, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, n * window, n * window, x.shape[-1])[:, :side, :side].contiguous()


class ImageEncoderViT(nn.Module):
    """(B, 3, 1024, 1024) float in [0, 1] (MedSAM's min-max) -> (B, 256, 64, 64) float32."""

    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.pos_embed = nn.Parameter(torch.zeros(1, 64, 64, WIDTH))
        self.blocks = nn.ModuleList(Block(0 if i in GLOBAL_BLOCKS else WINDOW) for i in range(DEPTH))
        self.neck = sam_neck(WIDTH)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, 3, 1024, 1024)
        x = self.patch_embed(x) + self.pos_embed                              # (B, 64, 64, 768)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))                               # (B, 256, 64, 64)
