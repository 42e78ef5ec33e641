"""Small layers that several networks share."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of a (B, C, H, W) map, one mean and variance per pixel, computed in float32."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W)
        x = x.float().permute(0, 2, 3, 1)                                     # (B, H, W, C)
        x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)                                          # (B, C, H, W)


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., inputs) -> (..., outputs). SAM, appendix A: hypernetworks and IoU head."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int):
        super().__init__()
        widths = [inputs] + [hidden] * (depth - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MLPBlock(nn.Module):
    """Transformer feed-forward block, width -> hidden -> width."""

    def __init__(self, width: int, hidden: int, activation: nn.Module):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:                                   # (..., width)
        return self.lin2(self.act(self.lin1(x)))


def sam_neck(channels: int) -> nn.Sequential:
    """(B, channels, 64, 64) -> (B, 256, 64, 64): the neck of SAM's ViT, kept by TinyViT (keys neck.0 … neck.3)."""
    return nn.Sequential(
        nn.Conv2d(channels, 256, 1, bias=False), LayerNorm2d(256),
        nn.Conv2d(256, 256, 3, padding=1, bias=False), LayerNorm2d(256))
