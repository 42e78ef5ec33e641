"""Training cases: find the NPZ files, split them by patient, list their slices, balance them.

A case is the npz.Case of one NPZ file without its arrays; a slice is (case, z), with z = 0 for an image.
"""
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ..inference.names import patient_of
from ..inference.npz import list_cases, read_header
from ..show.progress import ProgressBar


def scan_cases(folder, need_masks=False):
    """Find the cases below a folder: list of npz.Case, sorted by path. ValueError if there is none.

    A bad file, with `need_masks` also one without `gts`, costs a line on stderr.
    """
    paths = list_cases(Path(folder).absolute())              # "." would name no patient
    cases = [case for _, case in _each(partial(read_header, need_gts=need_masks), paths, "checking cases")]
    if not cases:
        raise ValueError(f"{folder}: expected a usable case, found none among {len(paths)} NPZ files")
    return cases


def _each(function, items, label):
    """Yield (item, function(item)), computed in threads; an item with a ValueError costs a line."""
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(function, item) for item in items]
        bar = ProgressBar(futures, len(items), label)
        for future, item in zip(bar, items):
            try:
                yield item, future.result()
            except ValueError as error:
                bar.write(str(error))


def split_cases(cases, val_fraction, seed, patient_pattern=None):
    """Keep part of the patients for validation: training cases, validation cases.

    Each modality gives `val_fraction` of its patients, rounded, but at least one, and keeps at least one. Cases of a
    single patient are split one by one. `patient_pattern`: see `patient_of`.
    """
    patients = [patient_of(case.path, patient_pattern) for case in cases]
    if len(set(patients)) == 1:
        patients = [str(case.path) for case in cases]
    groups, chosen = defaultdict(set), set()
    for patient, case in zip(patients, cases):
        groups[case.modality].add(patient)
    order = np.random.default_rng(seed).permutation(list(dict.fromkeys(patients))).tolist()
    for _, group in sorted(groups.items()):
        wanted = max(1, int(len(group) * val_fraction + 0.5))
        for patient in order:
            if patient in group and len(group & chosen) < wanted and all(
                    len(other - chosen) > 1 for other in groups.values() if patient in other):
                chosen.add(patient)
    chosen = chosen or order[1:2]                                              # each modality has but one patient
    return [[case for patient, case in zip(patients, cases) if (patient in chosen) == side] for side in (False, True)]


def describe_patients(cases, patient_pattern=None):
    """Return "N patients in M cases", with a warning where the guess may have joined several patients or split them."""
    counts = Counter(patient_of(case.path, patient_pattern) for case in cases)
    line = f"{len(counts)} patients in {len(cases)} cases"
    largest, most = counts.most_common(1)[0]
    single = (re.sub(r"([-_ ][^-_ ]*|\d+)$", "", patient) for patient, count in counts.items() if count == 1)
    beginnings = Counter(filter(None, single))
    if most > max(1, len(cases) / 2) and (patient_pattern is None or len(counts) == 1):
        doubt = f"{most} cases count as one patient ({largest})" + " and are split one by one" * (len(counts) == 1)
    elif patient_pattern is None and sum(count for count in beginnings.values() if count > 1) > len(cases) / 2:
        alike = max(beginnings, key=beginnings.get)
        doubt = f"most cases count as patients of their own, though names begin alike ({alike}…)"
    else:
        return line
    return f"{line}; warning: {doubt}: if that is wrong, use --patient REGEX, or validation sees patients of training"


def depth(case):
    """Return the number of slices of a case, 1 for an image."""
    return case.shape[0] if case.is_3d else 1


def list_slices(cases, cache, labelled_only):
    """List the slices of all cases in order, or those with a label alone; what cannot be read is as in `scan_cases`."""
    found = _each(cache.objects, cases, "reading cases")                       # which reads each file once
    return [(case, z) for case, (labelled, _) in found for z in (labelled if labelled_only else range(depth(case)))]


def with_neighbours(slices):
    """Add the slices just above and below those of volumes, in order; with `in_use` they teach where an object ends."""
    near = dict.fromkeys((case, z + step) for case, z in slices for step in (-1, 0, 1))
    return [(case, z) for case, z in near if 0 <= z < depth(case)]


def balance_weights(slices, power):
    """Weigh slices so that volumes do not drown images: float64 (number of slices,), of sum 1.

    A modality weighs (its number of cases) ** power, within it every case alike, within a case every slice alike.
    """
    slices_of = Counter(case for case, _ in slices)
    cases_of = Counter(case.modality for case in slices_of)
    total = sum(count ** power for count in cases_of.values())
    share = {modality: count ** (power - 1) / total for modality, count in cases_of.items()}
    return np.array([share[case.modality] / slices_of[case] for case, _ in slices])
