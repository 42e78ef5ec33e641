"""The unpacked copies of volumes."""
import pickle
import shutil

import numpy as np
import pytest

from npz_files import LABELS_3D, write_2d, write_3d

from medficient_mini.inference.npz import read_header
from medficient_mini.training import volume_cache
from medficient_mini.training.volume_cache import SliceCache, file_key


@pytest.fixture
def case(tmp_path):
    return read_header(write_3d(tmp_path / "npz", "3D_CT_c"))


def test_cache_gives_what_the_file_holds(case, tmp_path):
    cache = SliceCache(tmp_path / "cache", 10)
    others = [read_header(write_2d(tmp_path, "2D_US_a")), read_header(write_3d(tmp_path, "3D_CT_b", gts=None))]
    for one in [case, case, *others]:                                          # at first from the file, then mapped
        with np.load(one.path) as arrays:
            imgs, gts = arrays["imgs"], arrays.get("gts")
        for z in range(6 if one.is_3d else 1):
            image, labels = cache.image_and_labels(one, z)
            assert np.array_equal(image, imgs[z] if one.is_3d else imgs)
            assert labels is None if gts is None else np.array_equal(labels, gts[z] if one.is_3d else gts)
    assert cache.objects(case) == ([1, 2, 3], [[1, 6, 5, 1, 19, 11, 3], [2, 3, 15, 3, 8, 19, 3]])
    assert [cache.objects(one)[0] for one in others] == [[0], []]


def test_a_copy_is_found_again_and_a_change_is_noticed(case, tmp_path, monkeypatch):
    before = SliceCache(tmp_path / "cache", 10)
    old, objects = before.image_and_labels(case, 2)[0], before.objects(case)
    copy = read_header(shutil.copy(case.path, tmp_path / "3D_CT_other_name.npz"))
    with monkeypatch.context() as patch:
        patch.setattr(volume_cache, "read_case", lambda *a, **k: pytest.fail("the NPZ file was read again"))
        after = SliceCache(tmp_path / "cache", 10)
        assert np.array_equal(after.image_and_labels(copy, 2)[0], old) and after.objects(copy) == objects
        sent = pickle.dumps(after)                                           # a worker opens its own maps
        assert len(sent) < 500 and np.array_equal(pickle.loads(sent).image_and_labels(copy, 2)[0], old)
    key = file_key(case.path)
    write_3d(tmp_path / "npz", case.path.stem, gts=np.roll(LABELS_3D, 2, axis=0))
    assert file_key(case.path) != key and SliceCache(tmp_path / "cache", 10).objects(case)[0] == [3, 4, 5]


def test_a_full_cache_or_disk_costs_speed_and_one_line(tmp_path, monkeypatch, capsys):
    cases = [read_header(write_3d(tmp_path, f"3D_CT_{i}", seed=i)) for i in range(4)]
    cache = SliceCache(tmp_path / "cache", 2.5 * 2 * LABELS_3D.size / 2 ** 20)
    for case in cases * 2:                                                     # two fit
        with np.load(case.path) as arrays:
            assert np.array_equal(cache.image_and_labels(case, 3)[0], arrays["imgs"][3])
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4
    assert capsys.readouterr().err.count("its size limit is reached") == 1

    def full(path, array):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    cache = SliceCache(tmp_path / "other", 10)
    assert [cache.objects(case)[0] for case in cases[:2]] == [[1, 2, 3]] * 2
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert not list((tmp_path / "other").glob("*.npy"))


def test_a_lost_file_is_unpacked_again(case, tmp_path):
    cache = SliceCache(tmp_path / "cache", 10)
    labels = cache.image_and_labels(case, 2)[1]
    next((tmp_path / "cache").glob("*.gts.npy")).unlink()
    assert np.array_equal(cache.image_and_labels(case, 2)[1], labels) and list((tmp_path / "cache").glob("*.gts.npy"))
