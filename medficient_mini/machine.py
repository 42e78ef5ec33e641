"""What this process runs on: its place among torchrun's processes, bfloat16 in the CPU, how glibc keeps memory."""
import ctypes
import os
import re
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


def native_bf16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices itself (AVX512-BF16, AMX, or Arm's bf16 extension)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, probe, bool)() for probe in probes):            # bool() is False
        return True
    flags = Path("/proc/cpuinfo")
    return flags.exists() and re.search("^Features.* bf16", flags.read_text(), re.MULTILINE) is not None      # on Arm


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
