import os
import pickle
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from medficient_mini.training import samples as data
from medficient_mini.training.augment import Move, augment, loose_box, mask_to_network
from medficient_mini.training.samples import (DistillDataset, EpochSampler, FinetuneDataset, balance_weights, embedding_path,
                                  list_slices, make_loader, save_embedding, scan_cases, split_cases)
from medficient_mini.inference.geometry import box_of_mask, boxes_to_network, to_network
from medficient_mini.training.volume_cache import SliceCache

SHARED = Path(__file__).resolve().parents[3] / "shared"


def write_2d(folder, name, labels=2, shape=(40, 60), seed=0, **replace):
    rng = np.random.default_rng(seed)
    gts = np.zeros(shape, np.uint8)
    for label in range(1, labels + 1):
        gts[8 * label:8 * label + 6, 10 * label:10 * label + 15] = label
    arrays = {"imgs": rng.integers(0, 256, (*shape, 3), dtype=np.uint8), "gts": gts, **replace}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder / f"{name}.npz"


def write_3d(folder, name, depth=6, seed=0, **replace):
    rng = np.random.default_rng(seed)
    gts = np.zeros((depth, 24, 30), np.int64)
    gts[1:4, 5:12, 6:20] = 1
    gts[3, 15:20, 3:9] = 2
    return write_2d(folder, name, imgs=rng.integers(0, 256, gts.shape, dtype=np.uint8), **{"gts": gts, **replace})


@pytest.fixture
def folder(tmp_path):
    """A 2D image, a 2D image without masks in a subfolder, a volume, and an image without any label."""
    root = tmp_path / "npz"
    write_2d(root, "2D_US_a_1")
    write_2d(root / "deep" / "er", "2DBox_OCT_b_1", gts=None, seed=1)
    write_3d(root, "3D_CT_c_1")
    write_2d(root, "2D_US_d_1", labels=0)
    return root


@pytest.fixture
def cache(tmp_path):
    return SliceCache(tmp_path / "cache", 100)


# ---------------------------------------------------------------------------------------------------- scan and split

def test_scan_reads_headers_of_2d_and_3d(folder):
    cases = {case.name: case for case in scan_cases(folder)}
    assert len(cases) == 4
    assert cases["3D_CT_c_1"].is_3d and cases["3D_CT_c_1"].shape == (6, 24, 30)
    assert cases["2D_US_a_1"].shape == (40, 60, 3) and not cases["2D_US_a_1"].is_3d
    assert not cases["2DBox_OCT_b_1"].has_masks and cases["2D_US_a_1"].has_masks
    assert [cases[n].modality for n in ("2D_US_a_1", "2DBox_OCT_b_1", "3D_CT_c_1")] == ["US", "OCT", "CT"]


@pytest.mark.parametrize("replace, field", [
    (dict(imgs=None), "imgs is missing"), (dict(imgs=np.zeros((40, 60, 3))), "imgs is float64"),
    (dict(imgs=np.zeros((2, 40, 60, 4), np.uint8)), "imgs has shape"),
    (dict(gts=np.zeros((40, 61), int)), "gts has shape"),
    (dict(gts=np.zeros((40, 60))), "gts is float64"), (dict(imgs=np.zeros((0, 60, 3), np.uint8)), "imgs has shape"),
    (dict(imgs=np.array(["x"], object)), "imgs is object")])
def test_scan_lists_and_skips_bad_files(folder, capsys, replace, field):
    bad = write_2d(folder, "2D_US_bad", **replace)
    assert len(scan_cases(folder)) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if str(bad) in line]
    assert len(lines) == 1 and field in lines[0]
    with pytest.raises(ValueError, match="2D_US_bad"):
        scan_cases(folder, strict=True)


def test_scan_skips_truncated_and_alien_files(folder, capsys):
    whole = (folder / "3D_CT_c_1.npz").read_bytes()
    (folder / "3D_CT_half.npz").write_bytes(whole[:len(whole) // 2])
    (folder / "text.npz").write_text("not a zip file")
    raw = bytearray((folder / "2D_US_a_1.npz").read_bytes())
    start = 30 + int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little")  # behind the first zip header
    raw[start:start + 8] = b"\xff" * 8
    (folder / "2D_US_zlib.npz").write_bytes(raw)
    assert len(scan_cases(folder)) == 4
    assert capsys.readouterr().err.count("not a readable NPZ") == 3


@pytest.mark.parametrize("name, shape, masks, is_3d", [
    ("3D_CT_n", (5, 9, 3), None, True), ("2D_CT_n", (5, 9, 3), None, False), ("n", (5, 9, 3), None, False),
    ("n", (5, 9, 3), (5, 9, 3), True), ("n", (5, 9, 3), (5, 9), False), ("n", (5, 9, 4), None, True),
    ("n", (2, 5, 9, 3), (2, 5, 9), True), ("2D_CT_n", (5, 9, 4), None, None), ("3D_CT_n", (5, 9), None, None)])
def test_scan_tells_images_from_volumes(tmp_path, name, shape, masks, is_3d):
    path = write_2d(tmp_path, name, imgs=np.zeros(shape, np.uint8), gts=None if masks is None else np.zeros(masks, int))
    if is_3d is None:
        with pytest.raises(ValueError, match="imgs has shape"):
            data.scan_case(path)
    else:
        assert data.scan_case(path).is_3d == is_3d


def test_scan_can_require_masks_and_refuses_an_empty_result(folder, tmp_path, capsys):
    assert {case.name for case in scan_cases(folder, need_masks=True)} == {"2D_US_a_1", "3D_CT_c_1", "2D_US_d_1"}
    assert "gts is missing" in capsys.readouterr().err
    write_2d(tmp_path / "only", "2D_US_x", gts=None)
    with pytest.raises(ValueError, match="no usable case"):
        scan_cases(tmp_path / "only", need_masks=True)


def test_scan_never_decompresses_an_array(folder, monkeypatch):
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("np.load called"))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("array read"))
    assert len(scan_cases(folder)) == 4


def make_cases(names):
    return [data.TrainCase(Path(f"/x/{name}.npz"), name, name.split("_")[1], (8, 8), False, True) for name in names]


def test_split_is_by_patient_stratified_and_deterministic():
    cases = make_cases([f"2D_CT_CURVAS_{1000 + i}-{z}" for i in range(20) for z in range(5)]
                       + [f"2D_US_BUSI_benign{i:03}" for i in range(50)]
                       + [f"3D_{m}_STS_{i:03}" for m in ("CT", "PET") for i in range(10)])
    train, val = split_cases(cases, 0.2, seed=3)
    assert sorted(case.name for case in train + val) == sorted(case.name for case in cases)
    assert not {data.patient_of(case) for case in train} & {data.patient_of(case) for case in val}
    assert Counter(case.modality for case in val) == {"CT": 4 * 5 + 2, "US": 10, "PET": 2}
    assert split_cases(cases, 0.2, seed=3) == (train, val) != split_cases(cases, 0.2, seed=4)


def test_patients_are_told_apart():
    keys = [data.patient_of(case) for case in make_cases(
        ["2D_MR_UWMGI_case101-day20-slice-0078", "2D_MR_UWMGI_case101-day3-slice-1",
         "2D_MR_UWMGI_case10-day20-slice-0078", "3DBox_CT_FLARE_Tr-001", "3DBox_CT_FLARE_Tr-002",
         "3D_CT_STS_001", "3D_PET_STS_001", "2D_US_0001", "2D_US_0002"])]
    assert keys[0] == keys[1] != keys[2] and keys[5] == keys[6]
    assert len(set(keys)) == 7


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99, 1.0])
def test_split_leaves_no_side_empty(fraction):
    for names in (["2D_US_0001", "2D_US_0002"], ["2D_US_q_S1-1", "2D_US_q_S1-2"], [f"2D_OCT_{i}" for i in range(7)]):
        train, val = split_cases(make_cases(names), fraction, seed=0)
        assert train and val and len(train) + len(val) == len(names)
    assert len(split_cases(make_cases(["2D_US_1"]), fraction, seed=0)[0]) == 1


# ---------------------------------------------------------------------------------------------------- slice cache

def test_cache_gives_what_the_file_holds(folder, cache):
    for case in scan_cases(folder):
        with np.load(case.path) as arrays:
            imgs, gts = arrays["imgs"], arrays["gts"] if "gts" in arrays else None
        for z in range(case.shape[0] if case.is_3d else 1):
            where = z if case.is_3d else ...
            assert np.array_equal(cache.image(case, z), imgs[where])
            masks = cache.masks(case, z)
            assert masks is None if gts is None else np.array_equal(masks, gts[where])


def test_cache_unpacks_once_and_labels_are_kept(folder, tmp_path, monkeypatch):
    case = next(case for case in scan_cases(folder) if case.is_3d)
    assert SliceCache(tmp_path / "cache", 100).labelled_slices(case) == [1, 2, 3]
    from medficient_mini.training import volume_cache as slices
    monkeypatch.setattr(slices, "read_arrays", lambda *a: pytest.fail("the NPZ file was opened again"))
    warm = SliceCache(tmp_path / "cache", 100)
    assert warm.labelled_slices(case) == [1, 2, 3] and warm.image(case, 2).shape == (24, 30)


def test_cache_notices_a_changed_file(folder, tmp_path):
    case = next(case for case in scan_cases(folder) if case.is_3d)
    before = SliceCache(tmp_path / "cache", 100)
    old = before.image(case, 0)
    assert before.labelled_slices(case) == [1, 2, 3]
    gts = np.zeros((6, 24, 30), np.uint8)
    gts[5, 3, 3] = 1
    write_3d(folder, case.name, seed=9, gts=gts)
    os.utime(case.path, (time.time() + 5,) * 2)
    after = SliceCache(tmp_path / "cache", 100)
    assert not np.array_equal(after.image(case, 0), old)
    assert after.labelled_slices(case) == [5]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the old volume and its labels are gone


def test_cache_keeps_to_its_limit_and_drops_the_idle(tmp_path):
    for i in range(4):
        write_3d(tmp_path / "npz", f"3D_CT_{i}", seed=i)
    cases = scan_cases(tmp_path / "npz")
    limit = 2.5 * 2 * 6 * 24 * 30 / 2 ** 20  # two of the four volumes (npy headers are small)
    folder = tmp_path / "cache"
    first = SliceCache(folder, limit)
    for case in cases:  # the last two do not fit beside those in use and are read directly
        assert first.image(case, 3).shape == (24, 30) and first.labelled_slices(case) == [1, 2, 3]

    def held():
        return {case.name for case in cases if any(p.is_dir() and case.name in p.name for p in folder.iterdir())}

    assert held() == {"3D_CT_0", "3D_CT_1"}
    for age, entry in enumerate(sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.name[-1])):
        os.utime(entry, (1e9 + age,) * 2)  # used long ago, 0 before 1
    second = SliceCache(folder, limit)
    with np.load(cases[3].path) as arrays:
        assert np.array_equal(second.image(cases[3], 3), arrays["imgs"][3])
    assert held() == {"3D_CT_1", "3D_CT_3"}
    assert not list(folder.glob(".tmp-*"))
    assert np.array_equal(first.image(cases[0], 3), SliceCache(tmp_path / "other", 100).image(cases[0], 3))


def test_cache_survives_a_full_disk_and_a_lost_entry(folder, tmp_path, monkeypatch, capsys):
    case = next(case for case in scan_cases(folder) if case.is_3d)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        cache = SliceCache(tmp_path / "cache", 100)
        assert cache.image(case, 2).shape == (24, 30)
    assert "could not be cached" in capsys.readouterr().err and not list((tmp_path / "cache").iterdir())
    cache = SliceCache(tmp_path / "cache", 100)
    image = cache.image(case, 2)
    entry = next(p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    (entry / "gts.npy").unlink()
    assert np.array_equal(SliceCache(tmp_path / "cache", 100).masks(case, 2), cache.masks(case, 2))
    shutil.rmtree(entry)
    assert np.array_equal(cache.image(case, 2), image)


def test_cache_goes_to_a_worker_without_its_volumes(folder, cache):
    case = next(case for case in scan_cases(folder) if case.is_3d)
    cache.image(case, 0)
    sent = pickle.dumps(cache)
    assert len(sent) < 2000 and np.array_equal(pickle.loads(sent).image(case, 1), cache.image(case, 1))


def test_damaged_array_is_one_line(folder, cache, capsys):
    path = folder / "2D_US_a_1.npz"
    raw = bytearray(path.read_bytes())
    raw[3000:3100] = bytes(100)  # within imgs, behind its header
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="2D_US_a_1.npz: not a readable NPZ") as caught:
        cache.image(data.scan_case(path))
    assert "\n" not in str(caught.value)
    cases = [data.scan_case(path), data.scan_case(folder / "3D_CT_c_1.npz")]
    assert list_slices(cases, cache, labelled_only=True) == [(1, 1), (1, 2), (1, 3)]
    assert capsys.readouterr().err.count("2D_US_a_1.npz: not a readable NPZ") == 1
    with pytest.raises(ValueError, match="2D_US_a_1.npz"):
        list_slices(cases, cache, labelled_only=True, strict=True)


def test_slices_with_and_without_labels(folder, cache):
    cases = scan_cases(folder)
    index = {case.name: i for i, case in enumerate(cases)}
    assert len(list_slices(cases, cache, False)) == 3 + 6
    volume, image = index["3D_CT_c_1"], index["2D_US_a_1"]
    assert set(list_slices(cases, cache, True)) == {(image, 0), (volume, 1), (volume, 2), (volume, 3)}


@pytest.mark.skipif(not (SHARED / "data" / "train").is_dir(), reason="../shared/data is not here")
def test_warm_cache_is_20_times_faster_than_np_load(tmp_path):
    paths = sorted((SHARED / "data" / "train").glob("3D_CT_*"))[::12]
    cases, cache = [data.scan_case(path) for path in paths], SliceCache(tmp_path, 500)
    rng = np.random.default_rng(0)
    draws = [(case, int(rng.integers(case.shape[0]))) for case in cases for _ in range(50)]
    for case, z in draws:
        cache.image(case, z)
    start = time.perf_counter()
    for case, z in draws:
        cache.image(case, z), cache.masks(case, z)
    warm = len(draws) / (time.perf_counter() - start)
    start = time.perf_counter()
    for case, z in draws[::10]:
        with np.load(case.path) as arrays:
            arrays["imgs"][z], arrays["gts"][z]
    plain = len(draws[::10]) / (time.perf_counter() - start)
    assert warm > 20 * plain


# ---------------------------------------------------------------------------------------------------- augmentation

def test_flips_move_image_labels_and_boxes_together():
    image = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9)
    labels = image.astype(np.int32)
    seen = set()
    for seed in range(30):
        moved, moved_labels, move = augment(image, labels, np.random.default_rng(seed), "flips", 512)
        expected = image[::-1] if move.flip[1] else image
        expected = expected[:, ::-1] if move.flip[0] else expected
        assert np.array_equal(moved, expected) and np.array_equal(moved_labels, expected)
        seen.add(move.flip)
    assert len(seen) == 4


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("limit", [512, 50])
def test_affine_moves_image_and_labels_together(channels, limit):
    labels = np.zeros((80, 100), np.uint8)
    labels[25:50, 30:70] = 3
    image = np.where(labels > 0, 200, 50).astype(np.uint8)
    image = np.repeat(image[..., None], 3, 2) if channels else image
    affine = 0
    for seed in range(20):
        moved, moved_labels, move = augment(image, labels, np.random.default_rng(seed), "full", limit)
        assert moved.dtype == np.uint8 and moved.shape[2:] == channels and moved.shape[:2] == moved_labels.shape
        assert moved.min() >= 50  # no new darkest value enters from outside
        inside = moved.reshape(*moved.shape[:2], -1)[..., 0] > 125
        assert (inside != (moved_labels == 3)).mean() < 0.02 and set(np.unique(moved_labels)) <= {0, 3}
        if move.affine:
            affine += 1
            assert max(moved.shape[:2]) == min(limit, 100) and move.factor == min(1, limit / 100)
            assert 0.5 * 0.64 < (moved_labels == 3).mean() / 0.125 < 1.6
    assert 4 <= affine <= 16


def test_mask_to_network_follows_the_image():
    mask = np.zeros((100, 200), bool)
    mask[20:60, 40:120] = True
    small = mask_to_network(mask, 64)
    expected = np.zeros((64, 64), np.uint8)
    expected[6:19, 13:38] = 1  # scale 0.32: rows 6.4 ... 19.2, columns 12.8 ... 38.4
    assert small.dtype == np.uint8 and (small != expected).sum() <= 25 + 13
    assert not small[32:].any()
    large = mask_to_network(mask, 512)
    assert large.sum() == pytest.approx(mask.sum() * 2.56 ** 2, rel=0.03)
    for size in (32, 256):  # a single pixel never vanishes, and emptiness stays
        point = np.zeros((1000, 700), bool)
        point[501, 333] = True
        assert 1 <= mask_to_network(point, size).sum() <= 4
        assert mask_to_network(point & False, size).sum() == 0


def test_loose_box_only_grows_by_at_most_the_shift_and_stays_inside():
    mask = np.zeros((30, 40), bool)
    mask[10:15, 1:20] = True
    rng = np.random.default_rng(0)
    boxes = np.array([loose_box(mask, rng, shift=5) for _ in range(400)])
    assert boxes.min(0).tolist() == [0, 5, 19, 14] and boxes.max(0).tolist() == [1, 10, 24, 19]
    assert loose_box(mask, rng, shift=0).tolist() == [1, 10, 19, 14]
    half = np.array([loose_box(mask, rng, shift=5, factor=0.5) for _ in range(400)])
    assert half.max(0).tolist() == [1, 10, 21.5, 16.5]
    strong = np.array([loose_box(mask, rng, shift=0, jitter=0.4) for _ in range(400)])
    assert strong[:, 2].min() < 15 and (strong[:, 2:] > strong[:, :2]).all()
    assert strong.min() >= 0 and (strong[:, [0, 2]] <= 39).all()


def test_augmented_away_masks_are_drawn_again(folder, cache, monkeypatch):
    module = sys.modules["medficient_mini.training.augment"]
    cases = scan_cases(folder)
    index = next(i for i, case in enumerate(cases) if case.name == "2D_US_a_1")
    calls = []

    def lossy(image, labels, rng, mode, limit):
        calls.append(mode)
        gone = {0: labels * 0, 1: labels * (labels == 2)}  # first everything gone, then one of the two left
        return image, gone[min(len(calls) - 1, 1)], Move()

    monkeypatch.setattr(module, "augment", lossy)
    sample = FinetuneDataset(cases, [(index, 0)], cache, 64, "bilinear", augment="full", max_boxes=5).sample(0, 0, 0)
    assert len(calls) == 2 and sample["box_valid"].tolist() == [True, False, False, False, False]
    assert sample["masks"][0].any() and not sample["masks"][1:].any()

    monkeypatch.setattr(module, "augment", lambda image, labels, rng, mode, limit:
                        (image, labels * (mode == "none"), Move()))
    sample = FinetuneDataset(cases, [(index, 0)], cache, 64, "bilinear", augment="full").sample(0, 0, 0)
    assert sample["box_valid"].sum() == 2  # after ten draws in vain: the image as it is


# ---------------------------------------------------------------------------------------------------- data sets

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_samples_depend_on_seed_epoch_and_position_alone(folder, cache):
    cases = scan_cases(folder)
    slices = list_slices(cases, cache, True)
    options = dict(augment="full", max_boxes=2)
    for make in (lambda seed: FinetuneDataset(cases, slices, cache, 64, "bilinear", seed=seed, **options),
                 lambda seed: DistillDataset(cases, slices, cache, 64, "bilinear", seed=seed, **options)):
        first, again = make(1), make(1)
        assert all(same(first.sample(e, p, 0), again.sample(e, p, 0)) for e in range(2) for p in range(6))
        assert not all(same(first.sample(0, p, 0), first.sample(1, p, 0)) for p in range(6))
        assert not all(same(first.sample(0, p, 0), make(2).sample(0, p, 0)) for p in range(6))


def test_finetune_sample_without_augmentation(folder, cache):
    cases = scan_cases(folder)
    index = next(i for i, case in enumerate(cases) if case.name == "2D_US_a_1")
    dataset = FinetuneDataset(cases, [(index, 0)], cache, 128, "bilinear", box_shift=0)
    sample = dataset[0, 0, 0]
    image, gts = cache.image(cases[index]), cache.masks(cases[index])
    assert torch.equal(sample["image"], to_network(image, 128))
    assert sample["masks"].shape == (5, 128, 128) and sample["masks"].dtype == torch.uint8
    assert sample["box_valid"].tolist() == [True, True, False, False, False]
    assert not sample["boxes"][2:].any() and not sample["masks"][2:].any()
    tight = [boxes_to_network(box_of_mask(gts == label)[None], 40, 60, 128)[0] for label in (1, 2)]
    for box, mask in zip(sample["boxes"][:2], sample["masks"][:2]):
        label = [i for i, expected in enumerate(tight) if torch.equal(box, expected)]
        assert len(label) == 1 and np.array_equal(mask, mask_to_network(gts == label[0] + 1, 128))


def test_finetune_refuses_a_slice_without_labels(folder, cache):
    cases = scan_cases(folder)
    for name in ("2D_US_d_1", "2DBox_OCT_b_1"):
        index = next(i for i, case in enumerate(cases) if case.name == name)
        with pytest.raises(ValueError, match=f"{name}.*gts of slice 0 holds no label"):
            FinetuneDataset(cases, [(index, 0)], cache, 64, "bilinear").sample(0, 0, 0)


def test_five_of_many_labels_are_drawn(tmp_path, cache):
    write_2d(tmp_path / "npz", "2D_Microscopy_1", labels=9, shape=(100, 120))
    cases = scan_cases(tmp_path / "npz")
    dataset = FinetuneDataset(cases, [(0, 0)], cache, 64, "bilinear")
    assert all(dataset.sample(0, p, 0)["box_valid"].all() for p in range(4))
    assert len({tuple(dataset.sample(0, p, 0)["masks"].flatten(1).sum(1).tolist()) for p in range(4)}) > 1


def test_distill_student_and_teacher_see_the_same_flip(folder, cache):
    cases = scan_cases(folder)
    index = next(i for i, case in enumerate(cases) if case.name == "2DBox_OCT_b_1")
    dataset = DistillDataset(cases, [(index, 0)], cache, 64, "bilinear", 32, "area", flips=True)
    image, seen = cache.image(cases[index]), set()
    for position in range(20):
        sample = dataset.sample(0, position, 0)
        horizontal, vertical = sample["flip"].tolist()
        flipped = np.ascontiguousarray(image[::-1 if vertical else 1, ::-1 if horizontal else 1])
        assert torch.equal(sample["image"], to_network(flipped, 64, "bilinear"))
        assert torch.equal(sample["teacher_image"], to_network(flipped, 32, "area"))
        seen.add((horizontal, vertical))
    assert len(seen) == 4 and "embedding" not in sample and "boxes" not in sample


def test_distill_takes_the_embeddings_that_are_cached(folder, cache, tmp_path):
    cases = scan_cases(folder)
    store = tmp_path / "embeddings"
    embedding = torch.randn(256, 64, 64)
    save_embedding(embedding_path(store, cases[0], 0), embedding)
    save_embedding(embedding_path(store, cases[0], 0, (True, False)), embedding + 1)
    dataset = DistillDataset(cases, [(0, 0)], cache, 64, "bilinear", flips=True, embeddings=store)
    seen = Counter()
    for position in range(30):
        sample = dataset.sample(0, position, 0)
        flip = tuple(sample["flip"].tolist())
        seen[flip] += 1
        assert sample["embedding"].dtype == torch.float16 and sample["embedding"].shape == (256, 64, 64)
        if flip in ((False, False), (True, False)):
            assert sample["has_embedding"] and torch.equal(sample["embedding"], (embedding + flip[0]).half())
        else:
            assert not sample["has_embedding"]
    assert len(seen) == 4
    full = DistillDataset(cases, [(0, 0)], cache, 64, "bilinear", augment="full", embeddings=store)
    shares = [bool(full.sample(0, p, 0)["has_embedding"]) for p in range(40)]
    assert 0 < sum(shares) < 20  # half of the flips are cached, half of those are not rotated
    path = embedding_path(store, cases[0], 0)
    path.write_bytes(path.read_bytes()[:1000])
    still = DistillDataset(cases, [(0, 0)], cache, 64, "bilinear", embeddings=store)
    with pytest.raises(ValueError, match="0.npy: not a readable embedding"):
        still.sample(0, 0, 0)


def test_distill_keeps_the_target_of_slices_without_labels(folder, cache, tmp_path):
    """Beside a mask loss only unflipped embeddings are kept, and without a label there is no mask to learn either."""
    cases = scan_cases(folder)
    index = {case.name: i for i, case in enumerate(cases)}
    slices = [(index[name], 0) for name in ("2DBox_OCT_b_1", "2D_US_d_1", "2D_US_a_1")]
    for i, z in slices:
        save_embedding(embedding_path(tmp_path, cases[i], z), torch.ones(256, 64, 64))
    dataset = DistillDataset(cases, slices, cache, 64, "bilinear", augment="full", max_boxes=1, embeddings=tmp_path)
    has = [[bool(dataset.sample(0, p, k)["has_embedding"]) for p in range(12)] for k in range(3)]
    assert all(has[0]) and all(has[1]) and not all(has[2])


def test_embedding_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(path, array):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ValueError, match="0.npy: could not be written .No space left on device"):
        save_embedding(tmp_path / "case" / "0.npy", torch.zeros(256, 64, 64))
    assert not list((tmp_path / "case").iterdir())


def test_distill_objects_and_unlabelled_slices(folder, cache):
    cases = scan_cases(folder)
    index = {case.name: i for i, case in enumerate(cases)}
    slices = [(index[name], 0) for name in ("2D_US_a_1", "2DBox_OCT_b_1", "2D_US_d_1", "3D_CT_c_1")]
    dataset = DistillDataset(cases, slices, cache, 64, "bilinear", max_boxes=2, box_shift=0, prompt_size=128)
    valid = [dataset.sample(0, 0, i)["box_valid"].tolist() for i in range(4)]
    assert valid == [[True, True], [False, False], [False, False], [False, False]]
    sample = dataset.sample(0, 0, 0)
    assert sample["masks"].shape == (2, 256, 256)
    for box, mask in zip(sample["boxes"], sample["masks"]):  # boxes in a frame of 128, masks in one of 256
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        frame = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 2
        assert np.abs(box.numpy() + [0, 0, 128 / 60, 128 / 60] - frame).max() < 1


# ---------------------------------------------------------------------------------------------------- order and batches

def test_sampler_covers_everything_and_resumes():
    sampler = EpochSampler(10, seed=5)
    epoch = list(sampler)
    assert len(sampler) == 10 and sorted(i for _, _, i in epoch) == list(range(10))
    assert [p for _, p, _ in epoch] == list(range(10)) and epoch[0][0] == 0
    sampler.set_position(0, 4)
    assert list(sampler) == epoch[4:] and len(sampler) == 6
    sampler.set_position(1, 0)
    assert [i for _, _, i in sampler] != [i for _, _, i in epoch]


def test_short_and_long_epochs_still_see_every_slice_alike():
    sampler, counts = EpochSampler(10, seed=1, samples_per_epoch=4), Counter()
    for epoch in range(5):
        sampler.set_position(epoch, 0)
        counts.update(i for _, _, i in sampler)
    assert counts == {i: 2 for i in range(10)}
    assert Counter(i for _, _, i in EpochSampler(10, seed=1, samples_per_epoch=30)) == {i: 3 for i in range(10)}


@pytest.mark.parametrize("weights", [None, np.arange(1, 12)])
def test_ranks_together_are_one_process(weights):
    whole = list(EpochSampler(11, seed=2, weights=weights, samples_per_epoch=12))
    parts = [list(EpochSampler(11, seed=2, rank=r, world=2, weights=weights, samples_per_epoch=12)) for r in range(2)]
    for start in range(0, 12, 4):  # global batches of 4, local of 2
        local = [key for part in parts for key in part[start // 2:start // 2 + 2]]
        assert sorted(local) == sorted(whole[start:start + 4])
    odd = [EpochSampler(11, seed=2, rank=r, world=2) for r in range(2)]
    assert len(odd[0]) == len(odd[1]) == len(list(odd[0])) == len(list(odd[1])) == 5
    with pytest.raises(ValueError, match="1 slices"):
        EpochSampler(1, seed=0, world=2)


def test_balance_draws_modality_then_case_then_slice():
    cases = make_cases(["3D_CT_1"] + [f"2D_US_{i}" for i in range(16)] + [f"2D_OCT_{i}" for i in range(4)])
    slices = [(0, z) for z in range(100)] + [(i, 0) for i in range(1, 21)]
    weights = balance_weights(cases, slices, power=0.5)
    share = Counter()
    for (index, _), weight in zip(slices, weights):
        share[cases[index].modality] += weight
    assert share == pytest.approx({"CT": 1 / 7, "US": 4 / 7, "OCT": 2 / 7})
    assert weights.sum() == pytest.approx(1) and len(set(weights[:100])) == 1
    draws = Counter(cases[slices[i][0]].modality for _, _, i in
                    EpochSampler(len(slices), seed=0, weights=weights, samples_per_epoch=7000))
    assert draws["US"] == pytest.approx(4000, abs=200) and draws["CT"] == pytest.approx(1000, abs=150)


def test_loader_is_the_same_with_and_without_workers(folder, cache):
    cases = scan_cases(folder)
    slices = list_slices(cases, cache, False)
    dataset = DistillDataset(cases, slices, cache, 32, "bilinear", flips=True, max_boxes=1)
    batches = {}
    for workers in (0, 2):
        sampler = EpochSampler(len(slices), seed=0)
        sampler.set_position(0, 2)
        batches[workers] = list(make_loader(dataset, sampler, 3, workers))
    assert [len(batch["image"]) for batch in batches[0]] == [3, 3, 1]
    assert all(same(a, b) for a, b in zip(batches[0], batches[2], strict=True))
