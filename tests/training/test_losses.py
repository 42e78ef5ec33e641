import numpy as np
import pytest
import torch
from torch import nn

from medficient_mini.training.losses import bce, dice_loss, embedding_mse, finetune_loss, focal_loss, iou_mse


def random_problem(n=3, side=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, side, side, generator=generator) * 2
    masks = (torch.rand(n, side, side, generator=generator) > 0.6).to(torch.uint8)
    return logits, masks


def test_dice_equals_the_sum_over_pixels():
    logits, masks = random_problem()
    expected = []
    for logit, mask in zip(logits.double().numpy(), masks.numpy()):
        p = 1 / (1 + np.exp(-logit))
        expected.append(1 - 2 * (p * mask).sum() / ((p ** 2).sum() + mask.sum()))
    assert dice_loss(logits, masks).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_focal_equals_its_equation_and_bce_without_gamma():
    logits, masks = random_problem()
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    p_t = np.where(masks.numpy() == 1, p, 1 - p)
    assert focal_loss(logits, masks).item() == pytest.approx((-(1 - p_t) ** 2 * np.log(p_t)).mean(), rel=1e-5)
    assert bce(logits, masks).item() == pytest.approx((-np.log(p_t)).mean(), rel=1e-5)
    assert focal_loss(logits, masks, gamma=0).item() == pytest.approx(bce(logits, masks).item(), rel=1e-6)
    assert focal_loss(logits[:, None], masks).item() == focal_loss(logits, masks).item()


def test_losses_stay_finite_at_extreme_logits():
    logits = torch.tensor([[[1e4, -1e4], [1e4, -1e4]]], requires_grad=True)
    masks = torch.tensor([[[0, 1], [1, 0]]])
    loss = dice_loss(logits, masks) + focal_loss(logits, masks) + bce(logits, masks)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_perfect_masks_cost_nothing():
    _, masks = random_problem()
    logits = masks * 40.0 - 20
    assert dice_loss(logits, masks) < 1e-4 and focal_loss(logits, masks) < 1e-6
    assert iou_mse(torch.ones(3, 1), logits, masks) == 0


def test_iou_mse_equals_counting_pixels():
    logits, masks = random_problem()
    predicted = torch.tensor([[0.2], [0.5], [0.9]])
    expected = []
    for logit, mask, value in zip(logits.numpy() > 0, masks.numpy() > 0, predicted.flatten().tolist()):
        expected.append((value - (logit & mask).sum() / (logit | mask).sum()) ** 2)
    assert iou_mse(predicted, logits, masks).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_embedding_mse_and_its_weights():
    pred, target = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    per_sample = ((pred - target) ** 2).mean((1, 2, 3))
    assert embedding_mse(pred, target).item() == pytest.approx(nn.functional.mse_loss(pred, target).item(), rel=1e-6)
    weighted = embedding_mse(pred, target, torch.tensor([1.0, 0.0, 3.0]))
    assert weighted.item() == pytest.approx(((per_sample[0] + 3 * per_sample[2]) / 4).item(), rel=1e-5)
    target[1] = float("nan")  # a sample without a target must not matter at all
    assert embedding_mse(pred, target, torch.tensor([True, False, True])).isfinite()
    assert embedding_mse(pred, target * 0 + pred, torch.zeros(3)) == 0


def test_embedding_mse_takes_half_precision_under_autocast():
    pred, target = torch.full((1, 2, 2, 2), 300.0), torch.zeros(1, 2, 2, 2, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = embedding_mse(pred, target)
    assert loss.dtype == torch.float32 and loss == 90000  # beyond float16


class Encoder(nn.Module):
    """The smallest thing with an encoder before the masks and an IoU head beside them."""
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 1)

    def forward(self, x):
        features = self.encoder(x)
        return features, self.head(features.detach().mean((2, 3)))


def test_mask_terms_alone_reach_the_encoder():
    torch.manual_seed(0)
    model, masks = Encoder(), (torch.rand(2, 32, 32) > 0.5).to(torch.uint8)
    logits, iou = model(torch.randn(2, 1, 16, 16))
    finetune_loss(logits, iou, masks).backward()
    assert model.encoder.weight.grad.abs().sum() > 0
    assert model.head.weight.grad.abs().sum() > 0
    model.zero_grad()
    logits, iou = model(torch.randn(2, 1, 16, 16))
    finetune_loss(logits, iou, masks, mask_gradient=False).backward()  # the published code's way
    assert model.encoder.weight.grad is None or model.encoder.weight.grad.abs().sum() == 0


def test_finetune_loss_is_its_three_terms_at_full_size():
    logits, masks = torch.randn(2, 1, 8, 8), (torch.rand(2, 16, 16) > 0.5).to(torch.uint8)
    iou = torch.rand(2, 1)
    large = nn.functional.interpolate(logits, (16, 16), mode="bilinear")
    expected = dice_loss(large, masks) + 20 * focal_loss(large, masks) + iou_mse(iou, large, masks)
    assert finetune_loss(logits, iou, masks).item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert finetune_loss(logits, iou, masks).dtype == torch.float32


def test_no_masks_give_a_loss_of_zero_with_a_gradient():
    logits = torch.zeros(0, 1, 8, 8, requires_grad=True)
    loss = finetune_loss(logits, torch.zeros(0, 1), torch.zeros(0, 16, 16))
    loss.backward()
    assert loss == 0
