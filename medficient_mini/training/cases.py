"""Training cases: find the NPZ files, split them by patient, list their slices, balance them.

A case is the npz.Header of one NPZ file; a slice is (index of the case, z), with z = 0 for a 2D image.
"""
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from ..inference.names import patient_of
from ..inference.npz import list_cases, read_header
from ..show.progress import ProgressBar


def scan_cases(folder, strict=False, need_masks=False):
    """Find all training cases under a folder, subfolders included, from the headers of the NPZ files alone.

    Args:
        folder: where the files are, or one file.
        strict: stop at a bad file instead of leaving it out with one line on stderr.
        need_masks: take a file without `gts` for bad.

    Returns:
        list of npz.Header, sorted by path.

    Raises:
        ValueError: one line; no case is left, or one is bad and `strict` is set.
    """
    paths = list_cases(folder)
    headers = _each(partial(read_header, need_gts=need_masks), paths, "checking cases", strict)
    if not any(headers):
        raise ValueError(f"{folder}: expected a usable case, found none among {len(paths)} NPZ files")
    return [header for header in headers if header]


def _each(function, items, label, strict):
    """[function(item), …], computed in threads; None where it raised ValueError, which costs a line on stderr."""
    results = []
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(function, item) for item in items]
        bar = ProgressBar(futures, len(items), label)
        for future in bar:
            try:
                results.append(future.result())
            except ValueError as error:
                if strict:
                    raise
                bar.write(str(error))
                results.append(None)
    return results


def split_cases(cases, val_fraction, seed, patient_pattern=None):
    """Keep part of the patients for validation, in every modality alike.

    Each modality gives `val_fraction` of its patients, rounded, but at least one, and keeps at least one. Where all
    cases are of one patient they are split one by one.

    Returns:
        training cases, validation cases: lists of npz.Header; both hold a case if there are two.

    Raises:
        ValueError: one line; `patient_pattern`, a regular expression for `patient_of`, does not match a name.
    """
    patients = [patient_of(case.path, patient_pattern) for case in cases]
    if len(set(patients)) == 1:
        patients = [case.path for case in cases]
    modalities = {}
    for key, case in zip(patients, cases):
        modalities.setdefault(key, set()).add(case.modality)
    in_training = Counter(modality for of_patient in modalities.values() for modality in of_patient)
    keys, chosen = list(modalities), set()
    order = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    for modality, count in sorted(in_training.items()):
        kept = count - max(1, int(count * val_fraction + 0.5))
        for key in order:
            is_last = min(in_training[other] for other in modalities[key]) < 2
            if modality in modalities[key] and not is_last and key not in chosen and in_training[modality] > kept:
                chosen.add(key)
                in_training.subtract(modalities[key])
    if not chosen:                                                             # each modality has but one patient
        chosen.update(order[1:2])
    sides = [], []
    for key, case in zip(patients, cases):
        sides[key in chosen].append(case)
    return sides


def describe_patients(cases, patient_pattern=None):
    """Return "N patients in M cases", with a warning where the guess may have split patients or joined several."""
    counts = Counter(patient_of(case.path, patient_pattern) for case in cases)
    line, alike = f"{len(counts)} patients in {len(cases)} cases", {}
    largest, most = counts.most_common(1)[0]
    if most > max(1, len(cases) / 2) and (patient_pattern is None or len(counts) == 1):
        how = " and are split one by one" if len(counts) == 1 else ""
        return (f"{line}; warning: {most} cases count as one patient ({largest}){how}: if they are of several, say so "
                "with --patient REGEX, or validation sees patients of training")
    if patient_pattern is not None:
        return line
    for patient, count in counts.items():
        beginning = re.sub(r"([-_ ][^-_ ]*|\d+)$", "", patient)
        if count == 1 and beginning:
            alike.setdefault(beginning, []).append(patient)
    groups = [names for names in alike.values() if len(names) > 1]
    if sum(map(len, groups)) > len(cases) / 2:
        first, second, *_ = max(groups, key=len)
        return (f"{line}; warning: most cases count as patients of their own, though names begin alike ({first} and "
                f"{second}): if those are of one patient, say so with --patient REGEX, or validation sees patients of "
                "training")
    return line


def list_slices(cases, cache, labelled_only, strict=False):
    """List the slices of all cases in order, (index of the case, z), or those with a label alone.

    Each case is read once. One that cannot be is left out with one line on stderr, or stops the run if `strict` is set.
    """
    def slices_of(case):
        labelled = cache.objects(case)[0]
        if labelled_only:
            return labelled
        if not case.has_gts:                                                   # then `objects` has read nothing
            cache.image_and_labels(case)
        return range(case.shape[0] if case.is_3d else 1)

    found = _each(slices_of, cases, "reading cases", strict)
    return [(index, z) for index, slices in enumerate(found) for z in slices or ()]


def with_neighbours(cases, slices):
    """Add the slices just above and below the given ones of volumes; with `in_use` they teach where an object ends."""
    near = [(index, z) for index, middle in slices if cases[index].is_3d for z in (middle - 1, middle + 1)]
    return sorted({*slices, *((index, z) for index, z in near if 0 <= z < cases[index].shape[0])})


def balance_weights(cases, slices, power=0.5):
    """Weigh slices so that modality, then case, then slice is drawn, and volumes do not drown images.

    A modality is drawn with probability proportional to (its number of cases) ** power (1: as it comes, 0: all
    modalities alike), within it every case alike, within a case every slice alike. Returns float64 (number of
    slices,), of sum 1.
    """
    slices_of = Counter(index for index, _ in slices)
    cases_of = Counter(cases[index].modality for index in slices_of)
    total = sum(count ** power for count in cases_of.values())
    share = {modality: count ** (power - 1) / total for modality, count in cases_of.items()}
    return np.array([share[cases[index].modality] / slices_of[index] for index, _ in slices])
