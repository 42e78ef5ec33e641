"""Segment challenge cases (NPZ with `imgs` and `boxes`), or your own pictures and volumes.

    python infer.py -i cases -o out                          # every NPZ of a folder
    python infer.py -i case.npz -o out --overlay pictures    # one case, with a picture
    python infer.py -i cases -o out --part 2/8               # the second of eight jobs
    python infer.py -i photo.png -o out --box 30 40 200 180  # a picture: mask picture, overlay and NPZ
    python infer.py -i ct.nii.gz -o out --box 30 40 10 200 180 25 --window soft-tissue
    python infer.py -i photo.png -o out --pick               # draw the boxes in a window
"""
import os
import re
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from medficient_mini.cpu.fast import PRECISIONS
from medficient_mini.files import exit_status, first_line, option_parser
from medficient_mini.inference.checkpoint import load_model, resolve
from medficient_mini.inference.compose import OVERLAPS
from medficient_mini.inference.npz import list_cases, read_case
from medficient_mini.inference.origin import digest, made_with, what_changed
from medficient_mini.inference.predictor import segment_image
from medficient_mini.inference.volume import PROPAGATIONS, segment_volume
from medficient_mini.machine import Load, ahead, place_among_processes, share_heap, workers_on
from medficient_mini.show.progress import ProgressBar
from medficient_mini.userfiles.pick import pick, require_display
from medficient_mini.userfiles.pictures import stem_of
from medficient_mini.userfiles.prompts import (add_prompt_options, check_prompts, list_user_files, read_user_case,
                                               segment_points)
from medficient_mini.userfiles.results import mask_file, show, write
from medficient_mini.userfiles.volumes import parts_of

# The options that decide a result, besides the files of weights.
DECISIVE = ("precision", "propagation", "overlap", "separate", "z_exclusive", "point", "background", "pick", "z",
            "slice", "axis", "window", "series")


def parse_arguments(argv=None):
    parser, add = option_parser(__doc__)
    add("-i --input", Path, "NPZ cases, pictures or volumes: a folder, or one file", required=True)
    add("-o --output", Path, "folder for the masks", required=True)
    add("--weights", "l1", "checkpoint file, lite_medsam, or of the package's own l1 or the faster l0")
    add("--decoder-weights", str, "checkpoint whose prompt encoder and decoder join a bare encoder")
    add("--precision", "auto", "auto: bf16 where the CPU has it, else f32; int8 needs the default weights or a file of "
        "medficient_mini.cpu.int8", choices=PRECISIONS)
    add("--device", "cpu", "cpu, cuda, cuda:1, …")
    add("--threads", int, "CPU threads (default: torch's choice; for a single picture, those of the cores that other "
        "programs leave free)")
    add("--overlay", Path, "also write a picture of each case there", metavar="DIR")
    add("--separate", False, "also write each object's own mask where objects overlap (`masks`, of volumes `bits`)")
    add("--overwrite", False, "compute finished cases again")
    add("--part", str, "every N-th case from the K-th (torchrun: taken from its rank)", metavar="K/N")
    add("--propagation", PROPAGATIONS[0], "volumes: prompt every slice with a section of the given box, or the middle "
        "one and follow the masks as published", choices=PROPAGATIONS)
    add("--overlap", OVERLAPS[0], "a pixel that several objects claim goes to the one inside another, else to the "
        "higher logit; always to the higher logit; or to the later box as published", choices=OVERLAPS)
    add("--z-exclusive", False,
        "z_max of a volume's box is the slice after the last (the MedficientSAM authors' reading)")
    add_prompt_options(parser)
    return parser.parse_args(argv)


def check(arguments):
    """Return the arguments, checked, with the threads set that they name. ValueError for what cannot be."""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads: expected a number above 0, found {arguments.threads}")
        torch.set_num_threads(arguments.threads)
        cv2.setNumThreads(arguments.threads)
    try:
        torch.device(arguments.device)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda, cuda:1, …, found {arguments.device}") from None
    check_prompts(arguments)
    if arguments.z_exclusive and arguments.own_files:
        raise ValueError("--z-exclusive: expected NPZ cases, found boxes of your own, which are inclusive")
    if arguments.pick:
        require_display()
    return arguments


def share_of(part: str | None) -> tuple[int, int]:
    """Return (k, n), counted from 0, for the cases k, k + n, k + 2n, …: of --part, else of torchrun. ValueError."""
    if part is None:
        return place_among_processes()[:2]
    k, n = map(int, part.split("/")) if re.fullmatch(r"\d+/\d+", part) else (0, 0)
    if not 1 <= k <= n:
        raise ValueError(f"--part: expected K/N with 1 <= K <= N, found {part}")
    return k - 1, n


def list_inputs(arguments) -> tuple[dict, list[str]]:
    """Find the cases, {path: boxes}, where an NPZ case has None, and a line for each that cannot be done.

    ValueError where an output would replace an input or no case is found.
    """
    source = Path(os.path.abspath(arguments.input))
    source = (source if source.is_dir() else source.parent).resolve()         # the folder of a link, not of its target
    outputs = {path.resolve() for path in (arguments.output, arguments.overlay) if path}
    if source in (outputs if arguments.own_files else {arguments.output.resolve()}):
        raise ValueError(f"{source}: expected another folder for results than that of the cases")
    if arguments.own_files:
        found, wrong = list_user_files(arguments)
    else:
        try:
            found, wrong = dict.fromkeys(list_cases(arguments.input)), []
        except ValueError as error:
            raise ValueError(f"{error} (pictures and volumes need --box, --boxes, --point or --pick)") from None
    results = {folder for folder in outputs if source in folder.parents}
    inputs = [path for path in found if results.isdisjoint((path.parent.resolve() / path.name).parents)]
    if len(inputs) < len(found):
        print(f"{len(found) - len(inputs)} files in {', '.join(map(str, results))} left out: results, not cases")
    cases, stems = {}, {}
    for path in inputs:
        first = stems.setdefault(stem_of(path), path)
        if first == path:
            cases[path] = found[path]
        else:
            wrong.append(f"{path}: name: expected one of its own, found {first} with the same result")
    return cases, wrong


def prepare(path: Path, boxes, decisive: dict, arguments):
    """Return the Case of a file, why it is to be segmented, and what its result is made with.

    None where it is finished; its stored masks are drawn if a picture is wanted.
    """
    result = arguments.output / f"{stem_of(path)}.npz"
    origin = made_with(parts_of(path), boxes, decisive)
    mask = mask_file(path, arguments) if arguments.own_files else None
    reason = "new" if arguments.overwrite or arguments.pick else what_changed(origin, result, mask)
    if not reason and not arguments.overlay:
        return None
    if arguments.own_files:
        case = read_user_case(path, boxes, arguments)
    else:
        case = read_case(path, z_exclusive=arguments.z_exclusive)
    if reason:
        return case, reason, origin
    with np.load(result, allow_pickle=False) as file:        # its name may be that of a challenge's case of other axes
        show(case, file["segs"], arguments)
    return None


def with_network(readings, arguments):
    """Yield each case's path, its reading and the network, which is loaded once a case needs it."""
    model = None
    for (path, *_), reading in readings:
        if model is None and not reading.exception() and reading.result():     # finished cases need no network
            model = load_model(arguments.weights, arguments.decoder_weights, arguments.device, arguments.precision)
        yield path, reading, model, arguments


def segment_ahead(path, reading, model, arguments):
    """Return what `prepare` returned and, of a picture, what `segment` did and the seconds it took."""
    prepared, began = reading.result(), time.perf_counter()
    if not prepared or prepared[0].is_3d or arguments.pick:      # a volume has workers of its own, a window is no place
        return prepared, None, 0.0
    if arguments.load:
        torch.set_num_threads(arguments.load.free_cores())
    return prepared, segment(model, prepared[0], arguments), time.perf_counter() - began


def segment(model, case, arguments, bar=None):
    """Return the Composition of one case, or None where the user left the window of --pick."""
    if arguments.pick and not pick(model, case, arguments.overlap):
        return None
    if case.points is not None:
        return segment_points(model, case)
    options = {"overlap": arguments.overlap, "separate": arguments.separate, "details": True}
    if not case.is_3d:
        return segment_image(model, case.pixels, case.boxes, **options)
    return segment_volume(model, case.pixels, case.boxes, case.drawn_slice, arguments.propagation, **options,
                          progress=lambda *slices: bar.set("slice %d of %d" % slices))


def run(arguments) -> int:
    """Segment every case, while the next ones are read; return how many failed or went without picture or time."""
    start = time.perf_counter()
    cases, wrong = list_inputs(arguments)
    rank, world = share_of(arguments.part)
    paths = list(cases)[rank::world]
    if world > 1 or {"RANK", "WORLD_SIZE"} & os.environ.keys():
        print(f"part {rank + 1}/{world}: {len(paths)} of {len(cases)} cases")
    arguments.output.mkdir(parents=True, exist_ok=True)
    weights = [path and digest([resolve(path)]) for path in (arguments.weights, arguments.decoder_weights)]
    decisive = {"weights": weights, **{name: getattr(arguments, name) for name in DECISIVE}}
    for line in wrong:
        print(line, file=sys.stderr)
    workers = max(1, min(len(paths), workers_on(torch.device(arguments.device))))
    # A single picture takes the cores that are free; several share all of torch's threads.
    arguments.load = Load() if len(paths) == 1 and arguments.threads is None else None
    readings = ahead(prepare, [(path, cases[path], decisive, arguments) for path in paths], 1)
    results = ahead(segment_ahead, with_network(readings, arguments), workers)
    bar = ProgressBar(results, len(paths), "segmenting")
    done, skipped, undecorated = 0, 0, 0
    for (path, _, model, _), result in bar:
        try:
            prepared, found, seconds = result.result()
            if prepared is None:
                skipped += 1
                continue
            case, reason, origin = prepared
            for line in case.warnings:
                bar.write(line)
            if reason != "new":
                print(f"{case.name}: done again: {reason}")
            if case.intensity:
                print(f"{case.name}: intensities: {case.intensity}")
            if found is None:
                began = time.perf_counter()
                found = segment(model, case, arguments, bar)
                seconds = time.perf_counter() - began
                if found is None:
                    break
            lost, fault = write(case, found, arguments, origin, seconds)
            for line in lost + fault:
                bar.write(f"{case.name}: {line}")
            done += 1
            undecorated += bool(fault)
        except Exception as error:                               # whatever is wrong with a case, it costs one line
            line = first_line(error)
            line = line if line.startswith(f"{path.name}:") else f"{path.name}: {line}"
            stale = arguments.output / f"{stem_of(path)}.npz"
            wrong.append(f"{line}; {stale} holds the masks of an earlier run" if os.path.exists(stale) else line)
            bar.write(wrong[-1])
    print(f"{done} segmented, {skipped} skipped as finished, {len(wrong)} failed, "
          f"{time.perf_counter() - start:.1f} s; masks in {arguments.output}")
    return len(wrong) + undecorated


def main(argv=None) -> int:
    """Do what the command line says and return the exit status: 1 if a case or all failed, 130 if interrupted."""
    share_heap()
    return exit_status(lambda: run(check(parse_arguments(argv))),
                       "stopped; the same command goes on with the cases that are left")


if __name__ == "__main__":
    sys.exit(main())
