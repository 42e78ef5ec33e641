"""The losses of the two training stages, and the Dice coefficient that validation reports.

Everything is computed in float32, whatever comes in: sums over 512 x 512 pixels lose their low digits in half precision.
(Autocast leaves these operations in the type of their inputs.)
"""
import torch
import torch.nn.functional as F


def embedding_mse(pred, target, weight=None):
    """Mean squared error between image embeddings: the distillation loss (MedficientSAM, Sec. 2; MobileSAM, arXiv
    2306.14289, Sec. 4.1).

    Args:
        pred, target: (B, 256, 64, 64), of any floating type.
        weight: (B,), for instance 1 where a target is known and 0 elsewhere. What `target` holds where the weight is
            0 has no influence, not even NaN.

    Returns:
        The (weighted) mean over the samples, a float32 scalar; 0 if all weights are 0.
    """
    difference = pred.float() - target.float()
    if weight is None:
        return (difference ** 2).mean()
    # Before the square: after it, a NaN would come back as the gradient's factor, and 0 * NaN is NaN.
    difference = torch.where(weight[:, None, None, None] > 0, difference, 0.0)
    error = (difference ** 2).flatten(1).mean(1)                               # (B,)
    return (error * weight).sum() / weight.sum().clamp(min=1e-12)


def dice_loss(logits, masks):
    """1 - Dice with squared denominator (V-Net, Milletari et al., arXiv 1606.04797, Sec. 3), mean over masks.

    logits (N, H, W), masks (N, H, W) in 0 ... 1, N at least 1. Two empty masks give a loss of 0.
    """
    probability, truth = logits.float().flatten(1).sigmoid(), masks.float().flatten(1)      # (N, H * W)
    overlap = 2 * (probability * truth).sum(1)
    total = (probability ** 2).sum(1) + (truth ** 2).sum(1)
    return (1 - (overlap + 1e-5) / (total + 1e-5)).mean()


def enlarged(logits, masks):
    """Logits (N, 1, 256, 256) of the mask decoder -> (N, S, S) float32, the frame of masks (N, S, S)."""
    return F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def finetune_loss(logits, iou, masks, mask_gradient=True):
    """Stage 2 loss: Dice + 20 * focal + IoU MSE (MedficientSAM, Sec. 2; weights of Segment Anything, arXiv 2304.02643,
    Sec. A). The focal loss has gamma 2 and no class weights (Lin et al., arXiv 1708.02002, Eq. 4).

    The published code enlarges the logits under no_grad, so that its Dice and focal terms train nothing and only the
    IoU head's error does. Here the gradient passes.

    Args:
        logits: (N, 1, 256, 256) of the mask decoder, N at least 1; they are enlarged to the masks' size first.
        iou: (N, 1) as the decoder predicts it; it learns the IoU of the mask {logits > 0}.
        masks: (N, S, S) of 0 and 1 in the frame of the network's input.
        mask_gradient: False for the published behaviour, for comparison.
    """
    from torchvision.ops import sigmoid_focal_loss

    logits = enlarged(logits, masks)                                           # (N, S, S)
    if not mask_gradient:
        logits = logits.detach()
    focal = sigmoid_focal_loss(logits, masks.float(), alpha=-1, gamma=2, reduction="mean")
    found, truth = logits > 0, masks > 0
    true_iou = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clamp(min=1)       # (N,), without gradient
    return dice_loss(logits, masks) + 20 * focal + F.mse_loss(iou.float().flatten(), true_iou)


def dsc(logits, masks):
    """Dice coefficient, averaged over N masks: what validation reports in both stages. Two empty masks agree: 1.

    logits (N, 1, 256, 256) are enlarged to the size of the masks (N, S, S) of 0 and 1; {logits > 0} is the object.
    """
    found, truth = enlarged(logits, masks) > 0, masks > 0
    overlap, total = (found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))     # (N,)
    return float((2 * overlap / total).nan_to_num(1.0).mean())                              # 0 / 0 is NaN
