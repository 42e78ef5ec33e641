"""One process or several (torchrun), which compute what one with the whole batch would.

Batch norm sees all batches on GPUs (SyncBatchNorm); on CPUs each process's own, with the statistics of the first.
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ..machine import TORCHRUN, native_bf16, place_among_processes


class Distributed:
    """This process, number `rank` of `size`; ValueError for a device that is not here. See --device and --amp."""

    def __init__(self, device, amp="auto"):
        missing = [name for name in TORCHRUN if name not in os.environ]
        if missing and "WORLD_SIZE" in os.environ:
            print(f"WORLD_SIZE in the environment: ignored, expected {', '.join(missing)} beside it as torchrun sets "
                  "them; this is the only process", file=sys.stderr)
        self.rank, self.size, local = place_among_processes()
        self.first = self.rank == 0
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        if device == "auto":
            device = "cuda" if len(here) > 1 else "cpu"
        if device == "cuda":
            device = f"cuda:{local}"
        if device not in here:
            raise ValueError(f"--device: expected auto, {', '.join(here)}, found {device}")
        self.device = torch.device(device)
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.set_device(self.device)
        if self.size > 1:
            # The others wait while the first process unpacks volumes or the slowest validates.
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
        self.bf16 = amp != "off" and (torch.cuda.is_bf16_supported(including_emulation=False) if gpu else native_bf16())

    def autocast(self):
        """The context in which networks are called, of bfloat16 where that was asked for and is there."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def to_device(self, batch):
        """Bring a module, channels-last, or the tensors of a dict to the device."""
        if isinstance(batch, nn.Module):
            if self.size > 1 and self.device.type == "cuda":
                batch = nn.SyncBatchNorm.convert_sync_batchnorm(batch)
            return batch.to(self.device, memory_format=torch.channels_last)
        return {key: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()}

    def sum(self, values):
        """Sum each number of a dict (same keys everywhere) over the processes, in float64; all wait for each other."""
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    @contextmanager
    def first_goes_ahead(self):
        """Run a block in the first process before the others; ValueError in the others if it fails there."""
        failed = 1
        try:
            if self.first:
                yield
            failed = 0
        finally:                                               # also when the first one leaves the block by an error
            failed = self.sum({"failed": failed})["failed"]
        if failed:
            raise ValueError("stopped: the first process failed")
        if not self.first:
            yield
