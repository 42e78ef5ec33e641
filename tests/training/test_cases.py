"""Finding, splitting and listing the cases to train on."""
import io
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from npz_files import write_2d, write_3d

from medficient_mini.inference.names import patient_of
from medficient_mini.inference.npz import Case
from medficient_mini.training.cases import (balance_weights, describe_patients, list_slices, scan_cases, split_cases,
                                            with_neighbours)
from medficient_mini.training.volume_cache import SliceCache


def headers(*names):
    return [Case(Path(f"/x/{name}.npz"), (8, 8), True) for name in names]


def test_scan_takes_what_inference_takes(tmp_path, capsys):                            # fault 7
    write_3d(tmp_path, "3D_CT_a")
    write_2d(tmp_path / "deep" / "er", "2DBox_OCT_b", gts=None)
    for name, imgs in (("16", np.ones((40, 60, 3), np.uint16)), ("float", np.ones((40, 60))),
                       ("rgba", np.ones((40, 60, 4), np.uint8)), ("one", np.ones((40, 60, 1), np.uint8))):
        write_2d(tmp_path, f"2D_US_{name}", imgs=imgs)
    cases = {case.path.stem: case for case in scan_cases(tmp_path)}
    assert len(cases) == 6 and cases["3D_CT_a"].is_3d and not cases["2DBox_OCT_b"].has_gts
    assert cases["2DBox_OCT_b"].modality == "OCT" and cases["3D_CT_a"].shape == (6, 24, 30)
    assert "2DBox_OCT_b" not in {case.path.stem for case in scan_cases(tmp_path, need_masks=True)}
    assert "checking cases 6/6" in capsys.readouterr().err
    cache = SliceCache(tmp_path / "cache", 10)
    assert all(cache.image_and_labels(case)[0].dtype == np.uint8 for case in cases.values())
    write_2d(tmp_path / "only", "2D_US_x", gts=None)
    with pytest.raises(ValueError, match="expected a usable case, found none among 1"):
        scan_cases(tmp_path / "only", need_masks=True)


def test_bad_files_cost_one_line_each(tmp_path, capsys):
    write_2d(tmp_path, "2D_US_good")
    write_2d(tmp_path, "2D_US_shape", gts=np.zeros((40, 61), int))
    write_2d(tmp_path, "2D_US_none", imgs=None)
    (tmp_path / "2D_US_text.npz").write_text("not a zip file")
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "|u1", "fortran_order": False, "shape": (10 ** 7, 10 ** 6)})
    with zipfile.ZipFile(tmp_path / "2D_US_huge.npz", "w") as archive:         # fault 8
        archive.writestr("imgs.npy", huge.getvalue() + bytes(100))
    assert [case.path.stem for case in scan_cases(tmp_path)] == ["2D_US_good"]
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("checking")]
    assert sorted(line.split(": ")[0][6:-4] for line in lines) == ["huge", "none", "shape", "text"]
    assert [line for line in lines if "huge" in line][0].startswith("2D_US_huge.npz: imgs: expected the 10,000,000,000")


def test_split_is_by_patient_and_deterministic():
    cases = headers(*[f"2D_CT_CURVAS_{1000 + i}-{z}" for i in range(20) for z in range(5)],
                    *[f"2D_US_BUSI_benign{i:03}" for i in range(50)],
                    *[f"3D_{m}_STS_{i:03}" for m in ("CT", "PET") for i in range(10)])
    train, val = split_cases(cases, 0.2, seed=3)
    assert sorted(case.path.stem for case in train + val) == sorted(case.path.stem for case in cases)
    assert not {patient_of(case.path.stem) for case in train} & {patient_of(case.path.stem) for case in val}
    patients = Counter(name.split("_")[1] for name in {case.path.stem.split("-")[0] for case in val})
    assert patients["CT"] == 6 and patients["US"] == 10 and 2 <= patients["PET"] <= 6
    assert split_cases(cases, 0.2, seed=3) == [train, val] != split_cases(cases, 0.2, seed=4)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_every_modality_of_two_patients_is_on_both_sides(fraction):            # fault 5
    cases = headers("2D_CT_a_1", "2D_CT_a_2", "2D_US_b_1", "2D_US_b_2", "2D_US_b_3", "2D_OCT_c_1", "3D_MR_d_1",
                    "3D_PET_d_1", "3D_MR_d_2", "3D_PET_d_3")
    sides = [{case.modality for case in side} for side in split_cases(cases, fraction, seed=0)]
    assert sides == [{"CT", "US", "OCT", "MR", "PET"}, {"CT", "US", "MR", "PET"}]
    for few in (headers("2D_CT_1", "2D_US_2"), headers("2D_US_q_S01-1", "2D_US_q_S01-2")):
        assert [len(side) for side in split_cases(few, fraction, seed=0)] == [1, 1]
    assert [len(side) for side in split_cases(few[:1], fraction, seed=0)] == [1, 0]


@pytest.mark.parametrize("names, pattern", [                                   # fault 20
    ("P{}_slice{:02}", None), ("case{}_z{:03}", None), ("1000{}_{}", None), ("2D_US_patient{}-slice_{:02}", None),
    ("scan_{1}_of_{0}", r"of_(\d+)")])
def test_slices_of_a_patient_stay_on_one_side(names, pattern):
    cases = [Case(Path(f"/x/{name}.npz"), (8, 8), True)
             for name in (names.format(patient, z) for patient in range(4) for z in range(40, 45))]
    sides = split_cases(cases, 0.25, 0, pattern)
    assert [len(side) for side in sides] == [15, 5] and describe_patients(cases, pattern) == "4 patients in 20 cases"


def test_a_warning_where_slices_may_count_as_patients():                       # fault 20
    line = describe_patients(headers("2D_US_anna-left", "2D_US_anna-right", "2D_US_bert"))
    assert line.startswith("3 patients in 3 cases; warning: most") and "alike (anna…)" in line
    line = describe_patients(headers("2D_US_anna-1", "2D_US_anna-2", "2D_US_anna-3", "2D_US_P9_z1", "2D_US_P9_z2"))
    assert line.startswith("4 patients in 5 cases; warning: most")
    line = describe_patients(headers("2D_US_0001", "2D_US_0002"))              # in a folder named x
    assert line.startswith("1 patients in 2 cases; warning: 2 cases count as one patient (x) and are split one by one")
    line = describe_patients(headers("2D_US_0001", "2D_US_0002", "2D_US_0003", "2D_US_anna", "2D_US_bert"))
    assert line.startswith("3 patients in 5 cases; warning: 3 cases count as one patient (x): if")
    assert describe_patients(headers("2D_US_anna", "2D_US_bert")) == "2 patients in 2 cases"
    with pytest.raises(ValueError, match="expected a name that"):
        split_cases(headers("2D_US_a", "2D_US_b"), 0.5, 0, r"(q\d)")


def test_slices_with_labels_their_neighbours_and_a_damaged_file(tmp_path, capsys):
    raw = bytearray(write_2d(tmp_path / "npz", "2D_US_a", seed=7).read_bytes())
    raw[3000:3100] = bytes(100)                                                # within imgs, behind its header
    (tmp_path / "npz" / "2D_US_damaged.npz").write_bytes(raw)
    write_2d(tmp_path / "npz", "2D_US_a")
    write_2d(tmp_path / "npz", "2D_US_empty", labels=0)
    write_3d(tmp_path / "npz", "3D_CT_c")
    cases, cache = scan_cases(tmp_path / "npz"), SliceCache(tmp_path / "cache", 10)
    a, _, empty, c = cases
    assert list_slices(cases, cache, False) == [(a, 0), (empty, 0)] + [(c, z) for z in range(6)]      # faults 7 and 8
    assert capsys.readouterr().err.count("2D_US_damaged.npz: file: expected a whole NPZ archive") == 1
    labelled = list_slices(cases, cache, True)
    assert labelled == [(a, 0), (c, 1), (c, 2), (c, 3)]
    assert capsys.readouterr().err.count("2D_US_damaged.npz: file: expected a whole NPZ archive") == 1
    assert with_neighbours(labelled) == [(a, 0)] + [(c, z) for z in range(5)]
    unlabelled = [replace(case, has_gts=False) for case in cases[:2]]
    assert list_slices(unlabelled, cache, False) == [(unlabelled[0], 0)]


def test_balance_draws_modality_then_case_then_slice():
    cases = headers("3D_CT_1", *[f"2D_US_{i}" for i in range(16)], *[f"2D_OCT_{i}" for i in range(4)])
    slices = [(cases[0], z) for z in range(100)] + [(case, 0) for case in cases[1:]]
    weights, share = balance_weights(slices, power=0.5), Counter()
    for (case, _), weight in zip(slices, weights):
        share[case.modality] += weight
    assert share == pytest.approx({"CT": 1 / 7, "US": 4 / 7, "OCT": 2 / 7}) and len(set(weights[:100])) == 1
