"""What this process runs on: torchrun's processes, free cores, work side by side, bfloat16, how glibc keeps memory."""
import ctypes
import os
import re
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def place_among_processes() -> tuple[int, int, int]:
    """Return this process's rank, the number of processes and its rank on this machine, as torchrun tells them.

    0, 1 and 0 unless all of torchrun's variables are set: some alone are left over from something else. ValueError
    for a rank beyond the world and for what is no number.
    """
    if not all(name in os.environ for name in TORCHRUN):
        return 0, 1, 0
    found = [os.environ[name] for name in TORCHRUN[:3]]
    if not all(map(str.isdecimal, found)) or int(found[0]) >= int(found[1]):
        raise ValueError(f"RANK, WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE, found {found[0]!r} and {found[1]!r}")
    return tuple(map(int, found))


class Load:
    """What other programs take of the cores from the moment this is made; nice'd ones give way and do not count."""

    def __init__(self):
        self.start = self.seconds()

    def seconds(self) -> tuple[float, float]:
        """Return the time, and the seconds that the cores worked for others since the machine started (Linux alone)."""
        statistics = Path("/proc/stat")
        if not statistics.exists():
            return time.monotonic(), 0.0
        user, _, system, _, _, irq, softirq, steal = map(int, statistics.read_text().split()[1:9])
        worked = (user + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), worked - time.process_time()

    def free_cores(self) -> int:
        """Return how many of torch's threads have a core for themselves, one at least."""
        (start, before), (now, after) = self.start, self.seconds()
        return max(1, torch.get_num_threads() - round((after - before) / max(now - start, 1e-3)))


def workers_on(device: torch.device) -> int:
    """Return how many independent pieces are best done side by side: on a CPU up to four, on a GPU one."""
    return min(4, torch.get_num_threads()) if device.type == "cpu" else 1


def ahead(function, items, workers: int):
    """Yield each item (a tuple) in order with the future of function(*item), `workers` further ones under way.

    The workers are threads of this process that share torch's among them. Two threads of torch wait for each other at
    the end of every operation, so where another program takes a core from one, both stand; two workers never wait.
    """
    waiting, threads = deque(), torch.get_num_threads()
    shares = (max(1, threads // workers),)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=shares) as pool:
            for item in items:
                waiting.append((item, pool.submit(function, *item)))
                if len(waiting) > workers:
                    yield waiting.popleft()
            yield from waiting
    finally:
        torch.set_num_threads(threads)               # the workers' number is also that of threads yet to come


def native_bf16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices itself (AVX512-BF16, AMX, or Arm's bf16 extension)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, probe, bool)() for probe in probes):            # bool() is False
        return True
    flags = Path("/proc/cpuinfo")
    return flags.exists() and re.search("^Features.* bf16", flags.read_text(), re.MULTILINE) is not None      # on Arm


def share_heap() -> None:
    """Let all threads of this program take memory from one heap: of their own ones each keeps the most it ever held."""
    _glibc("mallopt", -8, 1)                                     # M_ARENA_MAX


def keep_memory() -> None:
    """Keep freed memory, for training: to hand large buffers back and fault them in again costs a CPU step 15 %."""
    _glibc("mallopt", -3, 2**30)                                 # M_MMAP_THRESHOLD
    _glibc("mallopt", -1, 2**31 - 1)                             # M_TRIM_THRESHOLD
    _glibc("mallopt", -2, 2**28)                                 # M_TOP_PAD


def return_memory() -> None:
    """Hand freed memory back, after loading weights: 150 to 200 MB lie between what is still used."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc, where that is the C library."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError, TypeError):
        pass
