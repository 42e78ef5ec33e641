"""The optimiser, three learning-rate schedules and the moving average of the weights.

The schedules share one interface, so that the training loop need not know which one it has: build one after the
optimiser, call `after_update()` after each of its steps and `after_epoch(score)` after each validation. A run is
resumed by building the same objects again and loading the states of the optimiser and of the schedule.
"""
from math import cos, pi, sqrt

import torch
from torch.optim.swa_utils import AveragedModel


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay and bias correction (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2).

    It works on lists of tensors (`torch._foreach_*`): a few large operations instead of several for each parameter.

    Args:
        params: parameters, or groups of them, each with its own `lr` or `weight_decay` if it names them.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient; the others stay, without decay, as in torch's AdamW."""
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


class HalveEachEpoch:
    """Halve the learning rates after each epoch; also the interface and the resuming that the others share."""
    remembered = ()  # names of what a resumed run must know; the learning rates are in the optimiser's state

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def after_update(self):
        """Called after each update of the weights."""

    def after_epoch(self, score):
        """Called after each epoch with the score of its validation."""
        self.halve()

    def halve(self):
        """Halve the learning rates of all groups."""
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self):
        """Return {name: number}: what `load_state_dict` of another object needs to go on."""
        return {name: getattr(self, name) for name in self.remembered}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave; the optimiser's own state holds the learning rates."""
        vars(self).update(state)


class ReduceLROnPlateau(HalveEachEpoch):
    """Halve the learning rates after each epoch without a better score, as torch's with factor 0.5 and patience 0.

    Better is below best * (1 - 0.0001) for mode "min" and above best * (1 + 0.0001) for "max".
    """
    remembered = ("best",)

    def __init__(self, optimizer, mode="min"):
        super().__init__(optimizer)
        self.sign = 1 if mode == "min" else -1                    # a score to maximise is a negative one to minimise
        self.best = self.sign * float("inf")

    def after_epoch(self, score):
        """Compare the score with the best so far."""
        if self.sign * score < self.sign * self.best * (1 - self.sign * 1e-4):
            self.best = score
        else:
            self.halve()


class CosineAnnealing(HalveEachEpoch):
    """Lower the learning rates along half a cosine to zero (SGDR, arXiv 1608.03983, Eq. 5), at each update.

    Args:
        steps: updates in all; afterwards the rate stays at zero.
        warmup: the first updates, in which the rate rises linearly: update k (from 0) has (k + 1) / warmup of it.

    Raises:
        ValueError: the warm-up is as long as the run or longer.
    """
    remembered = ("count",)

    def __init__(self, optimizer, steps, warmup=0):
        if not 0 <= warmup < steps:
            raise ValueError(f"CosineAnnealing: warm-up of {warmup} updates, expected fewer than the {steps} in all")
        super().__init__(optimizer)
        self.steps, self.warmup, self.count = steps, warmup, -1
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.after_update()

    def after_update(self):
        """Set the rates of the next update."""
        self.count += 1
        done = min(1.0, (self.count - self.warmup) / (self.steps - self.warmup))
        factor = (self.count + 1) / self.warmup if self.count < self.warmup else (1 + cos(pi * done)) / 2
        for group, base in zip(self.optimizer.param_groups, self.base):
            group["lr"] = base * factor

    def after_epoch(self, score):
        """An epoch's end changes nothing."""


def schedule_of(arguments, optimizer, steps, mode):
    """Return the schedule that --schedule names; `mode` "min" or "max" says which scores are better."""
    if arguments.schedule == "cosine":
        return CosineAnnealing(optimizer, steps, arguments.warmup)
    return HalveEachEpoch(optimizer) if arguments.schedule == "halve" else ReduceLROnPlateau(optimizer, mode)


def moving_average(model, decay):
    """An exponential moving average of a model's weights and buffers (Polyak & Juditsky 1992) as torch's AveragedModel.

    Call `update_parameters(model)` after each update; the averaged network is `.module`. At update n the average moves
    by 1 - d towards the weights, d = min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten. What
    is not floating point, such as batch norm's counters, is copied.
    """
    def average(averages, weights, n):
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + int(n)) / (10 + int(n))))
        else:
            torch._foreach_copy_(averages, weights)

    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    averaged.n_averaged.fill_(1)    # at 0 torch would put the weights of the first update in the start's place
    return averaged
