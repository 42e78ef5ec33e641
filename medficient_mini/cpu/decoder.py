"""SAM's mask decoder arranged for few operations; equal to nets/mask_decoder.py up to rounding.

An image has 4096 tokens, a prompt about seven, so no 4096×256 projection is worth its price:

- q·(Wₖ x) = (Wₖᵀ q)·x: the key projection moves to the prompt's side, and so do the value projection,
  Σ aᵢ (Wᵥ xᵢ) = Wᵥ (Σ aᵢ xᵢ), and both projections of the image-to-token attention.
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

ROOT = 4                             # of d = 16, the channels of a head


def by_head(weight: Tensor) -> Tensor:                                        # (8·d, …)
    return weight.unflatten(0, (HEADS, -1))                                   # (8, d, …)


def read_image(a: Attention, q: Tensor, keys: Tensor, image: Tensor) -> Tensor:
    """What tokens q (N, T, 256) read from image (N or 1, 4096, 256), keys = image + positions: (N, T, 256)."""
    q = a.split(a.q_proj(q)) / ROOT                                           # (N, 8, T, d)
    q = q @ by_head(a.k_proj.weight)                                          # (N, 8, T, 256); the keys' bias cancels
    scores = q.flatten(1, 2).to(keys.dtype) @ keys.transpose(1, 2).squeeze(0)                 # (N, 8T, 4096)
    read = (scores.softmax(-1) @ image.squeeze(0)).float().unflatten(1, (HEADS, -1))          # (N, 8, T, 256)
    read = read @ by_head(a.v_proj.weight).transpose(1, 2)                    # (N, 8, T, d)
    return a.out_proj(read.transpose(1, 2).flatten(2) + a.v_proj.bias)


def read_tokens(a: Attention, image: Tensor, queries: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
    """The image plus what its pixels, queries = image + positions, read from the T tokens: (N, 4096, 256)."""
    k = a.split(a.k_proj(keys)) / ROOT                                        # (N, 8, T, d)
    bias = (k @ by_head(a.q_proj.bias)[..., None]).to(image.dtype)            # (N, 8, T, 1)
    k = (k @ by_head(a.q_proj.weight)).flatten(1, 2).to(image.dtype)          # (N, 8T, 256)
    scores = (k @ queries.transpose(1, 2).squeeze(0)).unflatten(1, (HEADS, -1))               # (N, 8, T, 4096)
    weights = (scores + bias).softmax(2).flatten(1, 2)                        # (N, 8T, 4096), over the tokens of a head
    v = a.split(a.v_proj(tokens)) @ by_head(a.out_proj.weight.T)              # (N, 8, T, 256)
    v = (v + a.out_proj.bias / HEADS).flatten(1, 2).to(image.dtype)           # weights of a head sum to one
    return torch.baddbmm(image.expand(len(v), -1, -1), weights.transpose(1, 2), v)


def layer_norm(x: Tensor, layer: nn.Module) -> Tensor:
    """The layer norm `layer` over the last dimension of x, in its type."""
    return F.layer_norm(x, x.shape[-1:], layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


class FastDecoder:
    """The decoder of a Sam, called as Sam.decode is; `dtype` is that of the image-sized products.

    Memory grows by some 10 MB for each prompt, so callers bring them in batches.
    """

    def __init__(self, model: Sam, dtype: torch.dtype):
        self.prompt_encoder, self.decoder, self.dtype = model.prompt_encoder, model.mask_decoder, dtype
        self.positions = model.prompt_encoder.dense_pe().flatten(2).transpose(1, 2).to(dtype)      # (1, 4096, 256)
        first, self.norm, _, second, _ = self.decoder.output_upscaling
        # The transposed convolutions as matrices (4·outputs, inputs) with biases (4·outputs,); the 4 are (dy, dx).
        self.up = [(layer.weight.permute(2, 3, 1, 0).flatten(0, 2).to(dtype), layer.bias.repeat(4).to(dtype))
                   for layer in (first, second)]

    @torch.inference_mode()
    def __call__(self, embedding: Tensor, boxes=None, points=None, masks=None, image_index=None, multimask=False):
        sparse, dense = self.prompt_encoder(points, boxes, masks)             # (N, T, 256), (N or 1, 256, 64, 64)
        if image_index is not None:
            embedding = embedding[image_index]
        image = (embedding + dense).flatten(2).transpose(1, 2).contiguous().to(self.dtype)   # (N or 1, 4096, 256)
        tokens = token_pe = self.decoder.with_output_tokens(sparse)           # (N, 5 + T, 256)
        transformer = self.decoder.transformer
        for layer in transformer.layers:
            tokens, placed = layer.attend_self(tokens, token_pe), image + self.positions
            read = read_image(layer.cross_attn_token_to_image, tokens + token_pe, placed, image)
            tokens = layer.norm2(tokens + read)
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            image = read_tokens(layer.cross_attn_image_to_token, image, placed, tokens + token_pe, tokens)
            image = layer_norm(image, layer.norm4)                            # (N, 4096, 256)
        read = read_image(transformer.final_attn_token_to_image, tokens + token_pe, image + self.positions, image)
        kernels, iou = self.decoder.heads(transformer.norm_final_attn(tokens + read), multimask)    # (N, M, 32), (N, M)
        logits = torch.empty(*iou.shape, 256, 256)
        for k, kernel in enumerate(kernels):       # the image at four times its side is held for one prompt at a time
            x = F.linear(image[k], *self.up[0]).reshape(-1, 64)               # (4096·4, 64)
            x = F.gelu(layer_norm(x, self.norm))
            x = F.gelu(F.linear(x, *self.up[1])).reshape(-1, 32)              # (4096·4·4, 32)
            x = (kernel @ x.T.float()).reshape(-1, 64, 64, 2, 2, 2, 2)        # (M, y, x, dy, dx, dy, dx)
            logits[k] = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 256, 256)
        return logits, iou                                                    # (N, M, 256, 256), (N, M)
