"""Challenge cases (NPZ with `imgs` and `boxes`) in, masks (NPZ with `segs`) out.

    python infer.py -i cases -o out                          # every NPZ of a folder
    python infer.py -i case.npz -o out --overlay pictures    # one case, with a picture
    python infer.py -i cases -o out --part 2/8               # the second of eight jobs
"""
import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from medficient_mini.cases import list_cases, read_case, write_segs
from medficient_mini.checkpoint import load_model
from medficient_mini.draw import contact_sheet, overlay, save_png
from medficient_mini.progress import progress
from medficient_mini.segment import segment_image
from medficient_mini.volume import segment_volume


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, help="folder of NPZ cases, or one NPZ file")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the masks")
    parser.add_argument("--weights", help="checkpoint file, or lite_medsam (default: the package's own weights)")
    parser.add_argument("--decoder-weights", help="checkpoint whose prompt encoder and mask decoder complete a bare encoder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--overlay", type=Path, metavar="DIR", help="also write a picture of each case there")
    parser.add_argument("--overwrite", action="store_true", help="compute finished cases again")
    parser.add_argument("--part", metavar="K/N", help="every N-th case from the K-th (torchrun: taken from its rank)")
    parser.add_argument("--cache-mb", type=float, default=1024, help="embeddings kept of a volume, in MB")
    parser.add_argument("--z-exclusive", action="store_true",
                        help="z_max of a volume's box is the slice after the last (the MedficientSAM authors' reading)")
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


def segment(model, case, arguments):
    """Labels of one case, and its picture where one is wanted."""
    if case.is_3d:
        segs = segment_volume(model, case.volume, case.boxes, arguments.cache_mb)
        picture = contact_sheet(case.volume, segs, case.boxes) if arguments.overlay else None
    else:
        segs = segment_image(model, case.image, case.boxes)
        picture = overlay(case.image, segs, case.boxes) if arguments.overlay else None
    return segs, picture


def note_seconds(folder: Path, name: str, seconds: float) -> None:
    """Append to efficiency.csv in one write, so that several jobs may share the folder."""
    path = folder / "efficiency.csv"
    try:
        with open(path, "x") as file:
            file.write("case,seconds\n")
    except FileExistsError:
        pass
    with open(path, "a") as file:
        file.write(f"{name},{seconds:.3f}\n")


def run(arguments) -> int:
    """Segment every case; the number of cases that failed. Reading and writing overlap with the network."""
    rank, world = part_of(arguments.part)
    paths = list_cases(arguments.input)[rank::world]
    arguments.output.mkdir(parents=True, exist_ok=True)
    todo = [path for path in paths if arguments.overwrite or not (arguments.output / path.name).exists()]
    model = load_model(arguments.weights, arguments.decoder_weights, arguments.device) if todo else None
    failed, written, start = 0, [], time.perf_counter()

    def read(path):
        return read_case(path, z_exclusive=arguments.z_exclusive)

    def write(case, segs, picture, seconds):
        write_segs(arguments.output / case.name, segs)
        if picture is not None:
            save_png(arguments.overlay / (Path(case.name).stem + ".png"), picture)
        note_seconds(arguments.output, case.name, seconds)

    def complain(path, error):
        nonlocal failed
        failed += 1
        print(error if path.name in str(error) else f"{path.name}: {error}", file=sys.stderr)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for path, case in progress(ahead(reader, read, todo), len(todo), "segmenting"):
            try:
                case = case.result()
                for warning in case.warnings:
                    print(warning, file=sys.stderr)
                began = time.perf_counter()
                segs, picture = segment(model, case, arguments)
                written.append((path, writer.submit(write, case, segs, picture, time.perf_counter() - began)))
            except (ValueError, OSError, MemoryError) as error:
                complain(path, error)
    for path, job in written:
        if job.exception():
            complain(path, job.exception())
    print(f"{len(todo) - failed} segmented, {len(paths) - len(todo)} skipped as finished, {failed} failed, "
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
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        return 1 if run(arguments) else 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the cases that are left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
