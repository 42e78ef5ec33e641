"""Pictures and NIfTI volumes: what goes in comes out, in every bit depth and in all 48 orientations."""
import itertools
import struct
import zlib

import cv2
import numpy as np
import pytest

from medficient_mini import formats
from medficient_mini.cases import check_boxes
from medficient_mini.formats import (grid_of, intensity_range, list_files, load_label_nifti, load_label_picture,
                                     load_nifti, load_picture, parse_window, read_pixels, save_label_nifti,
                                     save_label_picture, stem_of, to_uint8)

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def write(path, pixels):
    """Save grey or RGB(A) through OpenCV, which wants BGR(A)."""
    order = {2: Ellipsis, 3: np.s_[..., [2, 1, 0, 3][:pixels.shape[-1]]]}[pixels.ndim]
    assert cv2.imwrite(str(path), pixels[order])
    return path


# --------------------------------------------------------------------------------------------------- intensities

def test_windows():
    assert parse_window(["lung"]) == (-600, 1500) and parse_window(["40", "400"]) == (40, 400) and parse_window(None) is None
    assert parse_window(["-600", "1e3"]) == (-600, 1000)
    for bad in (["liver"], ["40"], ["40", "0"], ["40", "-5"], ["40", "x"], ["1", "2", "3"], ["nan", "4"], ["1", "inf"]):
        with pytest.raises(ValueError, match="--window: expected LEVEL WIDTH"):
            parse_window(bad)
    low, high, text = intensity_range(np.zeros(0), (40, 400))
    assert (low, high) == (-160, 240) and "level 40 width 400" in text
    assert to_uint8([-1000, -160, 40, 240, 999, np.nan, np.inf, -np.inf], low, high).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


def test_percentiles_leave_out_zeros_and_what_is_not_finite():
    numbers = np.concatenate([np.zeros(5000), np.arange(1000, 2001), [np.nan, np.inf]])
    low, high, _ = intensity_range(numbers, None)
    assert (low, high) == (1005, 1995)
    assert intensity_range(np.zeros(10), None)[:2] == (0, 0)
    assert not to_uint8(np.zeros((3, 3)), 0, 0).any()


def test_files_are_listed_by_their_endings(tmp_path):
    for name in ("a.PNG", "b.nii.gz", "c.npz", "d.txt", ".e.png"):
        (tmp_path / name).touch()
    assert [p.name for p in list_files(tmp_path)] == ["a.PNG", "b.nii.gz"]
    for bad in ("d.txt", "absent"):
        with pytest.raises(ValueError, match=bad):
            list_files(tmp_path / bad)
    with pytest.raises(ValueError, match="found none"):
        list_files(tmp_path, (".bmp",))
    assert [stem_of(n) for n in ("x/a.b.nii.gz", "a.NII", "a.tiff", "a.npz", "a")] == ["a.b", "a", "a", "a", "a"]


# ------------------------------------------------------------------------------------------------------ pictures

@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "PNG"])
@pytest.mark.parametrize("pixels", [GREY, RGB, np.dstack([RGB, np.full_like(GREY, 255)])], ids=["grey", "rgb", "rgba"])
def test_8_bit_pictures_stay_as_they_are(tmp_path, suffix, pixels):
    path = write(tmp_path / f"a.{suffix}", pixels)
    image, text = load_picture(path)
    assert image.dtype == np.uint8 and "as they are" in text
    assert (image == (pixels[..., None].repeat(3, 2) if pixels.ndim == 2 else pixels[..., :3])).all()


def test_a_palette_is_expanded(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    picture = pil.fromarray(GREY % 3)
    picture.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    for suffix in ("png", "tif", "bmp"):
        picture.save(tmp_path / f"a.{suffix}")
        expected = np.array([[10, 20, 30], [200, 100, 0], [7, 8, 9]])[GREY % 3]
        assert (read_pixels(tmp_path / f"a.{suffix}") == expected).all()


def test_a_jpeg_is_turned_as_viewers_turn_it(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    exif = pil.Exif()
    exif[0x112] = 6                                                       # rotate by 90° clockwise to display
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:20, :20] = 255
    pil.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_pixels(tmp_path / "a.jpg")
    assert image.shape == (64, 40, 3) and image[5, 35].min() > 200 and image[60, 5].max() < 50


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_mapped_by_percentiles_or_window(tmp_path, suffix):
    ramp = np.arange(2000, 2600, dtype=np.uint16).reshape(20, 30)
    ramp[0] = 0
    image, text = load_picture(write(tmp_path / f"a.{suffix}", ramp))
    low, high = np.percentile(ramp[ramp > 0], [0.5, 99.5])
    assert f"{low:g} to {high:g}" in text
    expected = np.floor(np.clip((ramp - low) / (high - low), 0, 1) * 255 + 0.5)
    assert np.abs(image[..., 0] - expected).max() <= 1 and image.min() == 0 and image.max() == 255
    image, text = load_picture(tmp_path / f"a.{suffix}", window=(2300, 100))
    assert "level 2300 width 100" in text and (image[ramp <= 2250] == 0).all() and (image[ramp >= 2350] == 255).all()
    colour = np.dstack([ramp, ramp // 2, ramp * 2])
    assert load_picture(write(tmp_path / f"b.{suffix}", colour))[0].shape == (20, 30, 3)


def test_float_tiff_and_a_window_on_8_bits(tmp_path):
    floats = RNG.normal(size=(20, 30)).astype(np.float32)
    image, _ = load_picture(write(tmp_path / "a.tif", floats))
    assert (np.diff(image[..., 0].ravel()[floats.ravel().argsort()].astype(int)) >= 0).all() and np.ptp(image) == 255
    image, _ = load_picture(write(tmp_path / "a.png", GREY), window=(100, 2))
    assert set(np.unique(image)) <= {0, 128, 255}


def test_bad_pictures_are_one_line(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    whole = write(tmp_path / "a.png", RGB).read_bytes()
    huge = bytearray(whole)
    huge[16:24] = struct.pack(">II", 30000, 30000)
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    for name, data in {"cut.png": whole[:300], "text.png": b"hello", "empty.png": b"", "huge.png": huge}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"^{name}: file: expected [^\n]*$"):
            load_picture(tmp_path / name)
    with pytest.raises(ValueError, match="^absent.png: file"):
        load_picture(tmp_path / "absent.png")
    pil.fromarray(GREY).save(tmp_path / "pages.tif", save_all=True, append_images=[pil.fromarray(GREY)])
    with pytest.raises(ValueError, match="pages.tif: file: expected one picture, found 2 pages"):
        load_picture(tmp_path / "pages.tif")


@pytest.mark.parametrize("highest", [3, 255, 300])
def test_label_pictures_round_trip(tmp_path, highest):
    labels = (np.arange(600).reshape(20, 30) % (highest + 1)).astype(np.uint8 if highest < 256 else np.uint16)
    save_label_picture(tmp_path / "a.png", labels)
    assert cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED).dtype == labels.dtype
    back, warning = load_label_picture(tmp_path / "a.png")
    assert (back == labels).all() and warning is None and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_masks_of_other_kinds(tmp_path):
    labels = np.kron(np.array([[0, 1, 2], [2, 0, 3]], np.uint8), np.ones((10, 10), np.uint8))
    colours = np.array([[0, 0, 0], [0, 0, 255], [128, 0, 0], [128, 64, 0]], np.uint8)
    assert (load_label_picture(write(tmp_path / "rgb.png", colours[labels]))[0] == labels).all()
    black_white = ((labels > 0) * 255).astype(np.uint8)
    back, warning = load_label_picture(write(tmp_path / "a.png", np.dstack([black_white] * 3)))
    assert ((back == 255) == (labels > 0)).all() and set(np.unique(back)) == {0, 255} and warning is None
    disc = cv2.GaussianBlur(cv2.circle(np.zeros((99, 99), np.uint8), (50, 50), 30, 255, -1), (0, 0), 1)
    back, warning = load_label_picture(write(tmp_path / "soft.jpg", disc))
    assert set(np.unique(back)) == {0, 1} and abs(int(back.sum()) - 2827) < 60 and "cut at 128" in warning
    void = labels * 1
    void[:, 9:11] = 255                                                   # a "don't care" border is no soft edge
    assert (load_label_picture(write(tmp_path / "void.png", void))[0] == void).all()
    with pytest.raises(ValueError, match="many.png: gts: expected at most 255 colours"):
        load_label_picture(write(tmp_path / "many.png", RGB))
    with pytest.raises(ValueError, match="half.tif: gts: expected whole numbers"):
        load_label_picture(write(tmp_path / "half.tif", labels.astype(np.float32) / 2))


# --------------------------------------------------------------------------------------------------------- NIfTI

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
