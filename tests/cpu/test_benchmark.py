"""The benchmark with a stand-in network and one round, in this process; processes are counted, not started."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import BrightSam

from medficient_mini.cpu import benchmark
from medficient_mini.inference.boxes import check_boxes


class Stub(BrightSam):
    """A BrightSam whose fast forms are itself, on an input of 64 pixels."""
    image_size, calibration = 64, None

    def image_encoder(self, x):
        return super().image_encoder(x @ torch.ones(64, 64)) / 64             # some operations to count


@pytest.fixture
def started(monkeypatch):
    """The commands that the benchmark would have started."""
    commands = []

    def run(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout=f"words 1.25 {400_000 + 100_000 * len(commands)}")
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(benchmark, "CASES", {"2D": (1, 60, 40, 4), "3D": (4, 32, 32, 6), "large": (1, 80, 80, 200)})
    monkeypatch.setattr(benchmark.sys, "platform", "linux")
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)            # as without OpenVINO
    return commands


def test_forms_of_a_network(started, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "load_model", lambda weights: Stub())
    monkeypatch.setattr(benchmark, "to_fast", lambda model, precision: Stub())
    benchmark.main(["--infer"])
    rows = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "int8" not in rows["| MedficientSAM-L0: plain in seconds, others as ratio"]       # no activation ranges
    assert all(len(rows[f"| {name}"].split("/")) == 7 for name in ("encoder", "decoder, 1 box", "3D case, warm"))
    assert rows["| large case, cold"] == "| large case, cold | – | 1.25 s, 922 MB | 1.25 s, 1024 MB |"
    assert len(started) == 6 and [command[-1] for command in started] == ["f32", "bf16"] * 3
    assert all(Path(command[6]).name.endswith("_CT_bench.npz") for command in started)


def test_ratios_are_those_within_a_round(monkeypatch, capsys):
    ends = iter([0, 2, 2, 3, 10, 14, 14, 15])                                 # 2 and 1 s, then 4 and 1 s
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(ends))
    benchmark.print_times("row", {"plain": 1, "fast": 2}, lambda form: None, 2)
    assert capsys.readouterr().out == "| row | 2.000 / 3.000 / 4.000 | 0.250 / 0.375 / 0.500 |\n"


def test_busy_loops_end_with_the_block(monkeypatch):
    loops, start = [], subprocess.Popen
    monkeypatch.setattr(benchmark.subprocess, "Popen", lambda command: loops.append(start(command)) or loops[-1])
    with pytest.raises(KeyError), benchmark.busy(1):
        assert loops[0].poll() is None
        raise KeyError
    assert loops[0].returncode is not None


OPENVINO = """import sys
import numpy as np
import torch
from fakes import BrightSam
from medficient_mini.cpu import benchmark
from medficient_mini.inference.predictor import segment_image
encode = BrightSam.image_encoder
del BrightSam.image_encoder                # OpenVINO converts modules alone
folder, model = sys.argv[1], BrightSam()
model.image_encoder = type("Encoder", (torch.nn.Module,), {"forward": lambda self, x: encode(model, x)})()
with torch.inference_mode():
    benchmark.export_openvino(model, torch.rand(1, 3, 512, 512), folder)
(image, boxes), name = benchmark.draw_case("2D"), model.name
np.savez(f"{folder}/2D_CT_a.npz", imgs=image, boxes=boxes)
benchmark.segment_cold(f"{folder}/2D_CT_a.npz", name, folder, "f32")
assert np.mean(np.load(f"{folder}/masks.npz")["segs"] != segment_image(model, image, boxes)) < 1e-4"""


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_computes_the_same(tmp_path):
    """In a process of its own: with OpenVINO in this one the tests that fork crashed."""
    paths = [str(Path(benchmark.__file__).parents[2]), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", OPENVINO, tmp_path], check=True, env=environment)


def test_table_5(started, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "PUBLISHED", {"lite_medsam": benchmark.PUBLISHED["lite_medsam"]})
    monkeypatch.setattr(benchmark, "build_sam", lambda name: Stub())
    benchmark.table_5(tmp_path)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LiteMedSAM"))
    adds = 3 * 64**3 / 1e9                                                    # half of what torch counts
    assert row == f"| LiteMedSAM | 64 | 0.00 | {adds:.4g} (39.98) | 1.25 (5.1) | 1.25 (42.6) | 512 (–) | 614.4 (–) |"


def test_a_process_that_fails_ends_the_benchmark(tmp_path, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(benchmark, "CASES", {"2D": (1, 60, 40, 4)})
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **options: run(["false"], **options))
    with pytest.raises(subprocess.CalledProcessError):
        benchmark.run_cold(tmp_path, "2D", benchmark.INFER)


def test_the_process_between_reports_the_other_ones_memory():
    command = [sys.executable, "-c", benchmark.BETWEEN, sys.executable, "-c", "print(len(bytearray(60_000_000)))"]
    seconds, peak = map(float, subprocess.run(command, capture_output=True, text=True).stdout.split()[-2:])
    assert seconds > 0 and 60e6 < peak * (1 if sys.platform == "darwin" else 1024) < 150e6


@pytest.mark.parametrize("case", ["2D", "3D", "large"])
def test_cases_have_their_objects(started, case):
    pixels, boxes = benchmark.draw_case(case)
    depth, height, width, count = benchmark.CASES[case]
    shape = (depth, height, width) if case == "3D" else (height, width)
    assert pixels.shape[:len(shape)] == shape and len(boxes) == count
    assert check_boxes(boxes, shape, case)[1] == []
    x0, y0 = boxes[-1, :2].astype(int)
    assert pixels[0, y0, x0] >= 120 if case == "3D" else (pixels[y0, x0] >= 120).all()
