"""Losses of the two training stages. Everything is computed in float32 with autocast off, whatever the inputs are.

A mean over no masks at all is 0, so that a batch without objects still gives a loss to call backward() on.
"""
import torch
import torch.nn.functional as F


def _float32(function):
    """Decorator: run with autocast off and every tensor argument in float32 (sums over 512 x 512 pixels overflow a
    half-precision mantissa long before they overflow its exponent)."""
    def wrapped(*args, **kwargs):
        device = next(arg.device.type for arg in args if torch.is_tensor(arg))
        with torch.autocast(device, enabled=False):
            return function(*(arg.float() if torch.is_tensor(arg) else arg for arg in args),
                            **{key: arg.float() if torch.is_tensor(arg) else arg for key, arg in kwargs.items()})
    wrapped.__doc__, wrapped.__name__ = function.__doc__, function.__name__
    return wrapped


def _mean(x):
    return x.sum() / max(x.numel(), 1)


@_float32
def embedding_mse(pred, target, weight=None):
    """Mean squared error between image embeddings (B, 256, 64, 64): the distillation loss (MedficientSAM, Sec. 2;
    MobileSAM, arXiv 2306.14289, Sec. 4.1).

    weight (B,), for instance 1 where a target is known and 0 elsewhere: the weighted mean over samples, 0 if all
    weights are 0. What `target` holds where the weight is 0 has no influence.
    """
    error = ((pred - target) ** 2).flatten(1).mean(1)  # (B,)
    if weight is None:
        return _mean(error)
    return torch.where(weight > 0, error * weight, 0.0).sum() / weight.sum().clamp(min=1e-12)


@_float32
def dice_loss(logits, masks):
    """1 - Dice with squared denominator (V-Net, Milletari et al., arXiv 1606.04797, Sec. 3), mean over masks.

    logits (N, H, W) or (N, 1, H, W), masks of as many elements in 0 ... 1. Two empty masks give a loss of 0.
    """
    probability, truth = logits.flatten(1).sigmoid(), masks.flatten(1)
    overlap = 2 * (probability * truth).sum(1)
    total = (probability ** 2).sum(1) + (truth ** 2).sum(1)
    return _mean(1 - (overlap + 1e-5) / (total + 1e-5))


@_float32
def focal_loss(logits, masks, gamma=2):
    """Focal loss without class weights (Lin et al., arXiv 1708.02002, Eq. 4), mean over pixels, then over masks.

    logits (N, H, W) or (N, 1, H, W), masks of as many elements, 0 or 1.
    """
    truth = masks.reshape(logits.shape)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    # 1 - p_t = sigmoid of the logit for the wrong class, exact where 1 - exp(-cross_entropy) cancels.
    wrong = (logits * (1 - 2 * truth)).sigmoid()
    return _mean(wrong ** gamma * cross_entropy)


@_float32
def bce(logits, masks):
    """Binary cross-entropy, mean over pixels and masks; logits (N, H, W) or (N, 1, H, W), masks 0 ... 1."""
    return _mean(F.binary_cross_entropy_with_logits(logits, masks.reshape(logits.shape), reduction="none"))


@_float32
def iou_mse(pred_iou, logits, masks):
    """Mean squared error of the IoU head (Segment Anything, arXiv 2304.02643, Sec. A, "Losses").

    pred_iou (N, 1) against the IoU of the mask {logits > 0} with masks of 0 and 1; the IoU carries no gradient.
    """
    with torch.no_grad():
        mask, truth = logits.flatten(1) > 0, masks.flatten(1) > 0.5
        iou = (mask & truth).sum(1) / (mask | truth).sum(1).clamp(min=1)
    return _mean((pred_iou.flatten() - iou) ** 2)


def finetune_loss(logits_lowres, iou, masks, mask_gradient=True):
    """Stage 2 loss: Dice + 20 * focal + IoU MSE on the logits upsampled to the masks' size (MedficientSAM, Sec. 2;
    weights of Segment Anything, Sec. A).

    logits_lowres (N, 1, 256, 256), iou (N, 1), masks (N, S, S) of 0 and 1 in the network frame; returns a scalar.
    The published code upsamples under no_grad, so that its Dice and focal terms train nothing and only the IoU head's
    error does; `mask_gradient` False does the same, for comparison. Here the gradient passes by default.
    """
    with torch.autocast(logits_lowres.device.type, enabled=False):
        logits = F.interpolate(logits_lowres.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
    if not mask_gradient:
        logits = logits.detach()
    return dice_loss(logits, masks) + 20 * focal_loss(logits, masks) + iou_mse(iou, logits, masks)
