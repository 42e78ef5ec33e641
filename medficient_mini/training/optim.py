"""The optimiser, three schedules of the learning rate, the moving average of the weights."""
from math import cos, pi, sqrt

import torch
from torch.optim.swa_utils import AveragedModel


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay and bias correction (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2)."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient; the others stay, without decay, as in torch's AdamW."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                p.mul_(1 - lr * group["weight_decay"])
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = square.sqrt().div_(sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
                p.addcdiv_(mean, root, value=-lr / (1 - beta1 ** state["step"]))


def learning_rate(arguments, step, steps, scores):
    """Return the rate of update `step` (from 0) of `steps`, by --lr, --schedule, --warmup; `scores` of epochs so far.

    cosine: a linear rise over the warm-up, then half a cosine to 0 (SGDR, arXiv 1608.03983, Eq. 5). halve: after each
    epoch. plateau: after each epoch that is not better (higher) by a relative 0.0001 (ReduceLROnPlateau, patience 0).
    """
    if arguments.schedule == "cosine":
        warmup = arguments.warmup
        factor = (step + 1) / warmup if step < warmup else (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2
        return arguments.lr * factor
    factor, best = 1.0, None
    for score in scores:
        if arguments.schedule == "plateau" and (best is None or score > best + 1e-4 * abs(best)):
            best = score
        else:
            factor *= 0.5
    return arguments.lr * factor


def moving_average(model, decay):
    """An exponential moving average of a model's weights and buffers (Polyak & Juditsky 1992) as torch's AveragedModel.

    At update n it moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights: a random start is soon forgotten.
    """
    def average(old, new, n):
        return old.lerp(new, 1 - min(decay, (1 + int(n)) / (10 + int(n)))) if old.is_floating_point() else new

    averaged = AveragedModel(model, avg_fn=average, use_buffers=True)
    averaged.n_averaged.fill_(1)    # at 0 torch would put the weights of the first update in the start's place
    return averaged
