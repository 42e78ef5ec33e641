"""Pictures: what goes in comes out, in every bit depth; intensities; label pictures."""
import struct
import zlib

import cv2
import numpy as np
import pytest

from medficient_mini.userfiles.formats import (intensity_range, list_files, load_label_picture, load_picture,
                                     parse_window, read_pixels, save_label_picture, stem_of, to_uint8)

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
