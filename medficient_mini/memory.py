"""Two hints to glibc's allocator; other C libraries do without."""
import ctypes


def keep_memory() -> None:
    """For training: keep freed memory. Handing large buffers back and faulting them in again costs a CPU step 15 %."""
    for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        _glibc("mallopt", option, value)


def return_memory() -> None:
    """After loading weights: hand freed memory back, which lies between what is still used (150 to 200 MB)."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError, TypeError):
        pass
