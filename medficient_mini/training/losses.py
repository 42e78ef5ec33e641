"""What both stages compute of a batch: masks from valid boxes, losses (in float32), Dice coefficient of validation."""
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss


def decode_boxes(network, embedding, batch):
    """Logits (N, 1, 256, 256), true masks (N, S, S) and predicted IoU (N, 1) of the N valid boxes of a batch."""
    valid = batch["box_valid"]                                                 # (B, M)
    rows = valid.nonzero(as_tuple=True)[0]                                     # each box's image
    logits, iou = network.decode(embedding, batch["boxes"][valid], image_index=rows)
    return logits, batch["masks"][valid], iou


def embedding_mse(pred, target):
    """Mean squared error of embeddings (B, 256, 64, 64) (MedficientSAM, Sec. 2; MobileSAM, 2306.14289, Sec. 4.1)."""
    return F.mse_loss(pred.float(), target.float())


def dice_loss(logits, masks):
    """1 - Dice with squared denominator (V-Net, arXiv 1606.04797, Sec. 3), mean over logits and 0/1 masks (N, H, W)."""
    probability, truth = logits.float().flatten(1).sigmoid(), masks.float().flatten(1)      # (N, H * W)
    overlap = 2 * (probability * truth).sum(1)
    total = (probability ** 2).sum(1) + (truth ** 2).sum(1)
    return (1 - (overlap + 1e-5) / (total + 1e-5)).mean()


def enlarged(logits, masks):
    """Logits (N, 1, 256, 256) of the mask decoder -> (N, S, S) float32, the frame of masks (N, S, S)."""
    return F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def finetune_loss(logits, masks, iou, mask_gradient=True):
    """Dice + 20 * focal + IoU MSE (MedficientSAM, Sec. 2; weights of Segment Anything, arXiv 2304.02643, Sec. A).

    The focal loss (arXiv 1708.02002, Eq. 4) has gamma 2 and no class weights. logits (N, 1, 256, 256) are enlarged to
    the masks (N, S, S); iou (N, 1) learns the IoU of {logits > 0}. In the published code, as here without
    `mask_gradient`, that is all that trains.
    """
    logits = enlarged(logits, masks)                                           # (N, S, S)
    if not mask_gradient:
        logits = logits.detach()
    focal = sigmoid_focal_loss(logits, masks.float(), alpha=-1, gamma=2, reduction="mean")
    found, truth = logits > 0, masks > 0
    true_iou = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clamp(min=1)       # (N,), without gradient
    return dice_loss(logits, masks) + 20 * focal + F.mse_loss(iou.float().flatten(), true_iou)


def dsc(logits, masks):
    """Mean Dice coefficient of {logits > 0}, (N, 1, 256, 256) enlarged, and masks (N, S, S); 1 for two empty ones."""
    found, truth = enlarged(logits, masks) > 0, masks > 0
    overlap, total = (found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))     # (N,)
    return float((2 * overlap / total).nan_to_num(1.0).mean())                              # 0 / 0 is NaN
