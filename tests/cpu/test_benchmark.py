"""The benchmark with a stand-in network and one round, in this process; processes are counted, not started."""
import pytest
import torch
from fakes import BrightSam

from medficient_mini.cpu import benchmark
from medficient_mini.inference.boxes import check_boxes


class Stub(BrightSam):
    """A BrightSam whose fast forms are itself, on an input of 64 pixels."""
    image_size, calibration = 64, None


@pytest.fixture
def started(monkeypatch):
    """The commands that the benchmark would have started."""
    commands = []

    def run_alone(*command):
        commands.append(command)
        return 1.25, 400.0 + 100 * len(commands)
    monkeypatch.setattr(benchmark, "run_alone", run_alone)
    monkeypatch.setattr(benchmark, "CASES", {"2D": (1, 60, 40, 4), "3D": (4, 32, 32, 6), "large": (1, 80, 80, 200)})
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    return commands


def test_forms_of_a_network(started, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "load_model", lambda weights: Stub())
    monkeypatch.setattr(benchmark, "to_fast", lambda model, precision: model)
    assert benchmark.main(["--infer"]) == 0
    out = capsys.readouterr().out
    assert "MedficientSAM-L0" in out and "int8" not in out                    # it has no activation ranges
    assert "(1.00 / 1.00)" in out                                             # plain against itself
    assert [command[0] for command in started] == [*["infer.py"] * 4, *["-c"] * 4]
    assert [command[3] for command in started[5:]] == ["", "f32", "bf16"]     # the large image
    assert "| 100 MB | 200 MB | 300 MB |" in out                              # above that of import torch


def test_table_5(started, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "PUBLISHED", {"lite_medsam": benchmark.PUBLISHED["lite_medsam"]})
    monkeypatch.setattr(benchmark, "multiply_adds", lambda model: 11.0)
    monkeypatch.setattr(benchmark, "atomic_torch_save", lambda content, path: None)
    benchmark.table_5(tmp_path)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LiteMedSAM"))
    assert row == "| LiteMedSAM | 256 | 9.79 | 11 (39.98) | 1.25 (5.1) | 1.25 (42.6) | 500 (–) | 600 (–) |"


def test_multiply_adds_are_half_of_torchs_count():
    model = Stub()
    model.image_encoder = lambda x: torch.ones(64, 64) @ torch.ones(64, 64)
    model.decode = lambda embedding, boxes: embedding
    assert benchmark.multiply_adds(model) == pytest.approx(64**3 / 1e9)


def test_a_process_reports_its_own_memory():
    took, peak = benchmark.run_alone("-c", "print(len(bytearray(60_000_000)))")
    assert took > 0 and 60 < peak < 150
    with pytest.raises(RuntimeError, match="ValueError: no"):
        benchmark.run_alone("-c", "raise ValueError('no')")


@pytest.mark.parametrize("case", ["2D", "3D", "large"])
def test_cases_have_their_objects(started, case):
    pixels, boxes = benchmark.draw_case(case)
    depth, height, width, count = benchmark.CASES[case]
    shape = (depth, height, width) if case == "3D" else (height, width)
    assert pixels.shape[:len(shape)] == shape and len(boxes) == count
    assert check_boxes(boxes, shape, case)[1] == []
    x0, y0 = boxes[-1, :2].astype(int)
    assert pixels[0, y0, x0] >= 120 if case == "3D" else (pixels[y0, x0] >= 120).all()
