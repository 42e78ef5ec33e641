"""One process or several (torchrun): device, precision, sums over processes, batch norm over the whole batch.

Gradients are summed by hand after the backward pass rather than by DistributedDataParallel: the losses are means over
objects, of which the processes hold different numbers, so each process divides by the global count and the sum is
exactly what one process with the whole batch would have computed.
"""
import atexit
import os
import re
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

from ..machine import native_bf16


class World:
    """This process among `size` of them. `device` "auto": its own GPU, else the CPU; `amp` "auto" or "off".

    ValueError with one line for a device that is not here.
    """

    def __init__(self, device="auto", amp="auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, found {device}")
        gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        if gpu and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: no such GPU here, expected cpu")
        if gpu and device in ("auto", "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if gpu and int(device[len("cuda:"):]) >= torch.cuda.device_count():
            raise ValueError(f"--device: expected one of the {torch.cuda.device_count()} GPUs here, counted from 0, found {device}")
        self.device = torch.device(device if gpu else "cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            # The others wait while the first one unpacks volumes or the slowest one computes its embeddings.
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))
            atexit.register(dist.destroy_process_group)
        self.bf16 = amp != "off" and (torch.cuda.is_bf16_supported(including_emulation=False) if gpu else native_bf16())

    @property
    def first(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def to_device(self, batch):
        """A dict of tensors to the device, images channels-last."""
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return {key: value.contiguous(memory_format=torch.channels_last) if key.endswith("image") else value
                for key, value in batch.items()}

    def sum(self, values):
        """Sum of each number of a dict (same keys everywhere) over the processes, in float64."""
        if self.size == 1:
            return {key: float(value) for key, value in values.items()}
        total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    @torch.no_grad()
    def sum_gradients(self, params):
        """Sum every gradient over the processes; a parameter without one stays so only if no process has one."""
        if self.size == 1:
            return
        params = [p for p in params if p.requires_grad]
        has = torch.tensor([p.grad is not None for p in params], dtype=torch.float32, device=self.device)
        flat = torch.cat([has] + [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        has, *grads = flat.split([len(params)] + [p.numel() for p in params])
        for p, any_has, grad in zip(params, has.tolist(), grads):
            p.grad = torch.empty_like(p).copy_(grad.view(p.shape)) if any_has else None

    @torch.no_grad()
    def same_start(self, model):
        """Give every process the weights of the first, and batch norms that see the batches of all."""
        if self.size == 1:
            return
        for tensor in model.state_dict().values():
            flat = tensor.contiguous()       # channels-last weights travel in their logical order
            dist.broadcast(flat, 0)
            tensor.copy_(flat)
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SharedBatchNorm2d

    def wait(self):
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first_goes_ahead(self):
        """The first process runs the block before the others do (they then find what it wrote)."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce with its gradient: the loss of every process depends on the sum, so gradients are summed too."""

    @staticmethod
    def forward(_, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training come from the batches of all processes; same keys as BatchNorm2d.

    torch.nn.SyncBatchNorm does this on GPUs only.
    """

    def forward(self, x):                                                     # (B, C, H, W)
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            ones = values.new_tensor([values.numel() / values.shape[1]])
            sums = torch.cat([values.sum((0, 2, 3)), (values ** 2).sum((0, 2, 3)), ones])
            total, squares, count = _SumOverProcesses.apply(sums).split([values.shape[1], values.shape[1], 1])
            mean = total / count
            variance = (squares / count - mean ** 2).clamp(min=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
                self.num_batches_tracked += 1
            scale = self.weight / (variance + self.eps).sqrt()
            shift = self.bias - mean * scale
            return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
