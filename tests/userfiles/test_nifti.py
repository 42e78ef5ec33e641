"""NIfTI volumes: what goes in comes out, in all 48 orientations."""
import itertools
import struct

import numpy as np
import pytest

from medficient_mini.userfiles import formats
from medficient_mini.inference.npz import check_boxes
from medficient_mini.userfiles.formats import grid_of, intensity_range, load_label_nifti, load_nifti, save_label_nifti, to_uint8

RNG = np.random.default_rng(0)
nib = pytest.importorskip("nibabel")
ORIENTATIONS = [(order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]
SIZE, STEP = np.array([5, 6, 7]), np.array([0.8, 1.5, 4.0])              # of the left-right, back-front, feet-head axes


def phantom(order, signs, rotation=np.eye(3), dtype=np.uint8):
    """A volume stored with file axis a along patient axis order[a] (RAS) in the sense signs[a], and its affine."""
    affine = np.eye(4)
    for a in range(3):
        affine[:3, a] = rotation[:, order[a]] * signs[a] * STEP[order[a]]
    affine[:3, 3] = -20, 30, 7
    return RNG.integers(1, 256, SIZE[list(order)]).astype(dtype), affine


def patient_position(array_index, order, signs):
    """Index along left->right, back->front, feet->head of a file index, by hand."""
    position = [0, 0, 0]
    for a in range(3):
        length = SIZE[order[a]]
        position[order[a]] = int(array_index[a]) if signs[a] > 0 else length - 1 - int(array_index[a])
    return position


def tilt(degrees=(12, -9, 15)):
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        rotation = rotation @ turn
    return rotation


@pytest.mark.parametrize("rotation", [np.eye(3), tilt()], ids=["straight", "tilted"])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_all_48_orientations_show_the_same_slices_and_go_back(tmp_path, axis, rotation):
    for order, signs in ORIENTATIONS:
        data, affine = phantom(order, signs, rotation)
        nib.save(nib.Nifti1Image(data, affine), tmp_path / "a.nii")
        volume, grid, text = load_nifti(tmp_path / "a.nii", axis)
        assert "as they are" in text
        # Brute force: where each file voxel lies in the patient says which slice, row and column it must be in.
        for index in itertools.islice(np.ndindex(*data.shape), 0, None, 7):
            right, front, head = patient_position(index, order, signs)
            back, left, feet = SIZE[1] - 1 - front, SIZE[0] - 1 - right, SIZE[2] - 1 - head
            z, y, x = {"axial": (head, back, left), "coronal": (back, feet, left), "sagittal": (left, feet, back)}[axis]
            assert volume[z, y, x] == data[index]
        steps = {"axial": STEP[[2, 1, 0]], "coronal": STEP[[1, 2, 0]], "sagittal": STEP[[0, 2, 1]]}[axis]
        assert np.allclose(grid.spacing, steps)
        segs = (volume > 128).astype(np.uint8)
        save_label_nifti(tmp_path / "m.nii.gz", segs, grid)
        mask = nib.load(tmp_path / "m.nii.gz")
        assert mask.shape == data.shape and np.allclose(mask.affine, affine, atol=1e-5) and mask.get_data_dtype() == np.uint8
        assert (np.asarray(mask.dataobj) == (data > 128)).all()
        assert (load_label_nifti(tmp_path / "m.nii.gz", grid) == segs).all()


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_boxes_follow_the_voxels(axis):
    for order, signs in ORIENTATIONS:
        data, affine = phantom(order, signs)
        grid = grid_of(data.shape, affine, axis)
        corners = [sorted(RNG.choice(n, 2)) for n in data.shape]
        box = np.array([[c[0] for c in corners] + [c[1] for c in corners]], np.float64)
        inside = np.zeros(data.shape, bool)
        inside[tuple(slice(low, high + 1) for low, high in corners)] = True
        x0, y0, z0, x1, y1, z1 = grid.boxes_to_slices(box)[0].astype(int)
        expected = np.zeros_like(grid.to_slices(data), bool)
        expected[z0:z1 + 1, y0:y1 + 1, x0:x1 + 1] = True
        assert (grid.to_slices(inside) == expected).all()
        assert (grid.boxes_to_file(grid.boxes_to_slices(box)) == box).all()
        assert (grid.to_file(grid.to_slices(data)) == data).all()


def test_an_inverted_box_stays_inverted():
    grid = grid_of((5, 6, 7), np.diag([-1, -1, 1, 1]), "axial")
    for box in ([3, 0, 0, 1, 4, 4], [0, 4, 0, 1, 1, 4], [0, 0, 4, 1, 1, 2]):
        with pytest.raises(ValueError, match="lower corner"):
            check_boxes(grid.boxes_to_slices(np.array([box], float)), (7, 6, 5), "a")


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.uint16])
def test_intensities_of_volumes(tmp_path, suffix, dtype):
    hounsfield = (RNG.normal(0, 300, (8, 9, 10)) + (800 if dtype == np.uint16 else 0)).clip(-1024 if dtype != np.uint16 else 0)
    hounsfield[:2] = 0
    data = hounsfield.astype(dtype)
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, 2, 1])), tmp_path / f"a.{suffix}")
    volume, grid, text = load_nifti(tmp_path / f"a.{suffix}")
    assert volume.dtype == np.uint8 and volume.shape == (10, 9, 8) and grid.spacing.tolist() == [2, 1, 1]
    low, high = np.percentile(data[data != 0].astype(float), [0.5, 99.5])
    expected = np.clip((data.astype(float) - low) / (high - low), 0, 1) * 255
    assert np.abs(volume - expected.transpose(2, 1, 0)).max() <= 1 and "percentiles" in text
    volume, _, text = load_nifti(tmp_path / f"a.{suffix}", window=(40, 400))
    assert (volume == to_uint8(data, -160, 240).transpose(2, 1, 0)).all() and "level 40" in text


def test_scale_factors_and_nan(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(10, -50)
    nib.save(image, tmp_path / "a.nii")
    data = np.asarray(nib.load(tmp_path / "a.nii").dataobj)
    volume, _, text = load_nifti(tmp_path / "a.nii", window=(65, 230))
    assert data.max() == 180 and (volume == to_uint8(data, -50, 180).transpose(2, 1, 0)[:, ::-1, ::-1]).all()
    volume, _, text = load_nifti(tmp_path / "a.nii")                       # scaled numbers are not "8 bits as they are"
    low, high, _ = intensity_range(data.ravel(), None)
    assert "8 bits" not in text and (volume == to_uint8(data, low, high).transpose(2, 1, 0)[:, ::-1, ::-1]).all()
    floats = RNG.normal(100, 10, (4, 5, 6)).astype(np.float32)
    floats[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(floats, np.diag([-1.0, -1, 1, 1])), tmp_path / "b.nii")
    assert load_nifti(tmp_path / "b.nii")[0][3, 2, 1] == 0


def test_headers_survive(tmp_path):
    """Both affines with their codes, units and a NIfTI-2 header come back; a display range and a scale factor do not."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        image = kind(np.ones((3, 4, 5), np.int16), None)
        image.header["cal_max"] = 500
        image.set_sform(np.diag([1.0, 2, 3, 1]) + 0.01, code=2)
        image.set_qform(np.diag([1.0, 2, 3, 1]), code=1)
        image.header.set_xyzt_units("mm", "sec")
        nib.save(image, tmp_path / "a.nii")
        volume, grid, _ = load_nifti(tmp_path / "a.nii")
        save_label_nifti(tmp_path / "m.nii", np.full(volume.shape, 300, np.uint16), grid)
        mask = nib.load(tmp_path / "m.nii")
        assert type(mask) is kind and mask.get_data_dtype() == np.uint16 and (np.asarray(mask.dataobj) == 300).all()
        for form in ("get_sform", "get_qform"):
            before, code = getattr(image, form)(coded=True)
            after, code_after = getattr(mask, form)(coded=True)
            assert np.allclose(before, after) and code == code_after
        assert mask.header["cal_max"] == 0 and mask.header.get_xyzt_units() == ("mm", "sec")


def test_one_slice_and_trailing_axes(tmp_path):
    for shape in ((4, 5), (4, 5, 1), (4, 5, 6, 1), (4, 5, 6, 1, 1)):
        data = RNG.integers(0, 255, shape, dtype=np.uint8)
        nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, 1, 1])), tmp_path / "a.nii")
        volume, grid, _ = load_nifti(tmp_path / "a.nii")
        three = data.reshape((shape + (1,))[:3])
        assert (volume == three.transpose(2, 1, 0)).all()
        save_label_nifti(tmp_path / "m.nii", volume, grid)
        assert (np.asarray(nib.load(tmp_path / "m.nii").dataobj) == three).all()


def fails(function, path, *words):
    with pytest.raises(ValueError) as caught:
        function(path)
    line = str(caught.value)
    assert line.startswith(path.name + ": ") and "\n" not in line and all(word in line for word in words), line


def test_bad_volumes_are_one_line(tmp_path):
    def save(name, data, affine=np.eye(4)):
        nib.save(nib.Nifti1Image(data, affine), tmp_path / name)
        return tmp_path / name

    fails(load_nifti, save("series.nii", np.zeros((3, 4, 5, 6), np.int16)), "expected a 3D volume", "(3, 4, 5, 6)")
    fails(load_nifti, save("complex.nii", np.zeros((3, 4, 5), np.complex64)), "one number per voxel")
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    fails(load_nifti, save("rgb.nii", rgb), "one number per voxel")
    flat = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
    flat.header["sform_code"], flat.header["srow_x"] = 1, (0, 0, 0, 0)
    flat.to_filename(tmp_path / "flat.nii")
    header = bytearray((tmp_path / "flat.nii").read_bytes())
    header[280:296] = bytes(16)                                          # srow_x
    (tmp_path / "flat.nii").write_bytes(header)
    fails(load_nifti, tmp_path / "flat.nii", "affine: expected three independent")
    for suffix in ("nii", "nii.gz"):
        whole = save(f"whole.{suffix}", RNG.integers(0, 9999, (30, 30, 30)).astype(np.int16)).read_bytes()
        for name, data in {"cut": whole[:len(whole) // 2], "text": b"hello", "empty": b""}.items():
            (tmp_path / f"{name}.{suffix}").write_bytes(data)
            fails(load_nifti, tmp_path / f"{name}.{suffix}", "file" if suffix == "nii.gz" or name != "cut" else "bytes")
        fails(load_nifti, tmp_path / f"absent.{suffix}", "file")
    header = bytearray((tmp_path / "whole.nii").read_bytes())
    header[42:48] = struct.pack("<hhh", 30000, 30000, 30000)
    (tmp_path / "huge.nii").write_bytes(header)
    fails(load_nifti, tmp_path / "huge.nii", "54,000,000,000,000 bytes")


def test_mismatched_masks_are_one_line(tmp_path):
    affine = np.diag([-1.0, -1, 2, 1])
    grid = grid_of((4, 5, 6), affine, "axial")
    path = tmp_path / "m.nii"

    def save(data, affine=affine):
        nib.save(nib.Nifti1Image(data, affine), path)

    save(np.zeros((4, 6, 5), np.uint8))
    fails(lambda p: load_label_nifti(p, grid), path, "gts: expected the image's shape (4, 5, 6), found (4, 6, 5)")
    save(np.zeros((4, 5, 6), np.uint8), np.diag([1.0, -1, 2, 1]))
    fails(lambda p: load_label_nifti(p, grid), path, "gts: expected the image's affine", "8.0 mm off")
    for bad in (0.5, -1, 70000, np.nan):
        save(np.full((4, 5, 6), bad, np.float32))
        fails(lambda p: load_label_nifti(p, grid), path, "gts: expected whole numbers")
    nudged = affine.copy()
    nudged[0, 3] = 0.2
    save(np.full((4, 5, 6), 7.0), nudged)
    assert (load_label_nifti(path, grid) == 7).all()


def test_without_nibabel_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "a.nii")
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    fails(load_nifti, tmp_path / "a.nii", "pip install nibabel")


def test_a_volume_is_only_ever_held_as_uint8(tmp_path, monkeypatch):
    import tracemalloc
    monkeypatch.setattr(formats, "SAMPLE", 1 << 16)
    nib.save(nib.Nifti1Image(np.zeros((200, 200, 100)), np.eye(4)), tmp_path / "a.nii.gz")
    tracemalloc.start()
    try:
        load_nifti(tmp_path / "a.nii.gz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6                            # 4 MB as uint8; 32 MB as float64
