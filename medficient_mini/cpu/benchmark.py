"""Speed and memory on this machine, beside the published figures.

    python -m medficient_mini.cpu.benchmark                    # Table 5: the five networks
    python -m medficient_mini.cpu.benchmark --infer            # plain against fast, f32 against bf16 against int8

The 2D case has 2604×1726 pixels and four boxes, the 3D case 40×512×512 voxels and six; both are drawn here, so no data
are needed. Table 5 takes random weights (times hardly depend on them), `--infer` those of --weights. Forms that are
compared run in turn, in one process, and the median counts; memory is the largest resident size of a process of its own.
"""
import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..inference.checkpoint import load_model
from .fast import PRECISIONS, missing_operator, resolve_precision, to_fast
from ..nets.efficientvit import EfficientViTSam
from ..nets.sam import NETWORKS, build_sam
from ..inference.predictor import decode_boxes, segment_image
from ..inference.volume import segment_volume

# MedficientSAM, Tables 1 and 5, as the authors' README and flop_counter notebook (github.com/hieplpvip/medficientsam)
# repeat them, on an Intel Core i9-10900K: multiply-adds (G), 2D and 3D seconds, 2D and 3D megabytes. Their counter adds
# norms and interpolation, ours counts products alone. LiteMedSAM's seconds: see report.py. Of MedSAM's row only the
# multiply-adds were found, so the rest is left out.
PUBLISHED = {
    "medsam_vit_b": (488.24, None, None, None, None),
    "lite_medsam": (39.98, 5.1, 42.6, None, None),
    "medficientsam_l0": (36.80, 0.9, 7.4, 448, 687),
    "medficientsam_l1": (51.05, 1.0, 9.0, 553, 793),
    "medficientsam_l2": (70.71, 1.1, 11.1, 663, 903),
}
ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------- machine and cases

def machine() -> dict[str, str]:
    """The rows of the paper's Table 1, of this machine."""
    def from_file(path, start):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return None
        return next((line.split(start, 1)[1].strip(' \t:="') for line in lines if line.startswith(start)), None)

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "System": from_file("/etc/os-release", "PRETTY_NAME") or platform.platform(),
        "CPU": f"{from_file('/proc/cpuinfo', 'model name') or platform.processor()}, {os.cpu_count()} cores, "
               f"{torch.backends.cpu.get_cpu_capability()}, native bf16: {'yes' if resolve_precision() == 'bf16' else 'no'}",
        "RAM": f"{memory:.0f} GB",
        "GPU (number and type)": f"{torch.cuda.device_count()} {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "none used",
        "Programming language": f"Python {platform.python_version()}",
        "Deep learning framework": f"torch {torch.__version__}, torchvision {importlib.metadata.version('torchvision')}",
        "Threads": str(torch.get_num_threads()),
    }


def scene(depth: int, height: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(depth, height, width) uint8 with `count` bright ellipsoids on a soft background, and their boxes (count, 6)."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 12, (height, width)).astype(np.float32)
    background = cv2.resize(rng.uniform(20, 110, (8, 8)).astype(np.float32), (width, height)) + noise
    volume = np.repeat(background.clip(0, 255).astype(np.uint8)[None], depth, axis=0)
    boxes, radius_z = [], max(depth * 0.4, 0.5)
    for k in range(count):
        x, y = width * (k + 0.5) / count, height * rng.uniform(0.3, 0.7)
        rx, ry, middle = width / count * rng.uniform(0.2, 0.4), height * rng.uniform(0.1, 0.2), (depth - 1) / 2
        for z in range(depth):
            size = np.sqrt(max(0.0, 1 - ((z - middle) / radius_z) ** 2))
            if size > 0.2 or depth == 1:
                cv2.ellipse(volume[z], (int(x), int(y)), (int(rx * size), int(ry * size)), 0, 0, 360, 200 + 5 * k, -1)
        low, high = int(np.ceil(middle - 0.97 * radius_z)), int(middle + 0.97 * radius_z)
        boxes.append([x - rx, y - ry, max(low, 0), x + rx, y + ry, min(high, depth - 1)])
    return volume, np.array(boxes).round()


def case_2d() -> tuple[np.ndarray, np.ndarray]:
    volume, boxes = scene(1, 2604, 1726, 4)
    return np.repeat(volume[0][:, :, None], 3, axis=2), boxes[:, [0, 1, 3, 4]]


def case_3d() -> tuple[np.ndarray, np.ndarray]:
    return scene(40, 512, 512, 6)


# -------------------------------------------------------------------------------------------------------- measuring

def multiply_adds(model) -> tuple[float, float]:
    """Billions of multiply-adds of the image encoder, and of one box decoded."""
    counts = []
    with torch.inference_mode():
        x = torch.zeros(1, 3, model.image_size, model.image_size)
        for call in (lambda: model.image_encoder(x), lambda: model.decode(torch.zeros(1, 256, 64, 64), torch.ones(1, 4))):
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops() / 2e9)                    # torch counts both halves
    return tuple(counts)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, so a busy spell of the machine meets all alike."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


# A process counts the memory of the one that started it as its own peak, so a small one stands between.
BETWEEN = """import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


def run_alone(command: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a command. RuntimeError with its last line where it fails."""
    done = subprocess.run([sys.executable, "-c", BETWEEN, *command], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    *said, last = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} …: {(said or ['no message'])[-1]}")
    took, peak = last.split()
    return float(took), float(peak) * (1 if sys.platform == "darwin" else 1024) / 1e6


# ---------------------------------------------------------------------------------------------------------- Table 5

def child(name: str, precision: str) -> dict:
    """What Table 5 wants of one network, measured in this process."""
    torch.manual_seed(0)
    plain = build_sam(name).eval()
    result = {"parameters": sum(p.numel() for p in plain.parameters()) / 1e6}
    model = to_fast(plain, precision)
    del plain
    image, boxes = case_2d()
    segment_image(model, image, boxes)                                        # the first pass fills caches
    result["2d"], result["2d_mb"] = seconds(lambda: segment_image(model, image, boxes)), peak_mb()
    volume, boxes = case_3d()
    result["3d"] = seconds(lambda: segment_volume(model, volume, boxes, propagation="published"))
    result["3d_mb"] = peak_mb()
    return result


def table_5(names: list[str], precision: str, threads: int) -> None:
    rows = []
    for name in names:
        command = [sys.executable, "-m", __spec__.name, "--child", name, "--precision", precision, "--threads", str(threads)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: failed, see above", file=sys.stderr)
            continue
        found, published = json.loads(done.stdout.splitlines()[-1]), PUBLISHED[name]
        counts = sum(multiply_adds(build_sam(name).eval()))
        own = [(counts, "{:.2f}"), (found["2d"], "{:.2f}"), (found["3d"], "{:.1f}"), (found["2d_mb"], "{:.0f}"),
               (found["3d_mb"], "{:.0f}")]
        cells = [f"{form.format(value)} ({'–' if theirs is None else theirs})" for (value, form), theirs in zip(own, published)]
        size = NETWORKS[name].image_size
        rows.append([NETWORKS[name].title, f"{size}×{size}", f"{found['parameters']:.2f}", *cells])
    print_table(["model", "input", "parameters, M", "multiply-adds, G", "2D, s", "3D, s", "2D, MB", "3D, MB"], rows)
    print(f"\nThis machine, precision {precision} (published: C++ and OpenVINO on an i9-10900K, other cases; – not found).")


# ----------------------------------------------------------------------------------------------------------- --infer

def gemm_rate(dtype: torch.dtype) -> float:
    """Billions of multiply-adds per second of a 2048³ matrix product."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2.048**3 / min(seconds(lambda: a @ b) for _ in range(5))


def forms_of(model) -> dict:
    """{"plain": model, "f32": …, "bf16": …, "int8": …}, as far as this machine and these weights allow."""
    forms = {"plain": model}
    for precision in ("f32", "bf16", "int8"):
        calibrated = isinstance(model.image_encoder, EfficientViTSam) and getattr(model, "calibration", None)
        if missing_operator(precision) is None and (precision != "int8" or calibrated):
            forms[precision] = to_fast(model, precision)
    return forms


def infer_table(weights: str | None, rounds: int, threads: int) -> None:
    """Every form of one network, absolute and as a ratio to the plain model."""
    model = load_model(weights)
    forms = forms_of(model)
    x = torch.rand(1, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    side = model.image_size
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.9, 0.8], [0.5, 0.1, 0.8, 0.4], [0.2, 0.5, 0.5, 0.9]]) * side
    image, image_boxes = case_2d()
    volume, volume_boxes = case_3d()
    print_table([f"{NETWORKS[model.name].title}, seconds (ratio)", *forms], [])

    def measure(label, call, rounds=rounds, share=1):
        """Print one row, at once: the 3D case of the plain model takes a while."""
        times = {k: t / share for k, t in in_turn({k: lambda m=m: call(m) for k, m in forms.items()}, rounds).items()}
        print_row([label, *(f"{t:.3f} ({t / times['plain']:.2f})" for t in times.values())])
        return times
    with torch.inference_mode():
        embedding = model.image_encoder(x)
        encoder = measure("encoder", lambda m: m.image_encoder(x))
        measure("decoder, one box", lambda m: decode_boxes(m, embedding, boxes[:1]))
        measure("decoder, per box of four", lambda m: decode_boxes(m, embedding, boxes), share=4)
    rates, (count, _) = {"f32": gemm_rate(torch.float32)}, multiply_adds(model)
    if "bf16" in forms:
        rates["bf16"] = gemm_rate(torch.bfloat16)
    speed = [f"{count / encoder[k]:.0f}" + (f" ({count / encoder[k] / rates[kind]:.0%} of {rates[kind]:.0f})" if kind in rates else "")
             for k in forms for kind in ["f32" if k == "plain" else k]]
    print_row(["encoder, G multiply-adds/s (of a 2048³ product)", *speed])
    measure("2D case, warm", lambda m: segment_image(m, image, image_boxes))
    measure("3D case, warm", lambda m: segment_volume(m, volume, volume_boxes), rounds=1)
    measure("3D case, warm, published propagation", lambda m: segment_volume(m, volume, volume_boxes, propagation="published"),
            rounds=1)
    del model, forms
    processes(weights, [k for k in encoder if k != "plain"], threads)


def processes(weights: str | None, precisions: list[str], threads: int) -> None:
    """Cold processes: seconds and peak memory of infer.py on one case, per precision, beside importing torch."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (pixels, boxes) in {"2D_Mammography_bench.npz": case_2d(), "3D_CT_bench.npz": case_3d()}.items():
            path = Path(folder) / name
            np.savez_compressed(path, imgs=pixels, boxes=boxes.astype(np.int64), spacing=np.ones(3))
            measured = []
            for precision in precisions:
                command = [sys.executable, "infer.py", "-i", str(path), "-o", f"{folder}/{precision}", "--overwrite",
                           "--precision", precision, "--threads", str(threads), *(["--weights", weights] if weights else [])]
                measured.append("{:.2f} s, {:.0f} MB".format(*run_alone(command)))
            rows.append([f"infer.py, {name[:2]}, cold", *measured])
        rows.append(["python -c 'import torch'", "{:.2f} s, {:.0f} MB".format(*run_alone([sys.executable, "-c", "import torch"])),
                     *[""] * (len(precisions) - 1)])
    print()
    print_table(["process", *precisions], rows)


# -------------------------------------------------------------------------------------------------------------- main

def print_row(row: list[str]) -> None:
    print("| " + " | ".join(row) + " |", flush=True)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print_row(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infer", action="store_true", help="compare the forms of one network")
    parser.add_argument("--weights", help="checkpoint for --infer (default: the package's own weights)")
    parser.add_argument("--rounds", type=int, default=7, help="turns per measurement of --infer")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(PUBLISHED), help="rows of Table 5")
    parser.add_argument("--precision", choices=PRECISIONS[:3], default="auto", help="of Table 5's runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--child", choices=list(NETWORKS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    precision = resolve_precision(arguments.precision)
    if arguments.child:
        print(json.dumps(child(arguments.child, precision)))
        return 0
    print_table(["", "this machine"], [[key, value] for key, value in machine().items()])
    print()
    try:
        if arguments.infer:
            infer_table(arguments.weights, arguments.rounds, arguments.threads)
        else:
            table_5(arguments.networks, precision, arguments.threads)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
