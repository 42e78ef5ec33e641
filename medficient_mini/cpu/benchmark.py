"""Speed and memory on this machine, beside the published figures.

    python -m medficient_mini.cpu.benchmark              # Table 5: the five networks, random weights
    python -m medficient_mini.cpu.benchmark --infer      # the forms of one network: plain, f32, bf16, int8

Torch chooses the number of threads, or OMP_NUM_THREADS; --busy N keeps N cores busy meanwhile. As in infer.py an image
takes those that other programs leave free, a volume has a slice on each. The forms take turns, so that a busy spell
meets all alike. Their figures are minimum / median / maximum over the rounds: seconds of the plain network, and for the
others the ratio to it in the same round. Where the package openvino is installed, it computes the networks too, on all
threads, between the same lines of our own. Cold processes run infer.py, or the same with OpenVINO from converted files,
from Python's start to the written masks; MB are their largest resident size.
"""
import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from ..files import exit_status, option_parser
from ..inference.checkpoint import load_model, resolve
from ..inference.geometry import boxes_to_network, to_network
from ..inference.npz import read_case, write_segs
from ..inference.predictor import decode_boxes, segment_image
from ..inference.volume import segment_volume
from ..machine import Load
from ..nets.sam import NETWORKS, build_sam
from .fast import PRECISIONS, to_fast

# MedficientSAM, Tables 1 and 5, as the authors' README and flop_counter notebook (github.com/hieplpvip/medficientsam)
# repeat them, on an Intel Core i9-10900K: multiply-adds (G), 2D and 3D seconds, 2D and 3D megabytes. Their counter adds
# norms and interpolation, ours counts products alone; – was not found.
PUBLISHED = {
    "medsam_vit_b": (488.24, "–", "–", "–", "–"),
    "lite_medsam": (39.98, 5.1, 42.6, "–", "–"),
    "medficientsam_l0": (36.80, 0.9, 7.4, 448, 687),
    "medficientsam_l1": (51.05, 1.0, 9.0, 553, 793),
    "medficientsam_l2": (70.71, 1.1, 11.1, 663, 903),
}
INFER = "infer.py", "-i"                                                     # commands, before the case's path
COLD = "-c", "import sys; from medficient_mini.cpu.benchmark import segment_cold; segment_cold(*sys.argv[1:])"
DECODED = (1, 2, 4)                  # numbers of boxes that OpenVINO's decoders are made for: what the cases need
CASES = {"2D": (1, 2604, 1726, 4), "3D": (40, 512, 512, 6), "large": (1, 4000, 4000, 200)}   # D, H, W, boxes
ROUNDS, ROUNDS_3D = 7, 3             # of the forms' turns
BURN = """import os
parent = os.getppid()
while os.getppid() == parent:        # it ends with the benchmark, whatever ends that
    pass"""

# A process counts the memory of the one that started it as its own peak, so a small one stands between.
BETWEEN = """import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


def draw_case(name):
    """Draw a case of CASES: uint8 (H, W, 3) or (D, H, W), with a bright square in each of the boxes (N, 4 or 6)."""
    depth, height, width, count = CASES[name]
    pixels = np.random.default_rng(0).integers(20, 110, (height, width), np.uint8)
    columns = int(count**0.5) + 1                                             # the squares stand in a square grid
    side = min(height, width) // columns // 2
    corners = np.stack(np.divmod(np.arange(count), columns), axis=1) * 2 * side
    for x, y in corners:
        pixels[y:y + side, x:x + side] += 100
    boxes = np.hstack([corners, corners + side])
    if depth == 1:
        return np.dstack([pixels] * 3), boxes
    return np.stack([pixels] * depth), np.insert(boxes, [2, 4], [0, depth - 1], axis=1)


def run_cold(folder, case, command, *options):
    """Run a command in a new process on a case of CASES, written to `folder`: its seconds and peak memory in MB."""
    path, (pixels, boxes) = f"{folder}/{case}_CT_bench.npz", draw_case(case)
    np.savez_compressed(path, imgs=pixels, boxes=boxes, spacing=np.ones(3))
    done = subprocess.run([sys.executable, "-c", BETWEEN, sys.executable, *command, path, *map(str, options)],
                          cwd=Path(__file__).parents[2], check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6    # macOS counts bytes, Linux KiB


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def table_5(folder):
    """Print Table 5: each network with random weights in cold processes, the published figures in brackets.

    A multiply-add is half of what torch counts, of encoding an image and decoding one box.
    """
    from torch.utils.flop_counter import FlopCounterMode                      # late: it takes a second and 80 MB
    print_row("model", "input", "parameters, M", "multiply-adds, G", "2D, s", "3D, s", "2D, MB", "3D, MB")
    print_row(*["---"] * 8)
    for name, published in PUBLISHED.items():
        model, weights = build_sam(name).eval(), f"{folder}/{name}.pth"
        torch.save(model.state_dict(), weights)
        options = "-o", f"{folder}/masks", "--overwrite", "--weights", weights, "--propagation", "published"
        seconds, peaks = zip(*(run_cold(folder, case, INFER, *options) for case in ("2D", "3D")))
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.decode(model.image_encoder(torch.zeros(1, 3, model.image_size, model.image_size)), torch.ones(1, 4))
        ours = (counter.get_total_flops() / 2e9, *seconds, *peaks)
        print_row(NETWORKS[name].title, model.image_size, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
                  *(f"{own:.4g} ({theirs})" for own, theirs in zip(ours, published)))
    print("\nPublished: C++ and OpenVINO on an i9-10900K, other cases.")


@contextlib.contextmanager
def busy(count):
    """Let `count` processes burn a core each while the block runs."""
    loops = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def describe_machine(busy_loops, free):
    """Tell what the figures depend on: processor, threads, free ones, load, the versions of torch and OpenVINO."""
    with contextlib.suppress(OSError):
        print(Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t :"), end=", ")
    installed = importlib.util.find_spec("openvino")
    openvino = importlib.metadata.version("openvino") if installed else "not installed"
    print(f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"{free} of them free, load {os.getloadavg()[0]:.1f} and {busy_loops} busy loops, "
          f"torch {torch.__version__}, OpenVINO {openvino}\n")


class PromptedDecoder(nn.Module):
    """Prompt encoder and mask decoder of a Sam as one module of an embedding and boxes, for OpenVINO to convert."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embedding, boxes):
        return self.model.decode(embedding, boxes)


def export_openvino(model, x, folder):
    """Convert a Sam for OpenVINO and write it to the folder: the encoder of x (1, 3, S, S), a decoder for each count."""
    import openvino             # late: a process that has it and forks, as one that trains does, was seen to crash
    parts = {"encoder": (model.image_encoder, x)}
    for count in DECODED:
        parts[f"decoder_{count}"] = PromptedDecoder(model), (torch.zeros(1, 256, 64, 64), torch.ones(count, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                       # what torch's tracer has to say
        for part, (module, example) in parts.items():
            network = openvino.convert_model(module, example_input=example)
            openvino.save_model(network, f"{folder}/{part}.xml", compress_to_fp16=False)


class OpenVino(nn.Module):
    """A network that `export_openvino` wrote, with what inference asks of a Sam, on as many threads as torch has."""

    def __init__(self, name, folder, precision):
        super().__init__()
        import openvino
        self.name, self.image_size, self.resize = name, NETWORKS[name].image_size, NETWORKS[name].resize
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
        self.parts = {path.stem: openvino.compile_model(path, "CPU", settings) for path in Path(folder).glob("*.xml")}
        self.anchor = nn.Parameter(torch.zeros(0))                            # tells the device

    def run(self, part, *inputs):
        """Run one part; a request of its own, since slices come side by side."""
        found = self.parts[part].create_infer_request().infer([x.numpy() for x in inputs])
        return [torch.from_numpy(array) for array in found.values()]

    def image_encoder(self, x):
        return self.run("encoder", x)[0]                                      # (1, 256, 64, 64)

    def decode(self, embedding, boxes, **_):
        return self.run(f"decoder_{len(boxes)}", embedding, boxes)            # (N, 1, 256, 256), (N, 1)


def segment_cold(path, name, folder, precision):
    """Do what infer.py does with a case, by OpenVINO: the work of a process that is timed from its start."""
    case, model = read_case(path), OpenVino(name, folder, precision)
    segment = segment_volume if case.is_3d else segment_image
    write_segs(Path(folder, "masks.npz"), segment(model, case.pixels, case.boxes))


def print_times(label, forms, call, rounds=ROUNDS):
    """Print the seconds that call(form) takes for the first form, and of the others the ratio to it in each round."""
    times = np.zeros((rounds, len(forms)))
    for row in times:
        for i, form in enumerate(forms.values()):
            start = time.perf_counter()
            call(form)
            row[i] = time.perf_counter() - start
    times[:, 1:] /= times[:, :1]
    spreads = np.quantile(times, (0, 0.5, 1), axis=0).T                       # (forms, 3)
    print_row(label, *("{:.3f} / {:.3f} / {:.3f}".format(*spread) for spread in spreads))


@torch.inference_mode()
def compare_forms(weights, folder, free):
    """Print what every form of one network takes, warm in this process and in cold ones."""
    threads = torch.get_num_threads()
    plain = load_model(weights)
    forms, commands = {"plain": plain}, []
    for form in PRECISIONS[1:4 if plain.calibration else 3]:
        fast = to_fast(plain, form)
        if fast is not plain:                                                 # else something is lacking here
            forms[form] = fast
            commands.append((INFER, "-o", f"{folder}/masks", "--overwrite", "--weights", weights, "--precision", form))
    (image, boxes), volume = draw_case("2D"), draw_case("3D")
    prompts = boxes_to_network(boxes, *image.shape[:2], plain.image_size)
    x = to_network(image, plain.image_size, plain.resize)[None]
    if importlib.util.find_spec("openvino"):
        export_openvino(plain, x, folder)
        for precision in ("f32", "bf16"):
            if precision in forms:
                forms[f"OpenVINO {precision}"] = OpenVino(plain.name, folder, precision)
                commands.append((COLD, plain.name, folder, precision))
    torch.set_num_threads(free)
    print_row(f"{NETWORKS[plain.name].title}: plain in seconds, others as ratio", *forms)
    print_row(*["---"] * (len(forms) + 1))
    embedding, *_ = [form.image_encoder(x) for form in forms.values()]        # the first call packs the weights
    print_times("encoder", forms, lambda form: form.image_encoder(x))
    print_times("decoder, 1 box", forms, lambda form: decode_boxes(form, embedding, prompts[:1]))
    print_times("decoder, 4 boxes", forms, lambda form: decode_boxes(form, embedding, prompts))
    print_times("2D case, warm", forms, lambda form: segment_image(form, image, boxes))
    torch.set_num_threads(threads)
    print_times("3D case, warm", forms, lambda form: segment_volume(form, *volume), ROUNDS_3D)
    for case in CASES:
        cold = [run_cold(folder, case, *command) for command in commands]
        print_row(f"{case} case, cold", "–", *("{:.2f} s, {:.0f} MB".format(*found) for found in cold))


def benchmark(argv):
    """Print one of the two tables."""
    parser, add = option_parser(__doc__)
    add("--infer", False, "compare the forms of one network")
    add("--weights", str, "checkpoint for --infer (default: the package's own weights)")
    add("--busy", 0, "loops that burn a core each meanwhile", metavar="N")
    arguments = parser.parse_args(argv)
    cv2.setNumThreads(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder, busy(arguments.busy):
        load = Load()
        time.sleep(1)
        free = load.free_cores()
        describe_machine(arguments.busy, free)
        if arguments.infer:
            compare_forms(resolve(arguments.weights).resolve(), folder, free)
        else:
            table_5(folder)


def main(argv=None):
    """Run the command line; return 1, with a line on stderr, where it failed."""
    return exit_status(lambda: benchmark(argv))


if __name__ == "__main__":
    sys.exit(main())
