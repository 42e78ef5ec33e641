"""Pictures: what is where, in which colour; and that every input shape and broken curve is drawn."""
import cv2
import numpy as np
import pytest

from medficient_mini.show.draw import colours, compare_row, contact_sheet, contours, curves, overlay, save_png, sheet


def disc(shape, centre, radius):
    y, x = np.ogrid[:shape[0], :shape[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius ** 2


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 1), (600, 30, 3)])
def test_overlay_tints_masks_and_draws_box_edges(shape):
    image, segs = np.full(shape, 100, np.uint8), np.zeros(shape[:2], np.int32)
    segs[10:20, 5:15], segs[10:20, 15:25] = 1, 2
    picture = overlay(image, segs, np.array([[5, 10, 14, 19], [1, 1, 3, 30]]))
    scale = max(1, -(-512 // max(shape[:2])))
    assert picture.shape == (shape[0] * scale, shape[1] * scale, 3) and picture.dtype == np.uint8
    assert (image == 100).all(), "the input must not be drawn into"
    at = lambda y, x: picture[int((y + 0.5) * scale), int((x + 0.5) * scale)].astype(int)
    assert (at(35, 27) == 100).all()
    assert colours(2)[1].tolist() == [55, 255, 55] and np.argmax(at(15, 10)) == 1, "label 1 is green"
    assert abs(at(15, 10) - (0.65 * 100 + 0.35 * colours(3)[1])).max() <= 1
    assert abs(at(15, 20) - (0.65 * 100 + 0.35 * colours(3)[2])).max() <= 1
    assert (picture[30 * scale + scale - 1, 2 * scale] == colours(3)[2]).all(), "the box holds its corner pixels"


def test_contours_match_a_loop():
    labels = np.random.default_rng(0).integers(0, 3, (12, 15)).astype(np.uint16)
    labels[3:9, 4:11] = 7
    for thickness in (1, 2):
        expected = np.zeros(labels.shape, bool)
        for y, x in np.argwhere(labels > 0):
            around = labels[max(0, y - thickness):y + thickness + 1, max(0, x - thickness):x + thickness + 1]
            expected[y, x] = (around != labels[y, x]).any()
        assert (contours(labels, thickness) == expected).all()


@pytest.mark.parametrize("channels", [(), (3,)])
def test_contact_sheet_shows_the_slices_in_use(channels):
    volume, segs = np.full((50, 30, 20) + channels, 50, np.uint8), np.zeros((50, 30, 20), np.uint8)
    segs[20:30, 5:25, 5:15] = 1
    sheet = contact_sheet(volume, segs, np.array([[5, 5, 20, 14, 24, 29]]))
    assert sheet.shape[:2] == (3 * 320, 4 * round(20 * 320 / 30))
    tinted = (sheet.max(-1) > 90).reshape(3, 320, 4, -1).mean((1, 3))
    assert (tinted.ravel()[:10] > 0.2).all() and (tinted.ravel()[10:] == 1).all(), "ten slices; the rest is white"
    assert contact_sheet(volume, segs * 0, np.zeros((0, 6))).shape == sheet.shape, "nothing segmented, no boxes"
    assert contact_sheet(volume[:1], segs[:1], np.zeros((0, 6))).shape[0] == 320


def test_compare_row_puts_truth_and_prediction_in_their_panels():
    image = np.zeros((64, 64), np.uint8)
    gts, segs = disc((64, 64), (20, 20), 10).astype(np.uint8), disc((64, 64), (44, 44), 10).astype(np.uint8)
    row = compare_row(image, gts, segs, "x" * 400 + " μ")
    assert row.shape == (24 + 320, 3 * 320, 3)
    green = (row[24:] == colours(2)[1]).all(-1)
    assert not green[:, :320].any()
    y, x = np.nonzero(green)
    assert (y[x < 640] < 160).all() and (x < 640).any()
    assert (y[x >= 640] > 160).all() and (x >= 640).any()


def test_colours_of_neighbouring_labels_differ():
    table = colours(300).astype(int)
    assert (table[0] == 0).all() and (np.abs(np.diff(table[1:], axis=0)).sum(-1) > 100).all()


def test_curves_draw_what_there_is(tmp_path):
    nan = float("nan")
    path = tmp_path / "new" / "curves.png"
    curves({"loss": [1.0, 0.5, 0.2, 0.1], "dsc": [nan, 0.5, nan, 0.7], "none": [nan] * 4, "lr": [-1e-4] * 4},
           [0, 10, 20, 30], path)
    picture = cv2.imread(str(path))
    assert picture.shape == (600, 1560, 3)
    panels = picture.reshape(2, 300, 3, 520, 3)
    blue = (panels[..., 2] < 60) & (panels[..., 0] > 150)                     # (2, 300, 3, 520)
    assert blue.any((1, 3)).ravel().tolist() == [True, True, False, True, False, False]
    loss = np.argwhere(blue[0, :, 0])
    assert loss[loss[:, 1].argmin(), 0] < 60 and loss[loss[:, 1].argmax(), 0] > 240, "from above left to below right"
    assert np.argwhere(blue[0, :, 1])[:, 1].min() > 150, "the axis is the same in all panels"
    curves({"loss": [0.5]}, [10], path)
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_sheet_fills_the_last_row():
    pictures = [np.zeros((4, 5, 3), np.uint8)] * 3
    assert sheet(pictures, 3).shape == (4, 15, 3) and sheet(pictures, 2).shape == (8, 10, 3)
    assert (sheet(pictures, 2)[4:, 5:] == 255).all() and len(pictures) == 3


def test_save_png_keeps_colours_and_leaves_no_temporary_file(tmp_path):
    picture = np.zeros((5, 7, 3), np.uint8)
    picture[..., 0] = 200
    save_png(tmp_path / "a.png", picture)
    assert (cv2.cvtColor(cv2.imread(str(tmp_path / "a.png")), cv2.COLOR_BGR2RGB) == picture).all()
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OSError):
        save_png(tmp_path / "b.png", picture)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
