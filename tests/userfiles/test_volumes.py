"""NIfTI volumes: what goes in comes out, in all 48 orientations; labels on the same grid; damaged files."""
import gzip
import itertools
import struct

import numpy as np
import pytest

from medficient_mini.inference.npz import check_boxes
from medficient_mini.userfiles import volumes
from medficient_mini.userfiles.volumes import Grid, load_labels, load_volume, save_labels
from medficient_mini.userfiles.pictures import intensity_range, to_uint8

RNG = np.random.default_rng(0)
nib = pytest.importorskip("nibabel")
ORIENTATIONS = [(order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]
SIZE, STEP = np.array([2, 3, 4]), np.array([0.8, 1.5, 4.0])              # of the left-right, back-front, feet-head axes
UPRIGHT = np.diag([-1.0, -1, 1, 1])                                      # axial slices are the file's array, transposed


def save(path, data, affine=UPRIGHT):
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def phantom(order, signs):
    """A volume with file axis a along patient axis order[a] (RAS) in the sense signs[a], and its tilted affine."""
    angles = np.radians(12), np.radians(-9)
    tilt = [[[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]] for a in angles]
    rotation = np.array(tilt[0]) @ np.roll(tilt[1], 1, (0, 1))
    affine = np.eye(4)
    affine[:3, :3] = rotation[:, order] * signs * STEP[list(order)]
    affine[:3, 3] = -20, 30, 7
    return RNG.integers(1, 256, SIZE[list(order)], dtype=np.uint8), affine


def patient_position(index, order, signs):
    """Index along left->right, back->front, feet->head of a file index, by hand."""
    position = [0, 0, 0]
    for a in range(3):
        position[order[a]] = index[a] if signs[a] > 0 else SIZE[order[a]] - 1 - index[a]
    return position


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_all_48_orientations_show_the_same_slices(tmp_path, axis):
    for order, signs in ORIENTATIONS[::1 if axis == "axial" else 5]:
        data, affine = phantom(order, signs)
        volume, grid, text = load_volume(save(tmp_path / "a.nii", data, affine), axis)
        assert text == "8 bits as they are"
        # Brute force: where each file voxel lies in the patient says which slice, row and column it must be in.
        for index in np.ndindex(*data.shape):
            right, front, head = patient_position(index, order, signs)
            back, left, feet = SIZE[1] - 1 - front, SIZE[0] - 1 - right, SIZE[2] - 1 - head
            z, y, x = {"axial": (head, back, left), "coronal": (back, feet, left), "sagittal": (left, feet, back)}[axis]
            assert volume[z, y, x] == data[index]
            assert (grid.boxes_to_slices([[*index, *index]]) == [x, y, z, x, y, z]).all()
        steps = {"axial": STEP[[2, 1, 0]], "coronal": STEP[[1, 2, 0]], "sagittal": STEP[[0, 2, 1]]}[axis]
        assert np.allclose(grid.spacing, steps) and (grid.to_file(volume) == data).all()


def test_boxes_keep_their_lower_corner_and_inverted_ones_stay_inverted():
    grid = Grid((5, 6, 7), np.diag([-1.0, -1, 1, 1]), "coronal")
    assert grid.boxes_to_slices([[0, 1, 2, 3, 3, 4]]).tolist() == [[0, 2, 1, 3, 4, 3]]
    assert Grid((5, 6, 7), np.eye(4), "axial").boxes_to_slices([[0, 1, 2, 3, 3, 4]]).tolist() == [[1, 2, 2, 4, 4, 4]]
    for box in ([3, 0, 0, 1, 4, 4], [0, 4, 0, 1, 1, 4], [0, 0, 4, 1, 1, 2]):
        with pytest.raises(ValueError, match="lower corner"):
            check_boxes(grid.boxes_to_slices([box]), (6, 7, 5), "a")


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_masks_go_back_to_the_files_own_grid(tmp_path, suffix):
    data, affine = phantom((2, 0, 1), (1, -1, 1))
    volume, grid, _ = load_volume(save(tmp_path / "a.nii", data, affine))
    segs = (volume > 128).astype(np.uint8)
    save_labels(tmp_path / f"m.{suffix}", segs, grid)
    mask = nib.load(tmp_path / f"m.{suffix}")
    assert mask.shape == data.shape and np.allclose(mask.affine, affine, atol=1e-5)
    assert mask.get_data_dtype() == np.uint8 and (np.asarray(mask.dataobj) == (data > 128)).all()
    assert (load_labels(tmp_path / f"m.{suffix}", grid) == segs).all()


def test_headers_survive(tmp_path):
    """Both affines with their codes, units and a NIfTI-2 header come back; a display range and a scale factor do not."""
    for kind, codes in ((nib.Nifti1Image, (2, 1)), (nib.Nifti1Image, (0, 0)), (nib.Nifti2Image, (0, 1))):
        image = kind(np.ones((3, 4, 5), np.int16), None)
        image.header["cal_max"] = 500
        image.header.set_slope_inter(2, 3)
        image.set_sform(np.diag([1.0, 2, 3, 1]) + 0.01, code=codes[0])
        image.set_qform(np.diag([1.0, 2, 3, 1]), code=codes[1])
        image.header.set_xyzt_units("mm", "sec")
        nib.save(image, tmp_path / "a.nii")
        volume, grid, _ = load_volume(tmp_path / "a.nii")
        save_labels(tmp_path / "m.nii", np.full(volume.shape, 300, np.uint16), grid)
        image, mask = nib.load(tmp_path / "a.nii"), nib.load(tmp_path / "m.nii")
        assert type(mask) is kind and mask.get_data_dtype() == np.uint16 and (np.asarray(mask.dataobj) == 300).all()
        assert np.allclose(mask.affine, image.affine)
        for form in ("get_sform", "get_qform"):
            (before, code), (after, code_after) = (getattr(i, form)(coded=True) for i in (image, mask))
            assert code == code_after and (before is after is None or np.allclose(before, after))
        assert mask.header["cal_max"] == 0 and mask.header.get_xyzt_units() == ("mm", "sec")


@pytest.mark.parametrize("unit, mm", [("micron", 0.001), ("meter", 1000), ("mm", 1), ("unknown", 1)])
def test_units_become_mm(tmp_path, unit, mm):                                   # fault 30
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.diag([-2.0, -3, 4, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    volume, grid, _ = load_volume(tmp_path / "a.nii")
    assert np.allclose(grid.spacing, np.array([4, 3, 2]) * mm)
    save_labels(tmp_path / "m.nii", volume, grid)
    mask = nib.load(tmp_path / "m.nii")
    assert np.allclose(mask.affine, image.affine) and mask.header.get_xyzt_units()[0] == unit
    assert (load_labels(tmp_path / "m.nii", grid) == volume).all()
    # A mask of the same places in another unit belongs to the image, one of the same numbers does not.
    save(tmp_path / "mm.nii", np.asarray(image.dataobj), np.diag([-2.0 * mm, -3 * mm, 4 * mm, 1]))
    assert (load_labels(tmp_path / "mm.nii", grid) == volume).all()


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint16])
def test_intensities_of_volumes(tmp_path, suffix, dtype):
    data = (RNG.normal(0, 300, (8, 9, 10)) + (1200 if dtype == np.uint16 else 0)).astype(dtype)
    data[:2] = 0
    path = save(tmp_path / f"a.{suffix}", data)
    volume, grid, text = load_volume(path)
    low, high = np.percentile(data[data != 0].astype(float), [0.5, 99.5])
    expected = np.clip((data.astype(float) - low) / (high - low), 0, 1) * 255
    assert np.abs(volume - expected.transpose(2, 1, 0)).max() <= 1 and "percentiles" in text
    volume, _, text = load_volume(path, window=(40, 400))
    assert (volume == to_uint8(data, -160, 240).transpose(2, 1, 0)).all() and "level 40" in text


def test_every_slab_has_a_part_in_the_percentiles(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "SAMPLE", 100)
    data = RNG.integers(1, 500, (8, 9, 3)).astype(np.int16)
    data[..., 0] = 0
    low, high = map(float, load_volume(save(tmp_path / "a.nii", data))[2].split(": ")[1].split(" to "))
    assert low < 50 and high > 450


def test_differences_far_from_zero_stay(tmp_path):                              # fault 28
    small = RNG.integers(1, 100, (8, 9, 10)).astype(np.float64)
    volume, _, _ = load_volume(save(tmp_path / "a.nii", 1e8 + small))
    assert np.abs(volume.astype(int) - load_volume(save(tmp_path / "b.nii", small))[0]).max() <= 1


def test_scale_factors_and_nan(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), UPRIGHT)
    image.header.set_slope_inter(10, -50)
    nib.save(image, tmp_path / "a.nii")
    data = np.asarray(nib.load(tmp_path / "a.nii").dataobj)
    volume, _, _ = load_volume(tmp_path / "a.nii", window=(65, 230))
    assert data.max() == 180 and (volume == to_uint8(data, -50, 180).transpose(2, 1, 0)).all()
    volume, _, text = load_volume(tmp_path / "a.nii")                       # scaled numbers are not "8 bits as they are"
    low, high, _ = intensity_range(data, None)
    assert "8 bits" not in text and (volume == to_uint8(data, low, high).transpose(2, 1, 0)).all()
    floats = RNG.normal(100, 10, (4, 5, 6)).astype(np.float32)
    floats[1, 2, 3] = np.nan
    assert load_volume(save(tmp_path / "b.nii", floats))[0][3, 2, 1] == 0


def test_one_slice_and_trailing_axes(tmp_path):
    for shape in ((4, 5), (4, 5, 1), (4, 5, 6, 1), (4, 5, 6, 1, 1)):
        data = RNG.integers(0, 255, shape, dtype=np.uint8)
        volume, grid, _ = load_volume(save(tmp_path / "a.nii", data))
        three = data.reshape((shape + (1,))[:3])
        assert (volume == three.transpose(2, 1, 0)).all()
        save_labels(tmp_path / "m.nii", volume, grid)
        mask = nib.load(tmp_path / "m.nii")
        assert (np.asarray(mask.dataobj) == three).all() and np.allclose(mask.affine, UPRIGHT)


def fails(function, path, *words):
    with pytest.raises(ValueError) as caught:
        function(path)
    line = str(caught.value)
    assert line.startswith(path.name + ": ") and "\n" not in line and all(word in line for word in words), line


def test_bad_volumes_are_one_line(tmp_path, caplog):
    fails(load_volume, save(tmp_path / "series.nii", np.zeros((3, 4, 5, 6), np.int16)), "a 3D volume", "(3, 4, 5, 6)")
    fails(load_volume, save(tmp_path / "complex.nii", np.zeros((3, 4, 5), np.complex64)), "one number per voxel")
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    fails(load_volume, save(tmp_path / "rgb.nii", rgb), "one number per voxel")
    header = bytearray(save(tmp_path / "flat.nii", np.zeros((3, 4, 5), np.int16)).read_bytes())
    header[280:296] = bytes(16)                                          # srow_x
    (tmp_path / "flat.nii").write_bytes(header)
    fails(load_volume, tmp_path / "flat.nii", "affine: expected three independent")
    for suffix in ("nii", "nii.gz"):
        whole = save(tmp_path / f"whole.{suffix}", RNG.integers(0, 9999, (9, 9, 9)).astype(np.int16)).read_bytes()
        for name, data in {"cut": whole[:len(whole) // 2], "text": b"hello", "empty": b""}.items():
            (tmp_path / f"{name}.{suffix}").write_bytes(data)
            fails(load_volume, tmp_path / f"{name}.{suffix}", "file" if suffix == "nii.gz" or name != "cut" else "bytes")
        fails(load_volume, tmp_path / f"absent.{suffix}", "file")
    header = bytearray((tmp_path / "whole.nii").read_bytes())
    header[42:48] = struct.pack("<hhh", 30000, 30000, 30000)
    (tmp_path / "huge.nii").write_bytes(header)
    fails(load_volume, tmp_path / "huge.nii", "54,000,000,000,352 bytes")
    header[0:4], header[70:72] = bytes(4), b"\x04\x08"                   # sizeof_hdr and datatype
    (tmp_path / "odd.nii").write_bytes(header)
    fails(load_volume, tmp_path / "odd.nii", "file: expected a volume")
    assert not caplog.records                                            # no lines of nibabel's beside ours


def test_checksums_are_read(tmp_path):                                          # fault 31
    # Stored, not compressed: a flipped bit leaves the stream readable, and only the checksum tells.
    raw = save(tmp_path / "a.nii", RNG.integers(0, 255, (9, 9, 9), dtype=np.uint8)).read_bytes()
    packed = bytearray(gzip.compress(raw, compresslevel=0))
    path = tmp_path / "b.nii.gz"
    path.write_bytes(packed)
    _, grid, _ = load_volume(path)
    packed[-300] ^= 64
    path.write_bytes(packed)
    fails(load_volume, path, "file: expected a volume", "CRC check failed")
    fails(lambda p: load_labels(p, grid), path, "CRC check failed")
    path.write_bytes(packed[:-4])
    fails(load_volume, path, "file: expected")


def test_mismatched_masks_are_one_line(tmp_path):
    affine = np.diag([-1.0, -1, 2, 1])
    grid = Grid((4, 5, 6), affine, "axial")
    path = tmp_path / "m.nii"

    def load(path):
        return load_labels(path, grid)

    fails(load, save(path, np.zeros((4, 6, 5), np.uint8), affine), "gts: expected the image's shape (4, 5, 6), found (4, 6, 5)")
    fails(load, save(path, np.zeros((4, 5, 6), np.uint8), np.diag([1.0, -1, 2, 1])), "expected the image's affine", "8.0 mm off")
    for bad in (0.5, -1, 70000, np.nan):
        fails(load, save(path, np.full((4, 5, 6), bad, np.float32), affine), f"expected whole numbers 0 to 65535, found {bad}")
    nudged = affine.copy()
    nudged[0, 3] = 0.2
    assert (load(save(path, np.full((4, 5, 6), 7.0), nudged)) == 7).all()


def test_labels_through_a_scale_factor(tmp_path):                               # fault 32
    labels = RNG.integers(0, 1000, (4, 5, 6)).astype(np.uint16)
    path = save(tmp_path / "m.nii", labels)
    data = bytearray(path.read_bytes())
    data[112:120] = struct.pack("<ff", 0.9999999, 0)                       # scl_slope, scl_inter
    path.write_bytes(data)
    assert 0 < np.abs(np.asarray(nib.load(path).dataobj) - labels).max() < 1e-3
    assert (load_labels(path, Grid((4, 5, 6), UPRIGHT, "axial")) == labels.transpose(2, 1, 0)).all()


def test_without_nibabel_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.int16))
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    fails(load_volume, path, "pip install nibabel")


def test_a_volume_is_only_ever_held_as_uint8(tmp_path, monkeypatch):
    import tracemalloc
    monkeypatch.setattr(volumes, "SAMPLE", 1 << 12)
    save(tmp_path / "a.nii.gz", np.zeros((100, 100, 200)))
    tracemalloc.start()
    try:
        load_volume(tmp_path / "a.nii.gz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e6                            # 2 MB as uint8, 16 MB as float64
