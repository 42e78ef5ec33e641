"""Optimiser and schedules against torch's, the moving average against its recurrence."""
import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medficient_mini.training.optim import AdamW, learning_rate, moving_average

lrs = torch.optim.lr_scheduler


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, [(torch.randn(5, 6), torch.randn(5, 3)) for _ in range(100)]


def run(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()


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


def test_adamw_resumes_exactly_through_a_file():
    model, data = problem()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    run(model, optimizer, data[:40])
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    run(model, optimizer, data[40:])

    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    again, _ = problem(seed=1)
    other = AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    run(again, other, data[40:])
    assert distance(model, again) == 0


def torch_rates(schedule, scores, lr=0.1):
    """The learning rate of each epoch or update by one of torch's schedules, schedule(optimizer)."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, rates = schedule(optimizer), []
    for score in scores:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*score)
    return rates


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_equals_torch(mode):
    scores = (1 + torch.randn(40, generator=torch.Generator().manual_seed(1)).cumsum(0).abs() * 0.01).tolist()
    expected = torch_rates(lambda optimizer: lrs.ReduceLROnPlateau(optimizer, mode, 0.5, patience=0, eps=0), zip(scores))
    arguments = SimpleNamespace(schedule="plateau", lr=0.1)
    higher_is_better = [-score if mode == "min" else score for score in scores]
    found = [learning_rate(arguments, 0, 1, higher_is_better[:n]) for n in range(40)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert len(set(expected)) > 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cosine_equals_torch_with_and_without_warmup():
    def schedule(optimizer):
        cosine = lrs.CosineAnnealingLR(optimizer, 200 - warmup)
        return lrs.SequentialLR(optimizer, [lrs.LinearLR(optimizer, 1 / 20, total_iters=19), cosine], [20]) if warmup else cosine

    for warmup in (0, 20):
        arguments = SimpleNamespace(schedule="cosine", lr=0.1, warmup=warmup)
        found = [learning_rate(arguments, step, 200, [1.0]) for step in range(201)]
        assert found[:200] == pytest.approx(torch_rates(schedule, [()] * 200), rel=1e-6)
        assert found[0] == pytest.approx(0.005 if warmup else 0.1) and found[200] == 0


def test_halving_equals_torch():
    expected = torch_rates(lambda optimizer: lrs.ExponentialLR(optimizer, 0.5), [()] * 8, lr=0.075)
    arguments = SimpleNamespace(schedule="halve", lr=0.075)
    assert [learning_rate(arguments, 0, 1, [1.0] * n) for n in range(8)] == expected


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
