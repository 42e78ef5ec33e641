"""Work side by side, in order; and the cores that other programs leave."""
import threading
import time

import pytest
import torch

from medficient_mini import machine


def test_ahead_keeps_the_order_and_its_distance():
    """Six pieces on two workers: results in order, never more than two beyond the one that is looked at."""
    begun, before = [], torch.get_num_threads()

    def work(k):
        begun.append(k)
        time.sleep(0.01 * (k % 2))
        if k == 3:
            raise ValueError("three")
        return k, torch.get_num_threads(), threading.get_ident()

    results = []
    for (k,), future in machine.ahead(work, [(k,) for k in range(6)], 2):
        assert len(begun) <= k + 3
        if k == 3:
            with pytest.raises(ValueError, match="three"):
                future.result()
        else:
            results.append(future.result())
    assert [k for k, *_ in results] == [0, 1, 2, 4, 5]
    assert {threads for _, threads, _ in results} == {max(1, before // 2)} and len({who for *_, who in results}) == 2
    assert torch.get_num_threads() == before
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.ones(9).sum() and torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [before]                                                   # threads of other programs' own too


@pytest.mark.parametrize("taken, free", [(0.0, 4), (0.4, 4), (1.0, 3), (2.2, 2), (9.0, 1)])
def test_free_cores(taken, free, monkeypatch):
    """In two seconds other programs worked `taken` seconds on each of so many cores."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    clock = iter([(10.0, 50.0), (12.0, 50.0 + 2 * taken)])
    monkeypatch.setattr(machine.Load, "seconds", lambda self: next(clock))
    assert machine.Load().free_cores() == free


def test_what_others_worked_is_read_from_linux(monkeypatch):
    """User, system, interrupts and what the host took count; nice'd programs, waiting and this process do not."""
    monkeypatch.setattr(machine.Path, "exists", lambda self: str(self) == "/proc/stat")
    monkeypatch.setattr(machine.Path, "read_text", lambda self: "cpu  1000 7000 200 90000 500 30 4 5 0 0\ncpu0 1 2")
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(machine.time, "process_time", lambda: 2.0)
    assert machine.Load().seconds()[1] == pytest.approx(10 + 2 + 0.3 + 0.04 + 0.05 - 2.0)
