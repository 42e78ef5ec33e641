"""Challenge cases (NPZ with `imgs` and `boxes`) in, masks (NPZ with `segs`) out; or your own pictures and NIfTI volumes.

    python infer.py -i cases -o out                          # every NPZ of a folder
    python infer.py -i case.npz -o out --overlay pictures    # one case, with a picture
    python infer.py -i cases -o out --part 2/8               # the second of eight jobs
    python infer.py -i photo.png -o out --box 30 40 200 180  # a picture: mask picture, overlay and NPZ
    python infer.py -i ct.nii.gz -o out --box 30 40 10 200 180 25 --window soft-tissue
    python infer.py -i photo.png -o out --pick               # draw the boxes in a window
"""
import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import torch

from medficient_mini.inference.npz import first_line, list_cases, read_case, write_segs
from medficient_mini.inference.checkpoint import load_model
from medficient_mini.show.draw import contact_sheet, overlay, save_png
from medficient_mini.cpu.fast import PRECISIONS, resolve_precision, to_fast
from medficient_mini.userfiles.formats import stem_of
from medficient_mini.machine import return_memory
from medficient_mini.userfiles.pick import pick, require_display
from medficient_mini.show.progress import progress
from medficient_mini.userfiles.prompts import (add_prompt_options, draw_points, list_user_files, prompts_of, read_user_case,
                                     segment_points, write_user_case)
from medficient_mini.inference.predictor import segment_image
from medficient_mini.inference.volume import OVERLAPS, PROPAGATIONS, segment_volume


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, help="folder of NPZ cases, pictures or NIfTI files, or one of these")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the masks")
    parser.add_argument("--weights", help="checkpoint file, or lite_medsam (default: the package's own weights)")
    parser.add_argument("--decoder-weights", help="checkpoint whose prompt encoder and mask decoder complete a bare encoder")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="auto: bf16 where the CPU has it, else f32; int8 needs a file of medficient_mini.cpu.quantize")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--overlay", type=Path, metavar="DIR", help="also write a picture of each case there")
    parser.add_argument("--overwrite", action="store_true", help="compute finished cases again")
    parser.add_argument("--part", metavar="K/N", help="every N-th case from the K-th (torchrun: taken from its rank)")
    parser.add_argument("--propagation", choices=PROPAGATIONS, default="sections", help="volumes: prompt every slice "
                        "with a section of the given box (default), or the middle one and follow the masks as published")
    parser.add_argument("--overlap", choices=OVERLAPS, default="higher", help="volumes: a voxel claimed by several boxes "
                        "goes to the higher logit (default), or to the later box, as with --propagation published always")
    parser.add_argument("--cache-mb", type=float, default=1024, help="embeddings kept by --propagation published, in MB")
    parser.add_argument("--z-exclusive", action="store_true",
                        help="z_max of a volume's box is the slice after the last (the MedficientSAM authors' reading)")
    add_prompt_options(parser)
    return parser.parse_args()


def part_of(argument: str | None) -> tuple[int, int]:
    """(k, n) counted from 0: this process takes cases k, k + n, … ValueError for anything but 1/3, 2/3, 3/3."""
    if argument is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        k, n = (int(x) for x in argument.split("/"))
    except ValueError:
        k, n = 0, 0
    if not 1 <= k <= n:
        raise ValueError(f"--part: expected K/N with 1 <= K <= N, found {argument}")
    return k - 1, n


def list_inputs(arguments, prompts) -> list[Path]:
    """NPZ cases, or the user's own files where there are prompts for them, but nothing out of the output folder.

    ValueError where an output would replace an input or two inputs would share an output.
    """
    source, output = Path(arguments.input), arguments.output.resolve()
    try:
        paths = list_user_files(source, prompts) if prompts.given else list_cases(source)
    except ValueError as error:
        hint = "" if prompts.given else " (pictures and volumes need --box, --boxes, --point or --pick)"
        raise ValueError(f"{error}{hint}") from None
    if output == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(f"{arguments.output}: expected another folder for the masks than that of the cases")
    for folder in (output, (arguments.overlay or output).resolve()):
        if source.resolve() in folder.parents:                  # results of an earlier run are no input of this one
            paths = [path for path in paths if folder not in path.resolve().parents]
    first = {}
    for path in paths:
        other = first.setdefault(stem_of(path), path)
        if other != path:
            raise ValueError(f"{source}: expected file names that differ, found {other} and {path}")
    return paths


def segment(model, case, arguments):
    """Labels of one case; None where the user left the window of --pick."""
    if arguments.pick:
        return pick(model, case, **volume_options(arguments))
    if case.points is not None:
        return segment_points(model, case)
    if case.is_3d:
        return segment_volume(model, case.volume, case.boxes, case.start, **volume_options(arguments))
    return segment_image(model, case.image, case.boxes)


def volume_options(arguments):
    return dict(propagation=arguments.propagation, overlap=arguments.overlap, cache_mb=arguments.cache_mb)


def draw(case, segs):
    """The picture of a case with its masks."""
    picture = contact_sheet(case.volume, segs, case.boxes) if case.is_3d else overlay(case.image, segs, case.boxes)
    if case.points is not None:
        draw_points(picture, case)
    return picture


def load(arguments):
    """The network in its form for inference: the fast one on a CPU."""
    model = load_model(arguments.weights, arguments.decoder_weights, arguments.device)
    if arguments.device != "cpu":
        return model
    precision = resolve_precision(arguments.precision)
    if arguments.precision == "auto" and precision == "f32" and model.calibration:
        print("precision f32, as this CPU has no bf16; these weights also serve --precision int8, which is faster")
    model = to_fast(model, precision)
    return_memory()                                             # of the plain weights
    return model


def note_seconds(folder: Path, name: str, seconds: float) -> None:
    """Append to efficiency.csv, every line in one write at the file's end, so that several jobs may share the folder."""
    path = folder / "efficiency.csv"
    name = f'"{name}"' if "," in name else name
    if not path.exists():
        append(path, "case,seconds\n")                          # two jobs may both do this; readers skip it anywhere
    append(path, f"{name},{seconds:.3f}\n")


def append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def run(arguments) -> int:
    """Segment every case; the number of cases that failed. Reading and writing overlap with the network."""
    rank, world = part_of(arguments.part)
    prompts = prompts_of(arguments)
    if arguments.pick:
        require_display()
    paths = list_inputs(arguments, prompts)[rank::world]
    arguments.output.mkdir(parents=True, exist_ok=True)
    again = arguments.overwrite or prompts.at_hand
    todo = [path for path in paths if again or not (arguments.output / f"{stem_of(path)}.npz").exists()]
    model = load(arguments) if todo else None
    failed, written, start = 0, [], time.perf_counter()

    def read(path):
        if prompts.given:
            return read_user_case(path, arguments.input, prompts)
        return read_case(path, z_exclusive=arguments.z_exclusive)

    def write(case, segs, seconds):
        # The NPZ comes last: where it exists, the case is finished.
        if prompts.given:
            save_png((arguments.overlay or arguments.output) / f"{stem_of(case.name)}_overlay.png", draw(case, segs))
            write_user_case(arguments.output, case, segs)
        else:
            if arguments.overlay:
                save_png(arguments.overlay / f"{stem_of(case.name)}.png", draw(case, segs))
            write_segs(arguments.output / f"{stem_of(case.name)}.npz", segs)
        note_seconds(arguments.output, case.name, seconds)

    def complain(path, error):
        nonlocal failed
        failed += 1
        line = first_line(error)
        bar.write(line if path.name in line else f"{path.name}: {line}")

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        bar = progress(ahead(reader, read, todo), len(todo), "segmenting")
        for path, case in bar:
            try:
                case = case.result()
                for warning in case.warnings:
                    bar.write(warning)
                if case.intensity:
                    print(f"{case.name}: intensities: {case.intensity}")
                began = time.perf_counter()
                segs = segment(model, case, arguments)
                if segs is None:
                    break
                if prompts.given and not segs.any():
                    bar.write(f"{case.name}: nothing found")
                if case.points is not None and not len(case.boxes):
                    bar.write(f"{case.name}: points without a box: weights trained on boxes alone, such as the default "
                              "ones and LiteMedSAM's, answer them badly; look at the overlay, or give a --box")
                written.append((path, writer.submit(write, case, segs, time.perf_counter() - began)))
            except (ValueError, OSError, MemoryError, RuntimeError) as error:      # torch: out of memory is a RuntimeError
                complain(path, error)
    for path, job in written:
        if job.exception():
            complain(path, job.exception())
    done = sum(not job.exception() for _, job in written)
    print(f"{done} segmented, {len(paths) - len(todo)} skipped as finished, {failed} failed, "
          f"{time.perf_counter() - start:.1f} s; masks in {arguments.output}")
    return failed


def ahead(executor, function, items):
    """(item, future of function(item)) for each item, the next one always under way."""
    previous = None
    for item in items:
        current = item, executor.submit(function, item)
        if previous:
            yield previous
        previous = current
    if previous:
        yield previous


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
            cv2.setNumThreads(arguments.threads)
        return 1 if run(arguments) else 0
    except (ValueError, OSError, RuntimeError) as error:        # RuntimeError: a device that is not there
        print(first_line(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the cases that are left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
