"""Pictures: what goes in comes out, in every bit depth and orientation; files in folders; intensities."""
import os
import struct
import zlib

import cv2
import numpy as np
import pytest

from medficient_mini.userfiles import pictures
from medficient_mini.userfiles.pictures import intensity_range, load_picture, parse_window, stem_of, to_uint8

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def write(path, pixels):
    """Save grey or RGB(A) through OpenCV, which wants BGR(A)."""
    assert cv2.imwrite(str(path), pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][:pixels.shape[-1]]])
    return path


def write_tiff(path, pixels, **fields):
    """Save grey numbers (H, W) of any type as a TIFF whose fields are the given ones."""
    height, width = pixels.shape
    body = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    numbers = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: fields.get("photometric", 1), 273: 8,
               274: fields.get("orientation", 1), 277: 1, 278: height, 279: len(body),
               339: {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]}
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, n) for tag, n in numbers.items())
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(numbers)) + directory
                     + bytes(4))
    return path


def png_chunk(kind, body):
    """Frame a PNG chunk: its length, kind, body and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(orientation):
    """EXIF data of one field, the orientation."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)


def write_with_exif(path, pixels, orientation):
    """Save with an EXIF orientation, as JPEG if the folder is called so, else as PNG, whatever the name's ending."""
    if path.parent.name == "jpeg":
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
        block = b"Exif\0\0" + exif(orientation)
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    else:
        data = cv2.imencode(".png", pixels)[1].tobytes()
        data = data[:33] + png_chunk(b"eXIf", exif(orientation)) + data[33:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


# --------------------------------------------------------------------------------------------------- intensities

def test_windows():
    assert parse_window(["lung"]) == (-600, 1500) and parse_window(["40", "400"]) == (40, 400)
    assert parse_window(["-600", "1e3"]) == (-600, 1000) and parse_window(None) is None
    for bad in (["liver"], ["40"], ["40", "0"], ["40", "-5"], ["40", "x"], ["1", "2", "3"], ["nan", "4"], ["1", "inf"]):
        with pytest.raises(ValueError, match="--window: expected LEVEL WIDTH"):
            parse_window(bad)
    low, high, text = intensity_range(np.zeros(0), (40, 400))
    assert (low, high) == (-160, 240) and "level 40 width 400" in text
    numbers = [-1000, -160, 40, 240, 999, np.nan, np.inf, -np.inf]
    assert to_uint8(np.array(numbers), low, high).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


def test_percentiles_leave_out_zeros_and_what_is_not_finite():
    numbers = np.concatenate([np.zeros(5000), np.arange(1000, 2001), [np.nan, np.inf]])
    assert intensity_range(numbers, None)[:2] == (1005, 1995)
    assert intensity_range(np.zeros(10), None)[:2] == (0, 0)
    assert not to_uint8(np.zeros((3, 3)), 0, 0).any()


def test_numbers_of_any_size_keep_their_contrast():                             # fault 28: NIfTI of scale 1e-28
    ramp = np.arange(1000) * 1e-30
    low, high, _ = intensity_range(ramp, None)
    assert len(np.unique(to_uint8(ramp, low, high))) == 256


def test_one_number_on_zero_is_not_black(tmp_path):                             # fault 28
    image, _ = load_picture(write(tmp_path / "a.png", (GREY > 99).astype(np.uint16) * 1000))
    assert (image[..., 0] == (GREY > 99) * 255).all()


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_differences_far_from_zero_stay(tmp_path, dtype):                       # fault 28
    image, _ = load_picture(write_tiff(tmp_path / "a.tif", (100_000_000 + GREY.astype(dtype))))
    low, high = np.percentile(GREY, [0.5, 99.5])
    assert np.abs(image[..., 0] - (GREY.clip(low, high) - low) / (high - low) * 255).max() <= 1


def test_percentiles_are_of_all_channels_whatever_the_size(tmp_path, monkeypatch):      # fault 28
    monkeypatch.setattr(pictures, "SAMPLE", 600)
    colour = np.dstack([GREY, GREY * 0, GREY * 0]).astype(np.uint16)            # with every third number only red counted
    colour[..., 1] = 5000
    assert load_picture(write(tmp_path / "a.png", colour))[0][..., 1].min() == 255
    assert len(np.unique(load_picture(write(tmp_path / "b.png", colour[..., [1, 0, 2]]))[0][..., 1])) > 5


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_mapped_by_percentiles_or_window(tmp_path, suffix):
    ramp = np.arange(2000, 2600, dtype=np.uint16).reshape(20, 30)
    ramp[0] = 0
    image, text = load_picture(write(tmp_path / f"a.{suffix}", ramp))
    low, high = np.percentile(ramp[ramp > 0], [0.5, 99.5])
    assert f"{low:.9g} to {high:.9g}" in text
    assert np.abs(image[..., 0] - np.clip((ramp - low) / (high - low), 0, 1) * 255).max() <= 1
    image, text = load_picture(tmp_path / f"a.{suffix}", window=(2300, 100))
    assert "level 2300 width 100" in text and (image[ramp <= 2250] == 0).all() and (image[ramp >= 2350] == 255).all()


def test_float_tiff_and_a_window_on_8_bits(tmp_path):
    floats = RNG.normal(size=(20, 30)).astype(np.float32)
    image, _ = load_picture(write(tmp_path / "a.tif", floats))
    assert (np.diff(image[..., 0].ravel()[floats.ravel().argsort()].astype(int)) >= 0).all() and np.ptp(image) == 255
    image, _ = load_picture(write(tmp_path / "a.png", GREY), window=(100, 2))
    assert set(np.unique(image)) <= {0, 128, 255}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.float32])
def test_an_inverted_tiff_looks_as_it_is_meant_in_every_depth(tmp_path, dtype):         # fault 28
    numbers = (GREY // 2).astype(dtype)
    image, _ = load_picture(write_tiff(tmp_path / "a.tif", numbers, photometric=0))
    assert (np.diff(image[..., 0].ravel()[GREY.ravel().argsort()].astype(int)) <= 0).all() and np.ptp(image) > 99


# ------------------------------------------------------------------------------------------------- files and pictures

def test_names():
    assert [stem_of(n) for n in ("x/a.b.nii.gz", "a.NII", "a.tiff", "a.npz", "a")] == ["a.b", "a", "a", "a", "a"]


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "PNG"])
@pytest.mark.parametrize("pixels", [GREY, RGB, np.dstack([RGB, np.full_like(GREY, 255)])], ids=["grey", "rgb", "rgba"])
def test_8_bit_pictures_stay_as_they_are(tmp_path, suffix, pixels):
    image, text = load_picture(write(tmp_path / f"a.{suffix}", pixels))
    assert image.dtype == np.uint8 and text == "8 bits as they are"
    assert (image == (pixels[..., None].repeat(3, 2) if pixels.ndim == 2 else pixels[..., :3])).all()


def test_a_palette_is_expanded(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    picture = pil.fromarray(GREY % 3)
    picture.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    for suffix in ("png", "tif", "bmp"):
        picture.save(tmp_path / f"a.{suffix}")
        expected = np.array([[10, 20, 30], [200, 100, 0], [7, 8, 9]])[GREY % 3]
        assert (load_picture(tmp_path / f"a.{suffix}")[0] == expected).all()


@pytest.mark.parametrize("kind", ["jpeg/a.jpg", "jpeg/a.png", "png/a.png", "tiff/a.tif", "tiff16/a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_by_content_and_it_is_said(tmp_path, kind, orientation):    # fault 27
    stored = cv2.resize(RNG.integers(0, 256, (3, 4), dtype=np.uint8), (40, 30), interpolation=cv2.INTER_CUBIC)
    # What EXIF calls the sides of row 0 and column 0: top, bottom, left, right of the picture as seen.
    seen = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
            6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored)}[orientation]
    path = tmp_path / kind
    path.parent.mkdir()
    if kind.startswith("tiff"):
        write_tiff(path, stored.astype(np.uint16 if "16" in kind else np.uint8), orientation=orientation)
    else:
        write_with_exif(path, stored, orientation)
    image, text = load_picture(path, window=(127.5, 255) if "16" in kind else None)
    assert image.shape[:2] == seen.shape and np.abs(image[..., 0].astype(int) - seen).max() <= 3
    assert ("turned as its EXIF orientation says" in text) == (orientation > 1)


def fails(path, words):
    with pytest.raises(ValueError, match=f"^{path.name}: file: expected [^\n]*{words}[^\n]*$"):
        load_picture(path)


def test_bad_pictures_are_one_line(tmp_path, capfd):
    whole = write(tmp_path / "a.png", RGB).read_bytes()
    huge = bytearray(whole)
    huge[16:24] = struct.pack(">II", 30000, 30000)
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    flipped = bytearray(whole)
    flipped[600] ^= 64
    for name, data in {"cut.png": whole[:300], "text.png": b"hello", "empty.png": b"", "huge.png": huge,
                       "flipped.png": flipped, "cut.bmp": write(tmp_path / "b.bmp", RGB).read_bytes()[:900],
                       "cut.tif": write(tmp_path / "b.tif", RGB).read_bytes()[:900]}.items():
        (tmp_path / name).write_bytes(data)
        fails(tmp_path / name, "damaged or other data")
    with pytest.raises(FileNotFoundError):
        load_picture(tmp_path / "absent.png")
    pil = pytest.importorskip("PIL.Image")
    pil.fromarray(GREY).save(tmp_path / "pages.tif", save_all=True, append_images=[pil.fromarray(GREY)])
    fails(tmp_path / "pages.tif", "one PNG, JPEG, TIFF or BMP picture, found 2 pages")
    fields = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 212, 277: 1, 278: 8, 279: 64}
    big = struct.pack("<4sHHQQ", b"II+\0", 8, 0, 16, len(fields))
    big += b"".join(struct.pack("<HHQQ", tag, 4, 1, value) for tag, value in fields.items()) + bytes(8 + 64)
    assert cv2.imdecode(np.frombuffer(big, np.uint8), cv2.IMREAD_UNCHANGED).shape == (8, 8)
    (tmp_path / "big.tif").write_bytes(big)
    fails(tmp_path / "big.tif", "damaged or other data")                        # fault 28
    assert capfd.readouterr().err == ""                                         # fault 41


def test_a_damaged_jpeg_is_refused(tmp_path, capfd):                            # fault 29
    whole = cv2.imencode(".jpg", np.kron(RGB, np.ones((8, 8, 1), np.uint8)))[1].tobytes()
    middle = len(whole) // 2
    for name, data in {"cut": whole[:middle], "no_end": whole[:-2], "hole": whole[:middle] + whole[middle + 60:],
                       "zeros": whole[:middle - 60] + bytes(40) + whole[middle - 20:]}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
        fails(tmp_path / f"{name}.jpg", "damaged")
    thumbnail = b"Exif\0\0" + exif(1) + cv2.imencode(".jpg", RGB)[1].tobytes()
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    # A film behind the picture, as some telephones append it, may hold any two bytes.
    (tmp_path / "film.jpg").write_bytes(whole[:2] + thumbnail + whole[2:] + b"film \xff\xda")
    assert load_picture(tmp_path / "film.jpg")[0].shape == (160, 240, 3)
    comment = b"\xff\xfe\0\x05" + b"\xff\xd8\xff"
    (tmp_path / "comment.jpg").write_bytes(whole[:2] + comment + whole[2:])
    assert (load_picture(tmp_path / "comment.jpg")[0] == load_picture(tmp_path / "film.jpg")[0]).all()
    (tmp_path / "thumbnail.jpg").write_bytes(whole[:2] + thumbnail + whole[2:-2])
    fails(tmp_path / "thumbnail.jpg", "damaged")
    assert capfd.readouterr().err == ""                                         # fault 41


def test_other_threads_lines_are_not_lost(capfd, monkeypatch):
    def decode(*_):
        os.write(2, b"Corrupt JPEG data: bad\nfrom another thread\n")
        return True, [GREY]

    monkeypatch.setattr(cv2, "imdecodemulti", decode)
    assert pictures.pages_of(b"") == () and capfd.readouterr().err == "from another thread\n"


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_words_in_a_text_do_not_hide_a_turn(tmp_path, kind):                    # fault 28
    path = write_with_exif(tmp_path / kind / "a.x", GREY, 6)
    data = path.read_bytes()
    if kind == "png":
        data = data[:33] + png_chunk(b"tEXt", b"Comment\0eXIf, PLTE and Exif\0\0") + data[33:]
    else:
        comment = b"of Exif\0\0"
        data = data[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + data[2:]
    path.write_bytes(data)
    assert "turned as" in load_picture(path)[1]
