"""What this process runs on: its place among torchrun's processes, bfloat16 in the CPU, how glibc keeps memory."""
import ctypes
import os

import torch

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def place_among_processes() -> tuple[int, int, int]:
    """Return this process's rank, the number of processes and its rank on this machine, as torchrun tells them.

    They are 0, 1 and 0 unless all of torchrun's variables are set: RANK and WORLD_SIZE alone are left over from
    something else. ValueError, one line, for a rank beyond the world and for what is no number.
    """
    if not all(name in os.environ for name in TORCHRUN):
        return 0, 1, 0
    rank, world, local = (os.environ[name] for name in TORCHRUN[:3])
    if not (rank.isdecimal() and world.isdecimal() and local.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK, WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE, found {rank!r} and {world!r}")
    return int(rank), int(world), int(local)


def native_bf16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices itself (AVX512-BF16, AMX, or Arm's bf16 extension)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, probe, bool)() for probe in probes):            # bool() is False
        return True
    try:
        with open("/proc/cpuinfo") as file:
            return any(line.startswith("Features") and " bf16" in line for line in file)      # Arm's name for the flags
    except OSError:
        return False


def keep_memory() -> None:
    """Keep freed memory, for training: to hand large buffers back and fault them in again costs a CPU step 15 %."""
    for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        _glibc("mallopt", option, value)


def return_memory() -> None:
    """Hand freed memory back, after loading weights: 150 to 200 MB lie between what is still used."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError, TypeError):
        pass
