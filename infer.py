"""Segment challenge cases (NPZ with `imgs` and `boxes`), or your own pictures and NIfTI volumes.

    python infer.py -i cases -o out                          # every NPZ of a folder
    python infer.py -i case.npz -o out --overlay pictures    # one case, with a picture
    python infer.py -i cases -o out --part 2/8               # the second of eight jobs
    python infer.py -i photo.png -o out --box 30 40 200 180  # a picture: mask picture, overlay and NPZ
    python infer.py -i ct.nii.gz -o out --box 30 40 10 200 180 25 --window soft-tissue
    python infer.py -i photo.png -o out --pick               # draw the boxes in a window
"""
import argparse
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import torch

from medficient_mini.cpu.fast import PRECISIONS
from medficient_mini.files import first_line
from medficient_mini.inference.checkpoint import load_model
from medficient_mini.inference.compose import OVERLAPS, lost_objects
from medficient_mini.inference.npz import list_cases, read_case, read_labels
from medficient_mini.inference.predictor import segment_image
from medficient_mini.inference.volume import PROPAGATIONS, segment_volume
from medficient_mini.show.progress import ProgressBar
from medficient_mini.userfiles.pick import pick, require_display
from medficient_mini.userfiles.pictures import stem_of
from medficient_mini.userfiles.prompts import (add_prompt_options, check_prompts, list_user_files, read_user_case,
                                               segment_points)
from medficient_mini.userfiles.results import made_with, show, what_changed, what_decides, write

TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, help="folder of NPZ cases, pictures or NIfTI files, or one")
    parser.add_argument("-o", "--output", "--out", required=True, type=Path, help="folder for the masks")
    parser.add_argument("--weights", help="checkpoint file, or lite_medsam (default: the package's own weights)")
    parser.add_argument("--decoder-weights", help="checkpoint whose prompt encoder and decoder join a bare encoder")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="auto: bf16 where the CPU has it, else f32; int8 needs a file of medficient_mini.cpu.int8")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--overlay", type=Path, metavar="DIR", help="also write a picture of each case there")
    parser.add_argument("--separate", action="store_true",
                        help="also write each object's own mask where objects overlap (`masks`, of volumes `bits`)")
    parser.add_argument("--overwrite", action="store_true", help="compute finished cases again")
    parser.add_argument("--part", metavar="K/N", help="every N-th case from the K-th (torchrun: taken from its rank)")
    parser.add_argument("--propagation", choices=PROPAGATIONS, default=PROPAGATIONS[0],
                        help="volumes: prompt every slice with a section of the given box (default), or the middle one "
                             "and follow the masks as published")
    parser.add_argument("--overlap", choices=OVERLAPS, default=OVERLAPS[0],
                        help="a pixel that several objects claim goes to the one inside another, else to the higher "
                             "logit (default); always to the higher logit; or to the later box as published")
    parser.add_argument("--cache-mb", type=float, default=1024, help="MB of embeddings kept by --propagation published")
    parser.add_argument("--z-exclusive", action="store_true",
                        help="z_max of a volume's box is the slice after the last (the MedficientSAM authors' reading)")
    add_prompt_options(parser)
    arguments = parser.parse_args(argv)
    arguments.own_files = any([arguments.pick, arguments.box, arguments.boxes, arguments.point, arguments.background])
    return arguments


def share_of(part: str | None) -> tuple[int, int]:
    """Return (k, n), counted from 0: this process does the cases k, k + n, k + 2n, …

    Without --part the numbers are torchrun's, if all its variables are set: RANK and WORLD_SIZE alone are left over
    from something else. ValueError for anything but 1/3, 2/3 or 3/3.
    """
    if part is None:
        return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if TORCHRUN <= os.environ.keys() else (0, 1)
    k, n = map(int, part.split("/")) if re.fullmatch(r"\d+/\d+", part) else (0, 0)
    if not 1 <= k <= n:
        raise ValueError(f"--part: expected K/N with 1 <= K <= N, found {part}")
    return k - 1, n


def list_inputs(arguments) -> tuple[dict, list[str]]:
    """Find the cases: {path: boxes}, where an NPZ case has None, and a line for each that cannot be done.

    Nothing in the output folders is a case. ValueError where an output would replace an input or no case is found.
    """
    source, output = Path(arguments.input), arguments.output.resolve()
    try:
        cases, wrong = list_user_files(arguments) if arguments.own_files else (dict.fromkeys(list_cases(source)), [])
    except ValueError as error:
        hint = "" if arguments.own_files else " (pictures and volumes need --box, --boxes, --point or --pick)"
        raise ValueError(f"{error}{hint}") from None
    if output == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(f"{arguments.output}: expected another folder for the masks than that of the cases")
    written = {output, (arguments.overlay or output).resolve()}
    ours = [folder for folder in written if source.resolve() in folder.parents]
    first = {}
    for path in list(cases):
        if any(folder in path.resolve().parents for folder in ours):          # the result of an earlier run
            del cases[path]
        elif first.setdefault(stem_of(path), path) != path:
            wrong.append(f"{path}: name: expected one of its own, found {first[stem_of(path)]} with the same result")
            del cases[path]
    return cases, wrong


def read(path: Path, decisive: dict, arguments):
    """Return the Case of a file, an NPZ case or a user's picture or volume, and what its result is made with."""
    if arguments.own_files:
        return read_user_case(path, decisive["boxes"], arguments), made_with(path, decisive)
    return read_case(path, z_exclusive=arguments.z_exclusive), made_with(path, decisive)


def segment(model, case, arguments, bar):
    """Return the Composition of one case, or None where the user left the window of --pick."""
    if arguments.pick and not pick(model, case, arguments.overlap):
        return None
    if case.points is not None:
        return segment_points(model, case)
    options = {"overlap": arguments.overlap, "separate": arguments.separate, "details": True}
    if not case.is_3d:
        return segment_image(model, case.image, case.boxes, **options)
    return segment_volume(model, case.volume, case.boxes, case.drawn_slice, arguments.propagation, **options,
                          cache_mb=arguments.cache_mb, progress=lambda *slices: bar.set("slice %d of %d" % slices))


def run(arguments) -> int:
    """Read, segment and write every case; return how many failed.

    The next case is read and the one before is written while the network works: at most one waits at either end.
    """
    cases, wrong = list_inputs(arguments)
    rank, world = share_of(arguments.part)
    paths = list(cases)[rank::world]
    print(f"part {rank + 1}/{world}: {len(paths)} of {len(cases)} cases")
    arguments.output.mkdir(parents=True, exist_ok=True)
    decisive = what_decides(arguments)
    jobs = {path: {**decisive, "boxes": cases[path]} for path in paths}
    again = arguments.overwrite or arguments.pick
    reasons = {path: "new" if again else what_changed(path, jobs[path], arguments.output) for path in paths}
    todo = [path for path in paths if reasons[path] or arguments.overlay]
    if any(reasons.values()):
        model = load_model(arguments.weights, arguments.decoder_weights, arguments.device, arguments.precision)
    start, written = time.perf_counter(), []
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        items = [(path, jobs[path], arguments) for path in todo]
        bar = ProgressBar(ahead(reader, read, items), len(todo), "segmenting")
        for line in wrong:
            bar.write(line)
        for path, reading in bar:
            try:
                case, origin = reading.result()
                for line in case.warnings:
                    bar.write(line)
                if not reasons[path]:                            # finished: the stored masks are drawn
                    show(case, read_labels(arguments.output / f"{stem_of(path)}.npz", "segs")[0], arguments)
                    continue
                if reasons[path] != "new":
                    print(f"{case.name}: done again: {reasons[path]}")
                if case.intensity:
                    print(f"{case.name}: intensities: {case.intensity}")
                began = time.perf_counter()
                found = segment(model, case, arguments, bar)
                if not found:
                    break
                seconds = time.perf_counter() - began
                for line in lost_objects(found):
                    bar.write(f"{case.name}: {line}")
                written.append((path, writer.submit(write, case, found, arguments, origin, seconds)))
                for _, job in written[-2:-1]:
                    job.exception()                              # waits for it: at most one case waits to be written
            except Exception as error:                           # whatever is wrong with a case, it costs one line
                wrong.append(about(path, error))
                bar.write(wrong[-1])
    unwritten = [about(path, job.exception()) for path, job in written if job.exception()]
    for line in unwritten:
        bar.write(line)
    wrong += unwritten
    print(f"{len(written) - len(unwritten)} segmented, {list(reasons.values()).count(None)} skipped as finished, "
          f"{len(wrong)} failed, {time.perf_counter() - start:.1f} s; masks in {arguments.output}")
    return len(wrong)


def about(path: Path, error) -> str:
    """Return one line about an error, with the name of the file."""
    line = first_line(error)
    return line if path.name in line else f"{path.name}: {line}"


def ahead(executor, function, items):
    """Give the first part of each item with the future of function(*item), the next one always under way."""
    before = []
    for item in items:
        now = [(item[0], executor.submit(function, *item))]
        yield from before
        before = now
    yield from before


def main(argv=None) -> int:
    """Do what the command line says and return the exit status: 1 if a case or all failed, 130 if interrupted."""
    arguments = parse_arguments(argv)
    try:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
            cv2.setNumThreads(arguments.threads)
        check_prompts(arguments)
        if arguments.pick:
            require_display()
        return 1 if run(arguments) else 0
    except Exception as error:
        print(first_line(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the cases that are left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
