"""Speed and memory on this machine, beside the published figures.

    python -m medficient_mini.cpu.benchmark              # Table 5: the five networks, random weights
    python -m medficient_mini.cpu.benchmark --infer      # the forms of one network: plain, f32, bf16, int8

The 2D case has 2604×1726 pixels and four boxes, the 3D case 40×512×512 voxels and six, the large one 4000×4000 pixels
and 200; all are drawn here. Forms that are compared take turns, so that a busy spell of the machine meets all alike;
minimum and median are given. Memory is the largest resident size of a process of its own.
"""
import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..inference.checkpoint import load_model, resolve
from ..inference.predictor import decode_boxes, segment_image
from ..inference.volume import segment_volume
from ..machine import native_bf16
from ..nets.sam import NETWORKS, build_sam
from .fast import PRECISIONS, missing_operator, resolve_precision, to_fast

# MedficientSAM, Tables 1 and 5, as the authors' README and flop_counter notebook (github.com/hieplpvip/medficientsam)
# repeat them, on an Intel Core i9-10900K: multiply-adds (G), 2D and 3D seconds, 2D and 3D megabytes. Their counter adds
# norms and interpolation, ours counts products alone. Of MedSAM's row only the multiply-adds were found.
PUBLISHED = {
    "medsam_vit_b": (488.24, "–", "–", "–", "–"),
    "lite_medsam": (39.98, 5.1, 42.6, "–", "–"),
    "medficientsam_l0": (36.80, 0.9, 7.4, 448, 687),
    "medficientsam_l1": (51.05, 1.0, 9.0, 553, 793),
    "medficientsam_l2": (70.71, 1.1, 11.1, 663, 903),
}
CASES = {"2D": (1, 2604, 1726, 4), "3D": (40, 512, 512, 6), "large": (1, 4000, 4000, 200)}   # D, H, W, boxes
PRODUCT_SIDE = 2048                  # of a square matrix product, to compare the encoder's speed with
MODULE, ROOT = "medficient_mini.cpu.benchmark", Path(__file__).resolve().parents[2]

# A process counts the memory of the one that started it as its own peak, so a small one stands between.
BETWEEN = """import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


@cache
def draw_case(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A case of CASES: image uint8 (H, W, 3) or volume (D, H, W) with an ellipse in each box, boxes (N, 4) or (N, 6)."""
    depth, height, width, count = CASES[name]
    pixels = np.random.default_rng(0).integers(20, 110, (height, width), np.uint8)
    side = math.ceil(count**0.5)                                              # the objects stand in a square grid
    step_x, step_y = width // side, height // side
    corners = np.array([(k % side * step_x, k // side * step_y, 0) for k in range(count)])
    boxes = np.hstack([corners, corners + (step_x // 2, step_y // 2, depth - 1)])
    for x0, y0, _, x1, y1, _ in boxes.tolist():
        cv2.ellipse(pixels, ((x0 + x1) // 2, (y0 + y1) // 2), (step_x // 4, step_y // 4), 0, 0, 360, 220, -1)
    if name == "3D":
        return np.repeat(pixels[None], depth, axis=0), boxes
    return np.repeat(pixels[..., None], 3, axis=2), boxes[:, [0, 1, 3, 4]]


def segment(model, name: str, **options) -> None:
    """Segment a case of CASES; `options` of segment_volume."""
    (segment_volume if name == "3D" else segment_image)(model, *draw_case(name), **options)


def in_turn(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, the calls taking turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def run_alone(*command: str) -> tuple[str, float, float]:
    """Run `python COMMAND` in a new process: its output, seconds and peak in MB. RuntimeError where it fails."""
    done = subprocess.run([sys.executable, "-c", BETWEEN, sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    *said, last = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} …: {(said or ['no message'])[-1]}")
    took, peak = map(float, last.split())
    return "\n".join(said), took, peak * (1 if sys.platform == "darwin" else 1024) / 1e6


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


def print_row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def child(network: str, precision: str, case: str) -> None:
    """In a process of its own: print the seconds of a case, warm. `network`: of NETWORKS (random weights), or a file."""
    torch.manual_seed(0)
    model = build_sam(network).eval() if network in NETWORKS else load_model(network)
    model = model if precision == "plain" else to_fast(model, precision)
    options = {"propagation": "published"} if case == "3D" else {}
    times = in_turn({case: lambda: segment(model, case, **options)}, 1 if case == "large" else 2)[case]
    print(times[-1])                                                          # the first round fills caches


def table_5(names: list[str], precision: str, threads: int) -> None:
    """The rows of Table 5 for these networks, each figure with the published one in brackets."""
    head = ("model", "input", "parameters, M", "multiply-adds, G", "2D, s", "3D, s", "2D, MB", "3D, MB")
    print_row(*head)
    print_row(*["---"] * len(head))
    for name in names:
        model, found = build_sam(name).eval(), []
        for case in ("2D", "3D"):
            said, _, peak = run_alone("-m", MODULE, "--child", name, precision, case, "--threads", str(threads))
            found.append((float(said.splitlines()[-1]), peak))
        (image_s, image_mb), (volume_s, volume_mb) = found
        own = (f"{sum(multiply_adds(model)):.2f}", f"{image_s:.2f}", f"{volume_s:.1f}", f"{image_mb:.0f}", f"{volume_mb:.0f}")
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print_row(NETWORKS[name].title, model.image_size, f"{parameters:.2f}",
                  *(f"{value} ({published})" for value, published in zip(own, PUBLISHED[name])))
    print(f"\nThis machine, precision {precision} (published: C++ and OpenVINO on an i9-10900K, other cases; – not found).")


def infer_table(weights: str | None, rounds: int) -> list[str]:
    """Every form of one network, seconds and ratio to the plain one, minimum / median; returns the forms' names."""
    model = load_model(weights)
    forms = {"plain": model}
    for precision in PRECISIONS[1:]:
        if missing_operator(precision) is None and (precision != "int8" or model.calibration):
            forms[precision] = to_fast(model, precision)
    print_row(f"{NETWORKS[model.name].title}, minimum / median seconds (ratio to plain)", *forms)
    print_row(*["---"] * (len(forms) + 1))

    def measure(label, call, rounds=rounds):
        times = in_turn({name: lambda form=form: call(form) for name, form in forms.items()}, rounds)
        low, middle = ({k: f(v) for k, v in times.items()} for f in (min, statistics.median))
        print_row(label, *(f"{low[k]:.3f} / {middle[k]:.3f} ({low[k] / low['plain']:.2f} / {middle[k] / middle['plain']:.2f})"
                           for k in forms))
        return low

    x = torch.rand(1, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.9, 0.8], [0.5, 0.1, 0.8, 0.4], [0.2, 0.5, 0.5, 0.9]])
    with torch.inference_mode():
        embedding = model.image_encoder(x)
        encoder = measure("encoder", lambda form: form.image_encoder(x))
        measure("decoder, one box", lambda form: decode_boxes(form, embedding, boxes[:1] * model.image_size))
        measure("decoder, four boxes", lambda form: decode_boxes(form, embedding, boxes * model.image_size))
    product = {}
    for name, dtype in {"f32": torch.float32, "bf16": torch.bfloat16}.items():
        a = torch.rand(PRODUCT_SIDE, PRODUCT_SIDE).to(dtype)
        product[name] = PRODUCT_SIDE**3 / 1e9 / min(in_turn({name: lambda: a @ a}, 5)[name])
    count = multiply_adds(model)[0]
    print_row("encoder, G multiply-adds/s", *(f"{count / encoder[name]:.0f}" for name in forms))
    print_row("a large matrix product, the same", *(f"{product[name]:.0f}" if name in product else "–" for name in forms))
    measure("2D case, warm", lambda form: segment(form, "2D"))
    measure("3D case, warm", lambda form: segment(form, "3D"), 1)
    measure("3D case, warm, published propagation", lambda form: segment(form, "3D", propagation="published"), 1)
    return list(forms)


def processes(weights: str, forms: list[str], threads: int) -> None:
    """New processes: infer.py on a 2D and a 3D case, and the memory that the large case takes above `import torch`."""
    _, took, base = run_alone("-c", "import torch")
    print_row("process", *forms)
    print_row(*["---"] * (len(forms) + 1))
    print_row("import torch", f"{took:.2f} s, {base:.0f} MB", *[""] * (len(forms) - 1))
    with tempfile.TemporaryDirectory() as folder:
        for case, modality in {"2D": "Mammography", "3D": "CT"}.items():
            path, (pixels, boxes), cells = f"{folder}/{case}_{modality}_bench.npz", draw_case(case), []
            np.savez_compressed(path, imgs=pixels, boxes=boxes, spacing=np.ones(3))
            for name in forms[1:]:
                _, took, peak = run_alone("infer.py", "-i", path, "-o", f"{folder}/{name}", "--weights", weights,
                                          "--precision", name, "--threads", str(threads))
                cells.append(f"{took:.2f} s, {peak:.0f} MB")
            print_row(f"infer.py, {case} case, cold", "", *cells)
    large = [run_alone("-m", MODULE, "--child", weights, name, "large", "--threads", str(threads))[2] for name in forms]
    print_row("4000×4000 pixels, 200 boxes, above import torch", *(f"{peak - base:.0f} MB" for peak in large))


def main(argv: list[str] | None = None) -> int:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infer", action="store_true", help="compare the forms of one network")
    parser.add_argument("--weights", help="checkpoint for --infer (default: the package's own weights)")
    parser.add_argument("--rounds", type=int, default=7, help="turns per measurement of --infer")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(PUBLISHED), help="rows of Table 5")
    parser.add_argument("--precision", choices=PRECISIONS[:3], default="auto", help="of Table 5's runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    if arguments.child:
        child(*arguments.child)
        return 0
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, "
          f"{torch.backends.cpu.get_cpu_capability()}, native bf16: {native_bf16()}, {arguments.threads} threads\n")
    if arguments.infer:
        forms = infer_table(arguments.weights, arguments.rounds)
        processes(str(resolve(arguments.weights)), forms, arguments.threads)
    else:
        table_5(arguments.networks, resolve_precision(arguments.precision), arguments.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
