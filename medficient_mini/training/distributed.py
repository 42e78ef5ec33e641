"""One process or several (torchrun): device, precision, sums over processes.

Several processes compute what one process with the whole batch would: each scales its loss by its share of the
objects, and torch's DistributedDataParallel averages the gradients. Batch norm sees the batches of all processes on
GPUs (torch.nn.SyncBatchNorm, which is for GPUs alone); on several CPU processes each normalises with its own batch, and
the running statistics are those of the first process.
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ..machine import TORCHRUN, native_bf16, place_among_processes

# The others wait while the first process unpacks volumes or the slowest one computes its share of the embeddings.
LONGEST_WAIT = timedelta(hours=2)


class Distributed:
    """This process, number `rank` among `size` of them, with its `device` and precision.

    Several processes are believed in only where all of torchrun's variables are set: RANK and WORLD_SIZE alone are left
    over from something else, and the run would do a part of the work without a word.

    Args:
        device: "cpu", "cuda", "cuda:1", … or "auto", the process's own GPU and else the CPU.
        amp: "auto" for bfloat16 where the hardware has it, or "off".

    Raises:
        ValueError: a device that is not here, with one line.
    """

    def __init__(self, device="auto", amp="auto"):
        missing = [name for name in TORCHRUN if name not in os.environ]
        if missing and "WORLD_SIZE" in os.environ:
            print(f"WORLD_SIZE in the environment: ignored, expected {', '.join(missing)} beside it as torchrun sets "
                  "them; this is the only process", file=sys.stderr)
        self.rank, self.size, local = place_among_processes()
        self.first = self.rank == 0
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{local}"
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        if device not in here:
            raise ValueError(f"--device: expected auto, {', '.join(here)}, found {device}")
        self.device = torch.device(device)
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if gpu else "gloo", timeout=LONGEST_WAIT)
        self.bf16 = amp != "off" and (torch.cuda.is_bf16_supported(including_emulation=False) if gpu else native_bf16())

    def autocast(self):
        """The context in which networks are called: bfloat16 where that was asked for and is there."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def to_device(self, batch):
        """Bring a module, or a dict of tensors, to the device; networks and images (keys …image) channels-last."""
        if isinstance(batch, nn.Module):
            if self.size > 1 and self.device.type == "cuda":
                batch = nn.SyncBatchNorm.convert_sync_batchnorm(batch)
            return batch.to(self.device, memory_format=torch.channels_last)
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return {key: value.contiguous(memory_format=torch.channels_last) if key.endswith("image") else value
                for key, value in batch.items()}

    def sum(self, values):
        """Sum each number of a dict (same keys everywhere) over the processes, in float64."""
        total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def wait(self):
        """Return when all processes have come here."""
        self.sum({})

    @contextmanager
    def first_goes_ahead(self):
        """Run the block in the first process before the others run it, who then find what it wrote.

        ValueError in the others if it fails in the first one.
        """
        failed = 1
        try:
            if self.first:
                yield
            failed = 0
        finally:
            # The first process says how it ended, also when it leaves by an error; the others wait for that.
            failed = self.sum({"failed": failed})["failed"]
        if failed:
            raise ValueError("stopped: the first process failed")
        if not self.first:
            yield
