"""EfficientViT-SAM image encoders L0, L1, L2: image (B, 3, 512, 512) -> embedding (B, 256, 64, 64).

EfficientViT: arXiv 2205.14756, section 3 (ReLU linear attention, multi-scale tokens);
EfficientViT-SAM: arXiv 2402.05008, section 3 and figure 2 (fused MBConv in the early stages, neck that sums three stages).

Stage   0      1      2      3      4        neck
block   res    fmb    fmb    mb     att      stages 2, 3, 4 -> 256 channels at 64×64, summed, fmb × 4/8/12
width   32     64     128    256    512      256
stride  2      4      8      16     32       8
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .layers import LayerNorm2d

WIDTHS = (32, 64, 128, 256, 512)
DEPTHS = {"l0": (1, 1, 1, 4, 4), "l1": (1, 1, 1, 6, 6), "l2": (1, 2, 2, 8, 8)}
NECK_DEPTH = {"l0": 4, "l1": 8, "l2": 12}
EXPANSION = (1, 4, 4, 4, 6)          # of the blocks of each stage; its down-sampling block has four times that
HEAD_DIM = 32
EPS = 1e-6


class ConvLayer(nn.Module):
    """Convolution, then batch norm unless `bias` (the published networks drop the norm where the bias stays), then GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1,
                 bias: bool = False, norm: bool = True, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(outputs, eps=EPS) if norm else None
        self.act = nn.GELU(approximate="tanh") if act else None

    def forward(self, x: Tensor) -> Tensor:                                   # (B, inputs, H, W)
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)                         # (B, outputs, H/stride, W/stride)


class ResBlock(nn.Module):
    """Two 3×3 convolutions of the same width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = ConvLayer(width, width, 3)
        self.conv2 = ConvLayer(width, width, 3, act=False)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W), unchanged
        return self.conv2(self.conv1(x))


class FusedMBConv(nn.Module):
    """Full 3×3 convolution to the expanded width, 1×1 back (arXiv 2402.05008: faster than MBConv at high resolution)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int = 1):
        super().__init__()
        self.spatial_conv = ConvLayer(inputs, inputs * expansion, 3, stride)
        self.point_conv = ConvLayer(inputs * expansion, outputs, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, inputs, H, W)
        return self.point_conv(self.spatial_conv(x))                          # (B, outputs, H/stride, W/stride)


class MBConv(nn.Module):
    """1×1 to the expanded width, 3×3 depthwise, 1×1 back; only the last one is normalised."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int = 1):
        super().__init__()
        wide = inputs * expansion
        self.inverted_conv = ConvLayer(inputs, wide, 1, bias=True, norm=False)
        self.depth_conv = ConvLayer(wide, wide, 3, stride, groups=wide, bias=True, norm=False)
        self.point_conv = ConvLayer(wide, outputs, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, inputs, H, W)
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))        # (B, outputs, H/stride, W/stride)


class LiteMLA(nn.Module):
    """ReLU linear attention over the image's own tokens and a 5×5 aggregate of them (arXiv 2205.14756, 3.1).

    softmax(q kᵀ) v is replaced by relu(q) (relu(k)ᵀ v) / relu(q) Σ relu(k): cost grows with the number of pixels,
    not its square. The sums run over every pixel, so they are accumulated and divided in float32.
    """

    def __init__(self, width: int):
        super().__init__()
        self.qkv = ConvLayer(width, 3 * width, 1, norm=False, act=False)
        self.aggreg = nn.ModuleList([nn.Sequential(
            nn.Conv2d(3 * width, 3 * width, 5, padding=2, groups=3 * width, bias=False),
            nn.Conv2d(3 * width, 3 * width, 1, groups=3 * width // HEAD_DIM, bias=False))])
        self.proj = ConvLayer(2 * width, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W)
        qkv, (B, _, H, W) = self.qkv(x), x.shape                              # (B, 3C, H, W)
        qkv = torch.cat([qkv, self.aggreg[0](qkv)], dim=1)                    # (B, 6C, H, W): two scales
        heads = qkv.flatten(2).unflatten(1, (-1, 3 * HEAD_DIM)).transpose(2, 3)               # (B, heads, N, 3·32)
        out = self.attend(heads).to(qkv.dtype).transpose(1, 2)                # (B, N, heads, 32)
        return self.proj(out.reshape(B, H, W, -1).permute(0, 3, 1, 2))        # (B, C, H, W)

    @staticmethod
    def attend(qkv: Tensor) -> Tensor:                                        # (B, heads, N, 3·32)
        with torch.autocast(qkv.device.type, enabled=False):
            qkv = qkv.to(torch.float32, memory_format=torch.contiguous_format)
            q, k, v = qkv.chunk(3, dim=3)                                     # each (B, heads, N, 32)
            q, k = F.relu(q), F.relu(k)
            return q @ (k.transpose(2, 3) @ v) / (q @ k.sum(2)[..., None] + 1e-15)            # (B, heads, N, 32)


class Residual(nn.Module):
    """x + main(x), or main(x) alone where the shape changes (the published key `main` stays)."""

    def __init__(self, main: nn.Module, shortcut: bool = True):
        super().__init__()
        self.main = main
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x) if self.shortcut else self.main(x)


class EfficientViTBlock(nn.Module):
    """Linear attention for context, then MBConv for local detail."""

    def __init__(self, width: int, expansion: int):
        super().__init__()
        self.context_module = Residual(LiteMLA(width))
        self.local_module = Residual(MBConv(width, width, expansion))

    def forward(self, x: Tensor) -> Tensor:                                   # (B, C, H, W), unchanged
        return self.local_module(self.context_module(x))


class OpSequential(nn.Module):
    """A sequence under the published key `op_list`."""

    def __init__(self, *ops: nn.Module):
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class Backbone(nn.Module):
    """Image -> the outputs of stages 2, 3 and 4."""

    def __init__(self, depths: tuple):
        super().__init__()
        stem = [ConvLayer(3, WIDTHS[0], 3, stride=2)] + [Residual(ResBlock(WIDTHS[0])) for _ in range(depths[0])]
        stages = [OpSequential(*stem)]
        for i in range(1, 5):
            width, expansion = WIDTHS[i], EXPANSION[i]
            block = FusedMBConv if i < 3 else MBConv
            ops = [Residual(block(WIDTHS[i - 1], width, 4 * expansion, stride=2), shortcut=False)]
            for _ in range(depths[i]):
                ops.append(EfficientViTBlock(width, expansion) if i == 4
                           else Residual(block(width, width, expansion)))
            stages.append(OpSequential(*ops))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:                             # (B, 3, S, S)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs[2:]                    # (B, 128, S/8, S/8), (B, 256, S/16, S/16), (B, 512, S/32, S/32)


class Enlarge(nn.Module):
    """Map (B, C, h, h) -> (B, C, 64, 64), bicubic."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] == 64 else F.interpolate(x, (64, 64), mode="bicubic", align_corners=False)


class Neck(nn.Module):
    """Three scales -> one 64×64 map (arXiv 2402.05008, figure 2). Keys input_ops.0/1/2 belong to stages 4/3/2."""

    def __init__(self, depth: int):
        super().__init__()
        self.input_ops = nn.ModuleList(OpSequential(ConvLayer(channels, 256, 1, act=False), Enlarge())
                                       for channels in (512, 256, 128))
        self.middle = OpSequential(*(Residual(FusedMBConv(256, 256, 1)) for _ in range(depth)))
        self.output_ops = nn.ModuleList([OpSequential(ConvLayer(256, 256, 1, bias=True, norm=False, act=False))])

    def forward(self, stages: list[Tensor]) -> Tensor:
        coarse, middle, fine = (op(x) for op, x in zip(self.input_ops, reversed(stages)))     # (B, 256, 64, 64) each
        return self.output_ops[0](self.middle(coarse + middle + fine))        # (B, 256, 64, 64)


class EfficientViTSam(nn.Module):
    """Encoder `size` "l0", "l1" or "l2": (B, 3, 512, 512) float in [0, 1] -> (B, 256, 64, 64) float32.

    Any multiple of 32 is accepted as input side; the embedding stays 64×64.
    """

    def __init__(self, size: str):
        super().__init__()
        self.backbone = Backbone(DEPTHS[size])
        self.neck = Neck(NECK_DEPTH[size])
        self.norm = LayerNorm2d(256, EPS)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, 3, S, S)
        return self.norm(self.neck(self.backbone(x)))                         # (B, 256, 64, 64)
