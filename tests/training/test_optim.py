import copy
import io

import pytest
import torch
from torch import nn

from medficient_mini.training.optim import AdamW, Average, CosineAnnealing, HalveEachEpoch, ReduceLROnPlateau, clip_grad_norm

torch.manual_seed(0)


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [(torch.randn(5, 6), torch.randn(5, 3)) for _ in range(300)]
    return model, data


def run(model, optimizer, data, schedule=None):
    for x, y in data:
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def distance(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("options", [dict(lr=1e-3), dict(lr=3e-2, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)])
def test_adamw_equals_torch(options):
    ours, data = problem()
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
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
    schedule = CosineAnnealing(optimizer, steps=len(data), warmup=10)
    run(model, optimizer, data[:100], schedule)
    stream = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, stream)
    run(model, optimizer, data[100:], schedule)

    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    again, _ = problem(seed=1)
    other = AdamW(again.parameters(), lr=1e-2)
    other_schedule = CosineAnnealing(other, steps=len(data), warmup=10)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    other_schedule.load_state_dict(saved["schedule"])
    run(again, other, data[100:], other_schedule)
    assert distance(model, again) == 0


def test_adamw_refuses_bad_options():
    with pytest.raises(ValueError, match="lr -1"):
        AdamW(nn.Linear(1, 1).parameters(), lr=-1)


def rates(optimizer, schedule, count, metrics=None):
    out = []
    for i in range(count):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([] if metrics is None else [metrics[i]]))
    return out


def optimizers(lr=0.1):
    return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr) for _ in range(2)]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 3])
def test_plateau_equals_torch(mode, patience):
    ours, theirs = optimizers()
    metrics = (1 + torch.randn(300).cumsum(0).abs() * 0.01).tolist()
    options = dict(mode=mode, factor=0.5, patience=patience, min_lr=1e-6)
    a = rates(ours, ReduceLROnPlateau(ours, **options), 300, metrics)
    b = rates(theirs, torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **options), 300, metrics)
    assert a == pytest.approx(b, rel=1e-9) and len(set(a)) > 3


def test_plateau_resumes():
    metrics = [1.0, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95]
    whole, halves = optimizers()
    expected = rates(whole, ReduceLROnPlateau(whole, patience=2), 7, metrics)
    first = ReduceLROnPlateau(halves, patience=2)
    got = rates(halves, first, 4, metrics)
    second = ReduceLROnPlateau(halves, patience=2)
    second.load_state_dict(first.state_dict())
    assert got + rates(halves, second, 3, metrics[4:]) == expected and expected[-1] < expected[0]


def test_cosine_equals_torch():
    ours, theirs = optimizers()
    a = rates(ours, CosineAnnealing(ours, 200, min_lr=1e-3), 200)
    b = rates(theirs, torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 200, eta_min=1e-3), 200)
    assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cosine_with_warmup_equals_torch():
    ours, theirs = optimizers()
    a = rates(ours, CosineAnnealing(ours, 200, warmup=20), 200)
    lrs = torch.optim.lr_scheduler
    b = rates(theirs, lrs.SequentialLR(theirs, [lrs.LinearLR(theirs, 1 / 20, total_iters=19),
                                                lrs.CosineAnnealingLR(theirs, 180)], [20]), 200)
    assert a == pytest.approx(b, rel=1e-6)
    assert a[0] == pytest.approx(0.005) and max(a) == pytest.approx(0.1)


def test_cosine_stays_at_its_end_and_refuses_a_warmup_as_long_as_the_run():
    optimizer, _ = optimizers()
    assert rates(optimizer, CosineAnnealing(optimizer, 5, min_lr=0.01), 12)[5:] == [0.01] * 7
    with pytest.raises(ValueError, match="warm-up of 5"):
        CosineAnnealing(optimizer, 5, warmup=5)


def test_halving_equals_torch():
    ours, theirs = optimizers(0.075)
    assert rates(ours, HalveEachEpoch(ours), 8) == rates(theirs, torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5), 8)


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clip_equals_torch(max_norm):
    ours, data = problem()
    ((ours(data[0][0]) - data[0][1]) ** 2).mean().backward()
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        q.grad = p.grad.clone()
    norm = clip_grad_norm(ours.parameters(), max_norm)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs.parameters(), max_norm).item(), rel=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_average_equals_its_recurrence_and_resumes():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, decay=0.9)
    expected = model[0].weight.detach().clone()
    for n in range(1, 101):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        model(torch.randn(4, 2))  # moves the running statistics
        average.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.weights["0.weight"], expected)
    assert average.weights["1.num_batches_tracked"] == 100

    other = Average(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), decay=0.9)
    other.load_state_dict(average.state_dict())
    for each in (average, other):
        each.update(model)
    assert all(torch.equal(average.weights[key], other.weights[key]) for key in average.weights)


def test_average_is_applied_only_inside_the_block():
    model, _ = problem()
    average = Average(model)
    own = copy.deepcopy(model)
    average.weights["0.weight"].zero_()
    with average.applied(model):
        assert model[0].weight.abs().sum() == 0
    assert distance(model, own) == 0
