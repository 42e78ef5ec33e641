"""Optimiser, learning-rate schedules, gradient clipping and weight averaging, written out.

Schedules follow torch's habit: build them after the optimiser, call `step` after the optimiser's (or after the epoch).
A run is resumed by building the same objects and loading the optimiser's and the schedule's state.
"""
from contextlib import contextmanager
from math import cos, pi, sqrt

import torch


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2) and bias correction.

    params: parameters or groups of them, each group with its own lr or weight_decay if it names them. Works on lists
    of tensors (`torch._foreach_*`): a few large operations instead of several small ones for each parameter.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        if lr < 0 or weight_decay < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}: "
                             f"expected non-negative values and betas below 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; the others stay, without decay, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # One list per step count and device: a parameter that had no gradient for a while lags behind.
            lists = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                member = p, p.grad, state["exp_avg"], state["exp_avg_sq"]
                lists.setdefault((state["step"], p.device), []).append(member)
            for (step, _), members in lists.items():
                self._update(step, *(list(column) for column in zip(*members)), group)
        return loss

    def _update(self, step, params, grads, exp_avgs, exp_avg_sqs, group):
        lr, (beta1, beta2) = group["lr"], group["betas"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, sqrt(1 - beta2 ** step))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1 ** step))


class ReduceLROnPlateau:
    """Multiply the learning rates by `factor` when `step(metric)` has seen no better metric for `patience` + 1 calls.

    Better: below best * (1 - threshold) for mode "min", above best * (1 + threshold) for "max". As torch's.
    """

    def __init__(self, optimizer, mode="min", factor=0.1, patience=10, threshold=1e-4, min_lr=0.0):
        self.optimizer, self.mode, self.factor = optimizer, mode, factor
        self.patience, self.threshold, self.min_lr = patience, threshold, min_lr
        self.best, self.bad = float("inf") if mode == "min" else -float("inf"), 0

    def step(self, metric):
        metric = float(metric)
        if (metric < self.best * (1 - self.threshold) if self.mode == "min"
                else metric > self.best * (1 + self.threshold)):
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.bad = 0
            for group in self.optimizer.param_groups:
                lr = max(group["lr"] * self.factor, self.min_lr)
                if group["lr"] - lr > 1e-8:  # torch's smallest change
                    group["lr"] = lr

    def state_dict(self):
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state):
        self.best, self.bad = state["best"], state["bad"]


class CosineAnnealing:
    """Half a cosine from the groups' learning rates to `min_lr` (SGDR, arXiv 1608.03983, Eq. 5), one `step` per update.

    `steps` updates in all; the first `warmup` of them rise linearly, update k (from 0) by (k + 1) / warmup. After
    `steps` the rate stays at `min_lr`.
    """

    def __init__(self, optimizer, steps, min_lr=0.0, warmup=0):
        if not 0 <= warmup < max(steps, 1):
            raise ValueError(f"CosineAnnealing: warm-up of {warmup} updates, expected fewer than the {steps} in all")
        self.optimizer, self.steps, self.min_lr, self.warmup = optimizer, max(steps, 1), min_lr, warmup
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.count = 0
        self._set()

    def _set(self):
        for group, base in zip(self.optimizer.param_groups, self.base):
            if self.count < self.warmup:
                group["lr"] = base * (self.count + 1) / self.warmup
            else:
                done = min(1.0, (self.count - self.warmup) / (self.steps - self.warmup))
                group["lr"] = self.min_lr + (base - self.min_lr) * (1 + cos(pi * done)) / 2

    def step(self):
        self.count += 1
        self._set()

    def state_dict(self):
        return {"base": self.base, "count": self.count}

    def load_state_dict(self, state):
        self.base, self.count = list(state["base"]), state["count"]
        self._set()


class HalveEachEpoch:
    """Multiply the learning rates by `factor` with each `step`, once per epoch."""

    def __init__(self, optimizer, factor=0.5):
        self.optimizer, self.factor = optimizer, factor

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] *= self.factor

    def state_dict(self):
        return {}  # the learning rate itself is in the optimiser's state

    def load_state_dict(self, state):
        pass


@torch.no_grad()
def clip_grad_norm(params, max_norm):
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before, a 0-d tensor.

    A norm that is not finite makes the gradients so too: look at it before the optimiser's step.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Average:
    """Exponential moving average of a model's weights and buffers (Polyak & Juditsky 1992).

    average += (1 - d) * (weights - average) after each update, d = min(decay, (1 + n) / (10 + n)) at update n, so that
    the random start is soon forgotten. What is not floating point is copied. `average.state_dict()["weights"]` has the
    keys of the model's own state dict.
    """

    def __init__(self, model, decay=0.999):
        self.decay, self.updates = decay, 0
        self.weights = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        """Take in the model's present weights: call after each optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = model.state_dict()
        floating = [key for key, value in self.weights.items() if value.is_floating_point()]
        if floating:
            torch._foreach_lerp_([self.weights[key] for key in floating], [state[key] for key in floating], 1 - decay)
        for key, value in self.weights.items():
            if not value.is_floating_point():
                value.copy_(state[key])

    @contextmanager
    def applied(self, model):
        """with average.applied(model): ... the model holds the averaged weights; afterwards its own again."""
        own = {key: value.detach().clone() for key, value in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield model
        finally:
            model.load_state_dict(own)

    def state_dict(self):
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        for key, value in self.weights.items():
            value.copy_(state["weights"][key])
