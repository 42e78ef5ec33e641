"""Optimiser and schedules against torch's, the moving average against its recurrence."""
import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medficient_mini.training.optim import (AdamW, CosineAnnealing, HalveEachEpoch, ReduceLROnPlateau, moving_average,
                                            schedule_of)


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, [(torch.randn(5, 6), torch.randn(5, 3)) for _ in range(100)]


def run(model, optimizer, data, schedule=None):
    for x, y in data:
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        if schedule:
            schedule.after_update()


def distance(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("options", [dict(lr=1e-3), dict(lr=3e-2, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)])
def test_adamw_equals_torch(options):
    ours, data = problem()
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    run(ours, AdamW(ours.parameters(), **options), data)
    run(theirs, torch.optim.AdamW(theirs.parameters(), **options), data)
    assert distance(ours, theirs) < 1e-5 < 1e-2 < distance(ours, start)


def test_adamw_groups_and_parameters_without_gradient():
    ours, data = problem()
    theirs = copy.deepcopy(ours)

    def groups(model):
        return [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 1e-2}]

    pairs = [(ours, AdamW(groups(ours), lr=1e-3)), (theirs, torch.optim.AdamW(groups(theirs), lr=1e-3))]
    for i, (x, y) in enumerate(data[:60]):
        for model, optimizer in pairs:
            model[0].requires_grad_(i % 3 != 0)  # its step count lags behind
            optimizer.zero_grad(set_to_none=True)
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
    assert distance(ours, theirs) < 1e-5


def test_adamw_and_cosine_resume_exactly_through_a_file():
    model, data = problem()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    schedule = CosineAnnealing(optimizer, steps=len(data), warmup=10)
    run(model, optimizer, data[:40], schedule)
    stream = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, stream)
    run(model, optimizer, data[40:], schedule)

    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    again, _ = problem(seed=1)
    other = AdamW(again.parameters(), lr=1e-2)
    other_schedule = CosineAnnealing(other, steps=len(data), warmup=10)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    other_schedule.load_state_dict(saved["schedule"])
    run(again, other, data[40:], other_schedule)
    assert distance(model, again) == 0


def optimizers(lr=0.1):
    return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr) for _ in range(2)]


def rates(optimizer, advance, count):
    """The learning rates of `count` updates or epochs, each ended by advance(its number)."""
    out = []
    for i in range(count):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        advance(i)
    return out


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_equals_torch_and_resumes(mode):
    ours, theirs = optimizers()
    scores = (1 + torch.randn(40, generator=torch.Generator().manual_seed(1)).cumsum(0).abs() * 0.01).tolist()
    schedules = [ReduceLROnPlateau(ours, mode)]

    def after_epoch(i):
        schedules.append(ReduceLROnPlateau(ours, mode))                     # a run resumed at each epoch
        schedules[-1].load_state_dict(schedules[-2].state_dict())
        schedules[-1].after_update()
        schedules[-1].after_epoch(scores[i])

    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, mode, 0.5, patience=0, eps=0)
    expected = rates(theirs, lambda i: torchs.step(scores[i]), 40)
    assert rates(ours, after_epoch, 40) == pytest.approx(expected, rel=1e-9) and len(set(expected)) > 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cosine_equals_torch_with_and_without_warmup():
    lrs = torch.optim.lr_scheduler
    for warmup in (0, 20):
        ours, theirs = optimizers()
        torchs = lrs.CosineAnnealingLR(theirs, 200 - warmup)
        if warmup:
            torchs = lrs.SequentialLR(theirs, [lrs.LinearLR(theirs, 1 / 20, total_iters=19), torchs], [20])
        schedule = CosineAnnealing(ours, 200, warmup=warmup)
        found = rates(ours, lambda _: (schedule.after_epoch(0.0), schedule.after_update()), 210)
        assert found[:200] == pytest.approx(rates(theirs, lambda _: torchs.step(), 200), rel=1e-6)
        assert found[0] == pytest.approx(0.005 if warmup else 0.1) and found[200:] == [0] * 10
    with pytest.raises(ValueError, match="warm-up of 5"):
        CosineAnnealing(ours, 5, warmup=5)


def test_halving_equals_torch():
    ours, theirs = optimizers(0.075)
    schedule, torchs = HalveEachEpoch(ours), torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5)
    assert rates(ours, lambda _: (schedule.after_update(), schedule.after_epoch(1.0)), 8) \
        == rates(theirs, lambda _: torchs.step(), 8)


def test_schedules_by_name():
    for name, kind in (("plateau", ReduceLROnPlateau), ("halve", HalveEachEpoch), ("cosine", CosineAnnealing)):
        found = schedule_of(SimpleNamespace(schedule=name, warmup=0), optimizers()[0], 10, "max")
        assert type(found) is kind and getattr(found, "sign", -1) == -1


def test_moving_average_equals_its_recurrence_and_resumes():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, other = moving_average(model, 0.9), moving_average(model, 0.9)
    expected = model[0].weight.detach().clone()
    expected_mean = model[1].running_mean.clone()
    for n in range(1, 101):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        model(torch.randn(4, 2))                                                           # moves the running statistics
        average.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        expected_mean = decay * expected_mean + (1 - decay) * model[1].running_mean
    torch.testing.assert_close(average.module[0].weight.detach(), expected)
    torch.testing.assert_close(average.module[1].running_mean, expected_mean)
    assert average.module[1].num_batches_tracked == 100

    other.load_state_dict(average.state_dict())
    for each in (average, other):
        each.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(average.state_dict().values(), other.state_dict().values()))
