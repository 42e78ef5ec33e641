"""SAM's mask decoder arranged for few operations; equal to nets/mask_decoder.py up to rounding.

An image has 4096 tokens, a prompt about seven, so no 4096×256 projection is worth its price:

- q·(Wₖ x) = (Wₖᵀ q)·x: the key projection moves to the prompt's side, and so do the value projection,
  Σ aᵢ (Wᵥ xᵢ) = Wᵥ (Σ aᵢ xᵢ), and both projections of the image-to-token attention. Per attention 8 heads × T rows
  of 256 numbers meet the image instead of 256 rows.
- All boxes on one image share that image in the first layer: one matrix product for all of them.
- A transposed 2×2 convolution of stride 2 is a matrix product per pixel. Pixels are put in their places once, at the
  end, when each holds one logit; and only the masks asked for are made.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..nets.mask_decoder import HEADS, Attention
from ..nets.sam import Sam


def by_head(weight: Tensor) -> Tensor:                                        # (8·d, 256)
    return weight.unflatten(0, (HEADS, -1))                                   # (8, d, 256)


def read_image(a: Attention, q: Tensor, keys: Tensor, image: Tensor) -> Tensor:
    """What tokens q (N, T, 256) read from image (N or 1, 4096, 256), keys = image + positions: (N, T, 256).

    The attention projects to 8 heads of d channels.
    """
    T, q = q.shape[1], a.split(a.q_proj(q))                                   # (N, 8, T, d)
    q = (q * q.shape[-1] ** -0.5) @ by_head(a.k_proj.weight)                  # (N, 8, T, 256); the keys' bias cancels
    weights = product(q.flatten(1, 2).to(keys.dtype), keys.transpose(1, 2)).softmax(-1)       # (N, 8T, 4096)
    read = product(weights, image).float().unflatten(1, (HEADS, T))           # (N, 8, T, 256)
    read = read @ by_head(a.v_proj.weight).transpose(1, 2)                    # (N, 8, T, d)
    return a.out_proj(read.transpose(1, 2).flatten(2) + a.v_proj.bias)        # (N, T, 256)


def read_tokens(a: Attention, image: Tensor, queries: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
    """The image plus what its pixels, queries = image + positions, read from the T tokens: (N, 4096, 256)."""
    k = a.split(a.k_proj(keys))                                               # (N, 8, T, d)
    k = k * k.shape[-1] ** -0.5
    bias = k @ a.q_proj.bias.unflatten(0, (HEADS, -1, 1))                     # (N, 8, T, 1)
    k = (k @ by_head(a.q_proj.weight)).flatten(1, 2).to(image.dtype)          # (N, 8T, 256)
    scores = product(k, queries.transpose(1, 2)).unflatten(1, (HEADS, -1))    # (N, 8, T, 4096)
    weights = (scores + bias.to(image.dtype)).softmax(2).flatten(1, 2)        # (N, 8T, 4096), over the tokens of a head
    v = a.split(a.v_proj(tokens)) @ by_head(a.out_proj.weight.T)              # (N, 8, T, 256)
    v = (v + a.out_proj.bias / HEADS).flatten(1, 2)                           # weights of a head sum to one
    return torch.baddbmm(image.expand(len(v), -1, -1), weights.transpose(1, 2), v.to(image.dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """The products a (N, R, K) @ b (N or 1, K, C): one large product where b is shared."""
    return a @ (b[0] if len(b) == 1 else b)


class FastDecoder:
    """The decoder of a Sam, with the arguments and results of Sam.decode; `dtype` is that of the image-sized products.

    Any number N ≥ 1 of prompts is taken; memory grows by some 10 MB for each, so callers bring them in batches.
    """

    def __init__(self, model: Sam, dtype: torch.dtype):
        self.prompt_encoder, self.decoder, self.dtype = model.prompt_encoder, model.mask_decoder, dtype
        self.positions = model.prompt_encoder.dense_pe().flatten(2).transpose(1, 2).to(dtype)      # (1, 4096, 256)
        first, self.norm, _, second, _ = self.decoder.output_upscaling
        self.up = [self.as_matrix(first), self.as_matrix(second)]

    def as_matrix(self, layer: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
        """A 2×2 transposed convolution as weight (4·outputs, inputs) and bias (4·outputs,); the 4 are (dy, dx)."""
        weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return weight.contiguous().to(self.dtype), layer.bias.repeat(4).to(self.dtype)

    def __call__(self, embedding: Tensor, boxes=None, points=None, masks=None, image_index=None, multimask=False):
        sparse, dense = self.prompt_encoder(points, boxes, masks)             # (N, T, 256), (N or 1, 256, 64, 64)
        if image_index is not None:
            embedding = embedding[image_index]
        image = (embedding + dense).flatten(2).transpose(1, 2).contiguous().to(self.dtype)   # (N or 1, 4096, 256)
        tokens, image = self.transform(self.decoder.with_output_tokens(sparse), image)
        kernels, iou = self.decoder.heads(tokens, multimask)                  # (N, M, 32), (N, M)
        logits = torch.empty(*iou.shape, 256, 256)
        for k, kernel in enumerate(kernels):       # the image at four times its side is held for one prompt at a time
            logits[k] = self.upscale(image[k], kernel)
        return logits, iou                                                    # (N, M, 256, 256), (N, M)

    def transform(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """SAM's two-way transformer: tokens (N, T, 256) and image (N or 1, 4096, 256), each informed by the other."""
        transformer, token_pe = self.decoder.transformer, tokens
        for layer in transformer.layers:
            tokens = layer.attend_self(tokens, token_pe)
            placed = image + self.positions                                   # (N or 1, 4096, 256)
            read = read_image(layer.cross_attn_token_to_image, tokens + token_pe, placed, image)
            tokens = layer.norm2(tokens + read)
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            image = read_tokens(layer.cross_attn_image_to_token, image, placed, tokens + token_pe, tokens)
            image = self.layer_norm(image, layer.norm4)                       # (N, 4096, 256)
        final = transformer.final_attn_token_to_image
        read = read_image(final, tokens + token_pe, image + self.positions, image)
        return transformer.norm_final_attn(tokens + read), image

    def layer_norm(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The layer norm `layer` over the last dimension of x, in `dtype`."""
        return F.layer_norm(x, x.shape[-1:], layer.weight.to(self.dtype), layer.bias.to(self.dtype), layer.eps)

    def upscale(self, image: Tensor, kernels: Tensor) -> Tensor:
        """The logits (M, 256, 256) of one prompt from its image (4096, 256) and M kernels (M, 32)."""
        x = F.linear(image, *self.up[0]).reshape(-1, 64)                      # (4096·4, 64)
        x = F.gelu(self.layer_norm(x, self.norm))
        x = F.gelu(F.linear(x, *self.up[1])).reshape(-1, 32)                  # (4096·4·4, 32)
        logits = kernels @ x.T.float()                                        # (M, 64·64·2·2·2·2): y x dy dx dy dx
        logits = logits.reshape(-1, 64, 64, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return logits.reshape(-1, 256, 256)
