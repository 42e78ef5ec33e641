"""The benchmark with a stand-in network and one round, in this process; processes are counted, not started."""
import pytest
import torch
from fakes import BrightSam

from medficient_mini.cpu import benchmark


class Stub(BrightSam):
    """A BrightSam whose fast forms are itself, on an input of 64 pixels."""
    image_size, calibration = 64, None


@pytest.fixture
def started(monkeypatch):
    """The commands that the benchmark would have started."""
    commands = []

    def run_alone(*command):
        commands.append(command)
        return "note\n1.25", 2.5, 400.0 + 100 * len(commands)
    monkeypatch.setattr(benchmark, "run_alone", run_alone)
    monkeypatch.setattr(benchmark, "CASES", {"2D": (1, 60, 40, 4), "3D": (4, 32, 32, 6), "large": (1, 80, 80, 200)})
    monkeypatch.setattr(benchmark, "multiply_adds", lambda model: (10.0, 1.0))
    benchmark.draw_case.cache_clear()
    yield commands
    benchmark.draw_case.cache_clear()


def test_forms_of_a_network(started, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "load_model", lambda weights: Stub())
    monkeypatch.setattr(benchmark, "to_fast", lambda model, precision: model)
    monkeypatch.setattr(benchmark, "missing_operator", lambda precision: None)
    monkeypatch.setattr(benchmark, "PRODUCT_SIDE", 16)
    assert benchmark.main(["--infer", "--rounds", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "MedficientSAM-L0" in out and "int8" not in out                    # it has no activation ranges
    assert "(1.00 / 1.00)" in out                                             # plain against itself
    assert [command[0] for command in started] == ["-c", *["infer.py"] * 4, *["-m"] * 3]
    assert "| 500 MB | 600 MB | 700 MB |" in out                              # above the 500 MB of import torch


def test_table_5(started, capsys):
    with torch.device("meta"):
        benchmark.table_5(["lite_medsam"], "f32", 1)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LiteMedSAM"))
    assert row == "| LiteMedSAM | 256 | 9.79 | 11.00 (39.98) | 1.25 (5.1) | 1.2 (42.6) | 500 (–) | 600 (–) |"


def test_a_process_reports_its_own_memory():
    said, took, peak = benchmark.run_alone("-c", "x = bytearray(60_000_000); print(len(x))")
    assert said == "60000000" and took > 0 and 60 < peak < 150
    with pytest.raises(RuntimeError, match="ValueError: no"):
        benchmark.run_alone("-c", "raise ValueError('no')")


@pytest.mark.parametrize("case", ["2D", "3D", "large"])
def test_cases_have_their_objects(started, case):
    pixels, boxes = benchmark.draw_case(case)
    depth, height, width, count = benchmark.CASES[case]
    assert pixels.shape == ((depth, height, width) if case == "3D" else (height, width, 3)) and len(boxes) == count
    half = boxes.shape[1] // 2
    assert (boxes[:, :half] <= boxes[:, half:]).all() and boxes.min() >= 0
    assert boxes[:, half].max() < width and boxes[:, half + 1].max() < height
