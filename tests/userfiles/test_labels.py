"""Label pictures: which number is which object, written and read; masks that are none are refused."""
import cv2
import numpy as np
import pytest
from test_pictures import RGB, png_chunk, write, write_tiff, write_with_exif

from medficient_mini.show.draw import colours
from medficient_mini.userfiles.labels import load_label_picture
from medficient_mini.userfiles.pictures import save_label_picture

LABELS = np.kron(np.array([[0, 1, 2], [2, 0, 3]], np.uint8), np.ones((10, 10), np.uint8))
DISC = cv2.circle(np.zeros((99, 99), np.uint8), (50, 50), 30, 255, -1)


@pytest.mark.parametrize("highest", [0, 3, 255, 300])
def test_label_pictures_round_trip(tmp_path, highest):
    labels = (np.arange(600).reshape(20, 30) % (highest + 1)).astype(np.uint16)
    save_label_picture(tmp_path / "a.png", labels)
    back, warning = load_label_picture(tmp_path / "a.png")
    assert (back == labels).all() and warning == [] and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_saved_mask_is_labels_to_programs_and_colours_to_viewers(tmp_path):   # fault 42
    pil = pytest.importorskip("PIL.Image")
    save_label_picture(tmp_path / "a.png", LABELS)
    picture = pil.open(tmp_path / "a.png")
    assert picture.mode == "P" and (np.asarray(picture) == LABELS).all()
    assert (np.asarray(picture.convert("RGB")) == colours(4)[LABELS]).all()
    assert (cv2.imread(str(tmp_path / "a.png"))[..., ::-1] == colours(4)[LABELS]).all()
    save_label_picture(tmp_path / "b.png", np.arange(600, dtype=np.uint16).reshape(20, 30))
    assert (cv2.imread(str(tmp_path / "b.png"), cv2.IMREAD_UNCHANGED) == np.arange(600).reshape(20, 30)).all()


def test_a_palettes_index_is_the_label(tmp_path):                               # fault 24
    pil = pytest.importorskip("PIL.Image")
    picture = pil.fromarray(LABELS)
    picture.putpalette([255, 255, 255, 200, 0, 0, 0, 0, 0, 0, 0, 200])          # 0 is white, 2 is black
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", transparency=1)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(data[:33] + png_chunk(b"tEXt", b"Comment\0PLTE of 4") + data[33:])
    for name in "abc":
        labels, warning = load_label_picture(tmp_path / f"{name}.png")
        assert (labels == LABELS).all() and warning == []
    for name in ("c.tif", "c.bmp"):
        picture.save(tmp_path / name)
        with pytest.raises(ValueError, match=f"^{name}: gts: expected labels with a palette as PNG, found another format$"):
            load_label_picture(tmp_path / name)


def test_grey_and_coloured_labels(tmp_path):
    table = np.array([[0, 0, 0], [0, 0, 255], [128, 0, 0], [128, 64, 0]], np.uint8)
    assert (load_label_picture(write(tmp_path / "rgb.png", table[LABELS]))[0] == LABELS).all()
    for name in ("a.png", "a.bmp", "a.tif"):
        assert (load_label_picture(write(tmp_path / name, LABELS * 85))[0] == LABELS * 85).all()
    white = (LABELS > 0).astype(np.uint8) * 255
    back, warning = load_label_picture(write(tmp_path / "white.png", np.dstack([white] * 3)))
    assert (back == white).all() and warning == []
    many = np.kron(np.arange(256).reshape(16, 16), np.ones((3, 3)))
    assert (load_label_picture(write(tmp_path / "many.png", many.astype(np.uint16)))[0] == many).all()
    with pytest.raises(ValueError, match="many.png: gts: expected labels or black and white, found 256 grey values"):
        load_label_picture(write(tmp_path / "many.png", many.astype(np.uint8)))
    with pytest.raises(ValueError, match="photo.png: gts: expected labels or black and white, found [0-9]+ grey values or colours"):
        load_label_picture(write(tmp_path / "photo.png", RGB))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("colour", [0, 255])
def test_a_mask_in_the_transparency_is_refused(tmp_path, name, colour):         # fault 25
    pixels = np.full((20, 30, 4), colour, np.uint8)
    for opacity in ((LABELS == 1) * 255, LABELS):
        pixels[..., 3] = opacity
        with pytest.raises(ValueError, match=f"^{name}: gts: expected an opaque mask, found transparency$"):
            load_label_picture(write(tmp_path / name, pixels))
    pixels[..., 3], pixels[..., :3] = 255, LABELS[..., None]
    assert (load_label_picture(write(tmp_path / name, pixels))[0] == LABELS).all()


def test_what_opencv_says_of_a_tiff_is_not_shown(tmp_path, capfd):                # fault 41
    pil = pytest.importorskip("PIL.Image")
    pil.fromarray(LABELS).save(tmp_path / "a.tif", tiffinfo={65000: "a field that it does not know"})
    assert (load_label_picture(tmp_path / "a.tif")[0] == LABELS).all() and capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.tif", "a.bmp"])
def test_transparency_that_cannot_be_read_is_refused(tmp_path, name):           # fault 25
    pil = pytest.importorskip("PIL.Image")
    white = np.full_like(LABELS, 255)
    channels = [white] * (1 if name == "a.tif" else 3) + [LABELS * 85]
    pil.merge("LA" if name == "a.tif" else "RGBA", [pil.fromarray(channel) for channel in channels]).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{name}: gts: expected an opaque mask, found transparency$"):
        load_label_picture(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.bmp"])
def test_masks_cut_short_are_one_line(tmp_path, name):                          # fault 41
    path = write(tmp_path / name, LABELS)
    whole = path.read_bytes()
    for length in (0, 2, 20, 27, 40, 60, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{name}: file: expected [^\n]*damaged or other data$"):
            load_label_picture(path)


@pytest.mark.parametrize("channels", [[1], [1, 1, 1], [1, 0, 0]], ids=str)
def test_soft_edges_are_refused(tmp_path, channels):                            # fault 26
    lines = np.zeros((200, 200), np.uint8)
    for k in range(4):
        cv2.line(lines, (5, 20 + k * 30), (190, 33 + k * 37), 255, 1, cv2.LINE_AA)
    disc = cv2.circle(np.zeros((40, 40), np.uint8), (20, 20), 6, 255, -1, cv2.LINE_AA)
    twice = cv2.resize((LABELS > 0).astype(np.uint8) * 255, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
    half = cv2.resize(DISC, (50, 50), interpolation=cv2.INTER_AREA)
    for grey in (lines, disc, twice, half):
        pixels = (grey[..., None] * np.array(channels, np.uint8)).squeeze()
        with pytest.raises(ValueError, match="^a.png: gts: expected labels or black and white[^\n]*soft edges[^\n]*$"):
            load_label_picture(write(tmp_path / "a.png", pixels))


@pytest.mark.parametrize("values", [(0, 85, 170, 255), (0, 128, 255), (0, 1, 2, 255), (0, 200, 255)], ids=str)
def test_solid_greys_stay_labels(tmp_path, values):                             # fault 26
    grey = np.zeros((60, 60), np.uint8)
    for k, value in enumerate(values):
        grey[12 * k:12 * k + 4 + 7 * (value == 255), 5:40] = value              # black and white are the fullest
    labels, warning = load_label_picture(write(tmp_path / "a.png", grey))
    assert (labels == grey).all() and warning == []


def test_a_jpeg_is_black_and_white_or_refused(tmp_path):                        # fault 26
    white = 255 * (DISC > 0).astype(np.uint8)
    labels, remarks = load_label_picture(write(tmp_path / "a.jpg", white))
    assert (labels == (white > 0)).mean() > 0.99 and 'cut at 128' in remarks[0]
    three = white.copy()
    three[:12, :12] = 128
    for wrong in (three, white // 255, white // 2):
        with pytest.raises(ValueError, match="^a.jpg: gts: expected a mask as PNG, TIFF or BMP, found a JPEG[^\n]*$"):
            load_label_picture(write(tmp_path / "a.jpg", wrong))


def test_pictures_that_are_no_masks_are_refused(tmp_path):                      # fault 26
    for name, pixels in (("noise.png", RGB[..., 0]), ("dark.png", DISC // 2)):
        if name == "dark.png":
            pixels = cv2.GaussianBlur(pixels, (0, 0), 1)
        with pytest.raises(ValueError, match=f"^{name}: gts: expected labels or black and white[^\n]*$"):
            load_label_picture(write(tmp_path / name, pixels))


def test_numbers_are_whole_within_a_thousandth(tmp_path):                       # fault 32
    nearly = LABELS.astype(np.float64) * 0.99999999977
    assert (load_label_picture(write_tiff(tmp_path / "a.tif", nearly))[0] == LABELS).all()
    for bad in (0.25, -1.0, 70000.0, np.nan, np.inf):
        path = write_tiff(tmp_path / "b.tif", np.where(LABELS == 3, bad, LABELS).astype(np.float32))
        with pytest.raises(ValueError, match=f"^b.tif: gts: expected whole numbers 0 to 65535, found {bad:g}$"):
            load_label_picture(path)


def test_a_turned_mask_is_said(tmp_path):                                       # fault 27
    labels, warning = load_label_picture(write_with_exif(tmp_path / "a.png", LABELS, 6))
    assert (labels == np.rot90(LABELS, -1)).all() and "a.png: gts: turned as its EXIF orientation" in warning[0]


def test_many_numbered_objects_stay(tmp_path):
    numbers = np.arange(121, dtype=np.uint8).repeat(4).reshape(22, 22)
    cv2.imwrite(str(tmp_path / "nuclei.png"), numbers)
    labels, remarks = load_label_picture(tmp_path / "nuclei.png")
    assert np.array_equal(labels, numbers) and not remarks
