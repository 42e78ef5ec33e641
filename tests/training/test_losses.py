import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medficient_mini.training.losses import dice_loss, dsc, embedding_mse, finetune_loss


def random_problem(n=3, side=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 1, side, side, generator=generator) * 2
    masks = (torch.rand(n, side, side, generator=generator) > 0.6).to(torch.uint8)
    return logits, masks


def test_dice_equals_the_sum_over_pixels():
    logits, masks = random_problem()
    expected = []
    for logit, mask in zip(logits.double().numpy(), masks.numpy()):
        p = 1 / (1 + np.exp(-logit[0]))
        expected.append(1 - 2 * (p * mask).sum() / ((p ** 2).sum() + mask.sum()))
    assert dice_loss(logits=logits, masks=masks).item() == pytest.approx(np.mean(expected), rel=1e-4)    # fault 2


def test_finetune_loss_is_its_three_terms_at_the_masks_size():
    logits, masks = random_problem()
    iou = torch.tensor([[0.2], [0.5], [0.9]])
    masks = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)                          # (3, 18, 18)
    large = F.interpolate(logits, (18, 18), mode="bilinear")[:, 0]
    p, truth = 1 / (1 + np.exp(-large.double().numpy())), masks.numpy() > 0
    p_t = np.where(truth, p, 1 - p)
    focal = (-(1 - p_t) ** 2 * np.log(p_t)).mean()
    ious = [(mask & gt).sum() / (mask | gt).sum() for mask, gt in zip(large.numpy() > 0, truth)]
    expected = dice_loss(large, masks).item() + 20 * focal + np.mean((iou.numpy()[:, 0] - ious) ** 2)
    assert finetune_loss(logits, masks, iou).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert finetune_loss(logits.bfloat16(), masks, iou).dtype == torch.float32


def test_mask_terms_train_the_logits_but_in_the_published_form_the_iou_alone():
    logits, masks = random_problem()
    for published in (False, True):
        given, iou = logits.clone().requires_grad_(), torch.rand(3, 1).requires_grad_()
        finetune_loss(given, masks, iou, mask_gradient=not published).backward()
        assert iou.grad.abs().max() > 0 and (given.grad is None) == published


def test_losses_stay_finite_at_extreme_logits_and_cost_nothing_where_all_is_right():
    logits = torch.tensor([[[[1e4, -1e4], [1e4, -1e4]]]], requires_grad=True)
    loss = finetune_loss(logits, torch.tensor([[[0, 1], [1, 0]]]), torch.zeros(1, 1))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    _, masks = random_problem()
    assert finetune_loss(masks[:, None] * 40.0 - 20, masks, torch.ones(3, 1)) < 1e-4


def test_embedding_mse_takes_half_precision_under_autocast():
    pred, target = torch.full((1, 2, 2, 2), 300.0), torch.zeros(1, 2, 2, 2, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = embedding_mse(pred, target)
    assert loss.dtype == torch.float32 and loss == 90000                                   # beyond float16


def test_dsc_counts_pixels_and_is_never_0_by_0():                                          # fault 3, second half
    masks = torch.zeros(3, 4, 4, dtype=torch.uint8)
    masks[0, :2], masks[1, 0] = 1, 1
    logits = torch.full((3, 1, 4, 4), -1.0)
    logits[0, 0, 1:3] = 1                                                                  # half of it right
    assert dsc(logits, masks) == pytest.approx((0.5 + 0 + 1) / 3)
    assert dsc(logits[2:], masks[2:]) == 1
    assert dsc(F.interpolate(logits, (2, 2)), masks) < 1
