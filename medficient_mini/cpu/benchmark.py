"""Speed and memory on this machine, beside the published figures.

    python -m medficient_mini.cpu.benchmark              # Table 5: the five networks, random weights
    python -m medficient_mini.cpu.benchmark --infer      # the forms of one network: plain, f32, bf16, int8

Torch chooses the number of threads, or OMP_NUM_THREADS. The forms of a network take turns, so that a busy spell of the
machine meets all alike. Cold processes run infer.py, from the start of Python to the written masks; their memory is
their largest resident size.
"""
import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from ..inference.checkpoint import atomic_torch_save, load_model, resolve
from ..inference.geometry import boxes_to_network
from ..inference.predictor import decode_boxes, encode, segment_image
from ..inference.volume import segment_volume
from ..nets.sam import NETWORKS, build_sam
from .fast import PRECISIONS, to_fast

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
ROUNDS = 7                           # of the forms' turns; 3D cases take one

# A process counts the memory of the one that started it as its own peak, so a small one stands between.
BETWEEN = """import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""
LARGE = """import os, sys
from medficient_mini.cpu.benchmark import draw_case, load_model, segment_image
segment_image(load_model(sys.argv[1], precision=sys.argv[2] or None), *draw_case("large"))
os._exit(0)"""


def draw_case(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a case of CASES: uint8 (H, W, 3) or (D, H, W), with a bright square in each of the boxes (N, 4 or 6)."""
    depth, height, width, count = CASES[name]
    pixels = np.random.default_rng(0).integers(20, 110, (height, width), np.uint8)
    side = math.ceil(count**0.5)                                              # the squares stand in a square grid
    step = min(height, width) // side
    y, x = np.divmod(np.arange(count), side)
    boxes = np.stack([x, y, 0 * x, x + 0.5, y + 0.5, 0 * x], axis=1) * step + (0, 0, 0, 0, 0, depth - 1)
    for x0, y0, _, x1, y1, _ in boxes.astype(int):
        pixels[y0:y1, x0:x1] += 100
    if name == "3D":
        return np.repeat(pixels[None], depth, axis=0), boxes
    return np.repeat(pixels[..., None], 3, axis=2), boxes[:, [0, 1, 3, 4]]


def multiply_adds(model) -> float:
    """Count the multiply-adds, in billions, of encoding an image and decoding one box."""
    from torch.utils.flop_counter import FlopCounterMode                      # late: it takes a second and 80 MB
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.decode(model.image_encoder(torch.zeros(1, 3, model.image_size, model.image_size)), torch.ones(1, 4))
    return counter.get_total_flops() / 2e9                                    # torch counts both halves


def run_alone(*command: str) -> tuple[float, float]:
    """Run `python COMMAND` in a new process and give its seconds and its peak memory in MB.

    RuntimeError, with the last line that it wrote, where it fails.
    """
    done = subprocess.run([sys.executable, "-c", BETWEEN, sys.executable, *command], text=True, capture_output=True,
                          cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6    # macOS counts bytes, Linux KiB


def run_cold(folder: str, case: str, *options: str) -> tuple[float, float]:
    """Run infer.py in a new process on a case of CASES, which is written to `folder`: seconds and peak in MB."""
    path, (pixels, boxes) = f"{folder}/{case}_CT_bench.npz", draw_case(case)
    np.savez_compressed(path, imgs=pixels, boxes=boxes, spacing=np.ones(3))
    return run_alone("infer.py", "-i", path, "-o", f"{folder}/masks", "--overwrite", *options)


def print_row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(*cells) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))


def table_5(folder: str) -> None:
    """Print Table 5: each network with random weights in cold processes, the published figures in brackets."""
    print_head("model", "input", "parameters, M", "multiply-adds, G", "2D, s", "3D, s", "2D, MB", "3D, MB")
    for name, published in PUBLISHED.items():
        model, weights = build_sam(name).eval(), f"{folder}/{name}.pth"
        atomic_torch_save({"network": name, "model": model.state_dict()}, weights)
        options = ("--weights", weights, "--propagation", "published")
        seconds, peaks = zip(run_cold(folder, "2D", *options), run_cold(folder, "3D", *options))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        ours = (multiply_adds(model), *seconds, *peaks)
        print_row(NETWORKS[name].title, model.image_size, f"{parameters:.2f}",
                  *(f"{own:.4g} ({theirs})" for own, theirs in zip(ours, published)))
    print("\nPublished: C++ and OpenVINO on an i9-10900K, other cases; – not found.")


def print_times(label: str, forms: dict, call, rounds: int = ROUNDS) -> None:
    """Print the seconds that call(form) takes, minimum / median of the rounds, and their ratios to plain."""
    times = np.zeros((len(forms), rounds))
    for turn in range(rounds):
        for i, form in enumerate(forms.values()):
            start = time.perf_counter()
            call(form)
            times[i, turn] = time.perf_counter() - start
    figures = np.stack([times.min(1), np.median(times, 1)], axis=1)           # (forms, 2), plain first
    print_row(label, *("{:.3f} / {:.3f} ({:.2f} / {:.2f})".format(*found, *found / figures[0]) for found in figures))


def compare_forms(weights: Path, folder: str) -> None:
    """Print what every form of one network takes: warm in this process, cold, and the memory of the large case."""
    plain = load_model(weights)
    forms = {"plain": plain}
    for precision in PRECISIONS[1:] if plain.calibration else PRECISIONS[1:3]:
        forms[precision] = to_fast(plain, precision)
    print_head(f"{NETWORKS[plain.name].title}, minimum / median seconds (ratio to plain)", *forms)
    image, boxes = draw_case("2D")
    prompts = boxes_to_network(boxes, *image.shape[:2], plain.image_size)
    embedding = encode(plain, image)
    print_times("encoder", forms, lambda form: encode(form, image))
    for count in (1, 4):
        print_times(f"decoder, {count} at once", forms, lambda form: decode_boxes(form, embedding, prompts[:count]))
    print_times("2D case, warm", forms, lambda form: segment_image(form, image, boxes))
    volume = draw_case("3D")
    print_times("3D case, warm", forms, lambda form: segment_volume(form, *volume), rounds=1)
    for case in ("2D", "3D"):
        cold = [run_cold(folder, case, "--weights", str(weights), "--precision", form) for form in list(forms)[1:]]
        print_row(f"{case} case, cold", "–", *("{:.2f} s, {:.0f} MB".format(*found) for found in cold))
    base = run_alone("-c", "import os, torch; os._exit(0)")[1]                # its end touches 130 MB of libraries
    peaks = [run_alone("-c", LARGE, str(weights), form.replace("plain", ""))[1] for form in forms]
    print_row("4000×4000 pixels, 200 boxes, above import torch", *(f"{peak - base:.0f} MB" for peak in peaks))


def main(argv: list[str] | None = None) -> int:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infer", action="store_true", help="compare the forms of one network")
    parser.add_argument("--weights", help="checkpoint for --infer (default: the package's own weights)")
    arguments = parser.parse_args(argv)
    cv2.setNumThreads(torch.get_num_threads())
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.infer:
            compare_forms(resolve(arguments.weights).resolve(), folder)
        else:
            table_5(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
