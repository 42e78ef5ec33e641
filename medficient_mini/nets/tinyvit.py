"""LiteMedSAM's TinyViT image encoder: image (B, 3, 256, 256) -> embedding (B, 256, 64, 64).

TinyViT: arXiv 2207.10666, section 3.2; MobileSAM, which first put it under SAM's decoder: arXiv 2306.14289.
LiteMedSAM differs from both in its patch embedding (two 1×1 convolutions, no stride), so that the stages run at
256, 128, 64 and 64 pixels for an input of 256: few parameters, many operations.

Stage     0        1          2          3
block     MBConv   attention  attention  attention
width     64       128        160        320
window    -        7          14         7
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .layers import sam_neck
from .vit import from_windows, to_windows

WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (2, 4, 5, 10)
WINDOWS = (7, 7, 14, 7)


class ConvBN(nn.Module):
    """Convolution and batch norm (keys c, bn)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, inputs, H, W)
        return self.bn(self.c(x))                                             # (B, outputs, H/stride, W/stride)


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(ConvBN(3, WIDTHS[0] // 2), nn.GELU(), ConvBN(WIDTHS[0] // 2, WIDTHS[0]))

    def forward(self, x: Tensor) -> Tensor:                                   # (B, 3, 256, 256)
        return self.seq(x)                                                    # (B, 64, 256, 256)


class MBConv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = ConvBN(width, 4 * width)
        self.conv2 = ConvBN(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvBN(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W), unchanged
        y = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(x + y)


class PatchMerging(nn.Module):
    """Between two stages: to the next width, and to half the side where `stride` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = ConvBN(inputs, outputs)
        self.conv2 = ConvBN(outputs, outputs, 3, stride, groups=outputs)
        self.conv3 = ConvBN(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, inputs, H, W)
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))          # (B, outputs, H/stride, W/stride)


class Attention(nn.Module):
    """Pre-norm attention inside one window, with one learned bias per head and absolute offset (|dy|, |dx|)."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.heads = heads
        position = torch.arange(window * window, device="cpu")                       # also where weights are built as "meta"
        row, col = position // window, position % window
        offsets = (row[:, None] - row).abs() * window + (col[:, None] - col).abs()
        self.register_buffer("attention_bias_idxs", offsets, persistent=False)       # (w·w, w·w)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, N, C), N = window²
        B, N, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, N, self.heads, 3, C // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)                                  # each (B, heads, N, C / heads)
        bias = self.attention_biases[:, self.attention_bias_idxs].to(q.dtype)        # (heads, N, N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])     # (B, heads, N, C / heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))                  # (B, N, C)


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:                                   # (..., C)
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Window attention, 3×3 depthwise convolution, MLP. Windows are padded with zeros before the norm, unmasked."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.attn = Attention(width, heads, window)
        self.local_conv = ConvBN(width, width, 3, groups=width)
        self.mlp = Mlp(width)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, H)
        side = x.shape[-1]
        windows = to_windows(x.permute(0, 2, 3, 1), self.window)              # (B·n·n, w, w, C)
        y = self.attn(windows.flatten(1, 2)).reshape(windows.shape)
        x = x + from_windows(y, self.window, side).permute(0, 3, 1, 2)        # (B, C, H, H)
        x = self.local_conv(x).permute(0, 2, 3, 1)                            # (B, H, H, C)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)                          # (B, C, H, H)


class Stage(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        width = WIDTHS[index]
        if index == 0:
            self.blocks = nn.ModuleList(MBConv(width) for _ in range(DEPTHS[index]))
        else:
            self.blocks = nn.ModuleList(
                TinyViTBlock(width, HEADS[index], WINDOWS[index]) for _ in range(DEPTHS[index]))
        self.downsample = PatchMerging(width, WIDTHS[index + 1], 1 if index == 2 else 2) if index < 3 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """(B, 3, 256, 256) float in [0, 1] -> (B, 256, 64, 64) float32."""

    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.layers = nn.ModuleList(Stage(i) for i in range(4))
        self.neck = sam_neck(WIDTHS[-1])

    def forward(self, x: Tensor) -> Tensor:                                   # (B, 3, 256, 256)
        x = self.patch_embed(x)                                               # (B, 64, 256, 256)
        for stage in self.layers:
            x = stage(x)           # (B, 128, 128, 128), (B, 160, 64, 64), (B, 320, 64, 64), (B, 320, 64, 64)
        return self.neck(x)                                                   # (B, 256, 64, 64)
