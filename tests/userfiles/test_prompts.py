"""Boxes and points from the command line and from CSV files, on users' own files."""
import argparse
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import BrightSam

from medficient_mini.inference.compose import Composition
from medficient_mini.inference.npz import read_case
from medficient_mini.userfiles.prompts import (add_prompt_options, check_prompts, list_user_files, read_boxes,
                                               read_user_case, segment_points)
from medficient_mini.userfiles.results import write

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (30, 40), dtype=np.uint8)


def parse(words, source="."):
    parser = argparse.ArgumentParser()
    add_prompt_options(parser)
    arguments = parser.parse_args(words.split())
    arguments.input = Path(source)
    check_prompts(arguments)
    return arguments


def read(path, words):
    arguments = parse(words, path)
    return read_user_case(path, arguments.box, arguments)


@pytest.fixture
def picture(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), IMAGE)
    return tmp_path / "a.png"


@pytest.fixture
def volume(tmp_path):
    """File axes run to the left, to the back and upward: indices are those of the slices."""
    nib = pytest.importorskip("nibabel")
    data = RNG.integers(0, 256, (8, 9, 10), dtype=np.uint8)
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, 2, 1])), tmp_path / "v.nii.gz")
    return tmp_path / "v.nii.gz"


def test_options():
    assert parse("--box 1 2 3 4 --box -1 2.5 3 4").box == [[1, 2, 3, 4], [-1, 2.5, 3, 4]] and not parse("").box
    arguments = parse("--point 1 2 --point 3 4 --not 5 6 --window lung --axis coronal")
    assert arguments.point == [[1, 2], [3, 4]] and arguments.background == [[5, 6]] and arguments.window == (-600, 1500)


@pytest.mark.parametrize("words, line", [
    ("--box 1 2 3", "--box: expected 4"), ("--box 1 2 3 4 5 6 7", "--box"), ("--not 1 2", "--not"),
    ("--box 1 2 3 4 --box 1 2 3 4 --point 1 2", "--point"), ("--box 1 2 3 4 --boxes b.csv", "--boxes"),
    ("--point 1 2 --boxes b.csv", "--boxes"), ("--box 1 2 3 4 --slice 2", "--slice"),
    ("--box 1 2 3 4 --z 3 8 --slice 9", "--slice: expected one of those of --z beside it, found 9 and"),
    ("--box 1 2 3 4 5 6 --z 3 8", "--z: expected a --box of 4 numbers"),
    ("--pick --box 1 2 3 4", "--pick"), ("--window heart --box 1 2 3 4", "--window")])
def test_bad_options_are_one_line(words, line):
    with pytest.raises(ValueError, match=f"^{line}[^\n]*$"):
        parse(words)


@pytest.mark.parametrize("text", [
    "file,x0,y0,x1,y1\na.png,1,2,3,4\nb.png, 5,6,7,8.5\na.png,9,9,10,10\n",
    "\ufeffName;X_min;y_min;x_max;y_max\r\na.png;1;2;3;4\r\nb.png;5;6;7;8.5\r\n\r\n;;;;\r\na.png;9;9;10;10",
    "a.png,1,2,3,4\nb.png,5,6,7,8.5\na.png,9,9,10,10\n  \n"])
def test_tables(tmp_path, text):
    (tmp_path / "b.csv").write_text(text, encoding="utf-8")
    assert read_boxes(tmp_path / "b.csv") == {"a.png": [[1, 2, 3, 4], [9, 9, 10, 10]], "b.png": [[5, 6, 7, 8.5]]}


@pytest.mark.parametrize("text, line", [
    ("", "file: expected lines"), ("file,x0,y0,x1,y1\n", "file: expected lines"), ("a.png,1,2,3\n", "line 1"),
    ("file,x0,y0,x1,y1\na.png,1,2,3,4\nb.png,1,2,x,4", "line 3: expected a file and x0 y0 x1 y1 or i0 j0 k0 i1 j1 k1, found b.png,1,2,x,4"),
    (",1,2,3,4", "line 1"),
    # fault 36: a heading that was skipped unread, and a first line whose units made it look like one
    ("file,y0,x0,y1,x1\na.png,1,2,3,4\n", "line 1"), ("file,x0\na.png,1,2,3,4\n", "line 1"),
    ("a.png,1px,2px,3px,4px\nb.png,1,2,3,4\n", "line 1"), ("file,x,y,w,h\na.png,1,2,3,4", "line 1")])
def test_bad_tables_are_one_line(tmp_path, text, line):
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(ValueError, match=f"^b.csv: {line}[^\n]*$"):
        read_boxes(tmp_path / "b.csv")


def test_the_table_chooses_the_files(tmp_path, picture):
    """Fault 36: an absent name costs its line, and names are compared in one Unicode form."""
    (tmp_path / "sub").mkdir()
    accented = unicodedata.normalize("NFD", "é.png")
    for name in ("sub/a.png", "sub/c.png", "d.png", accented):
        (tmp_path / name).write_bytes(picture.read_bytes())
    assert list(list_user_files(parse("--box 1 2 3 4", tmp_path))[0].values()) == [[[1, 2, 3, 4]]] * 5
    table = tmp_path / "b.csv"
    table.write_text("sub/a.png,1,2,3,4\nc.png,0,0,9,9\ne.png,1,2,3,4\né.png,5,5,6,6\n", encoding="utf-8")
    chosen, wrong = list_user_files(parse(f"--boxes {table}", tmp_path))
    assert chosen == {tmp_path / accented: [[5, 5, 6, 6]], tmp_path / "sub/a.png": [[1, 2, 3, 4]],
                      tmp_path / "sub/c.png": [[0, 0, 9, 9]]}
    assert len(wrong) == 1 and wrong[0].startswith("e.png: ")
    table.write_text("a.png,1,2,3,4\n")
    assert list(list_user_files(parse(f"--boxes {table}", tmp_path))[0]) == [picture]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/c.png").write_bytes(picture.read_bytes())
    table.write_text("c.png,1,2,3,4\n")
    assert list_user_files(parse(f"--boxes {table}", tmp_path)) == (
        {tmp_path / name: [[1, 2, 3, 4]] for name in ("other/c.png", "sub/c.png")}, [])
    table.write_text("e.png,1,2,3,4\n")
    with pytest.raises(ValueError, match="found none of them"):
        list_user_files(parse(f"--boxes {table}", tmp_path))


def test_matching_a_table_takes_one_look_at_each_file(tmp_path, monkeypatch):  # fault 16
    """Fault 16: with 400 files the names were compared 160,000 times."""
    from medficient_mini.userfiles import prompts
    files, calls = [tmp_path / f"{k}.png" for k in range(400)], []
    monkeypatch.setattr(prompts, "list_images", lambda *_: files)
    monkeypatch.setattr(prompts, "composed", lambda name: calls.append(name) or name)
    (tmp_path / "b.csv").write_text("".join(f"{k}.png,1,2,3,4\n" for k in range(400)))
    assert len(list_user_files(parse(f"--boxes {tmp_path / 'b.csv'}", tmp_path))[0]) == 400 and len(calls) <= 1200


def test_a_picture_with_boxes_and_points(picture):
    case = read(picture, "--box 1 2 50 20 --not 39.5 29")
    assert (case.pixels == IMAGE[..., None]).all() and not case.is_3d and case.intensity == "8 bits as they are"
    assert case.boxes.tolist() == [[1, 2, 39, 20]]
    assert len(case.warnings) == 1 and case.warnings[0].startswith("a.png: boxes")
    assert case.points.tolist() == [[39.5, 29]] and case.point_labels.tolist() == [0]
    case = read(picture, "--point 3 4 --not 5 6 --window 100 50")
    assert case.boxes.shape == (0, 4) and case.point_labels.tolist() == [1, 0] and "level 100" in case.intensity
    assert len(case.warnings) == 1 and case.warnings[0].startswith("a.png: points without a box")


@pytest.mark.parametrize("words, line", [
    ("--box 1 2 3 4 5 6", "boxes: expected shape"), ("--box 5 2 3 4", "boxes: expected the lower corner"),
    ("--box 50 2 60 4", "boxes: expected a box that touches"), ("--box nan 2 60 4", "boxes: expected finite"),
    ("--point 40 4", "points: expected them in"), ("--point nan 4", "points"),
    ("--box 1 2 3 4 --z 1 2", "--z: expected a volume")])
def test_bad_prompts_on_a_picture(picture, words, line):
    with pytest.raises(ValueError, match=f"^{line}[^\n]*$"):
        read(picture, words)


def test_a_volume_with_boxes(volume):
    case = read(volume, "--box 1 2 3 5 6 7 --box 0 0 0 7 8 12")
    assert case.is_3d and case.boxes.tolist() == [[1, 2, 3, 5, 6, 7], [0, 0, 0, 7, 8, 9]] and len(case.warnings) == 1
    assert case.spacing.tolist() == [2, 1, 1] and case.drawn_slice is None
    case = read(volume, "--box 1 2 5 6 --z 3 7 --slice 4")
    assert case.boxes.tolist() == [[1, 2, 3, 5, 6, 7]] and case.drawn_slice.tolist() == [4]
    # Coronal slices lie along file axis 1; a box of four counts along axes 0 and 2. Rows run downward: 9 - 2, 9 - 6.
    case = read(volume, "--box 1 2 5 6 --z 3 7 --slice 4 --axis coronal")
    assert case.boxes.tolist() == [[1, 3, 3, 5, 7, 7]] and case.drawn_slice.tolist() == [4]
    # Sagittal slices run to the left as file axis 0 does; columns to the back, rows downward.
    assert read(volume, "--box 1 2 5 6 --z 3 7 --axis sagittal").boxes.tolist() == [[1, 3, 3, 5, 7, 7]]
    assert read(volume, "--pick").boxes.shape == (0, 6)


def test_boxes_on_a_reversed_axis(tmp_path):
    nib = pytest.importorskip("nibabel")
    nib.save(nib.Nifti1Image(np.zeros((8, 9, 10), np.uint8), np.diag([1.0, 1, -2, 1])), tmp_path / "v.nii")
    case = read(tmp_path / "v.nii", "--box 1 2 5 6 --z 3 7 --slice 4")
    assert case.boxes.tolist() == [[7 - 5, 8 - 6, 9 - 7, 7 - 1, 8 - 2, 9 - 3]] and case.drawn_slice.tolist() == [5]


@pytest.mark.parametrize("words, line", [
    ("--box 1 2 3 4", "boxes: expected 6 numbers"), ("--point 1 2", "--point, --not"), ("--box 1 2 9 5 6 3", "boxes"),
    ("--box 1 2 12 5 6 15", "boxes: expected a box that touches the 8×9×10"),
    ("--box 1 2 3 4 --z 12 15", "boxes")])
def test_bad_prompts_on_a_volume(volume, words, line):
    with pytest.raises(ValueError, match=f"^{line}[^\n]*$"):
        read(volume, words)


def options(folder):
    return argparse.Namespace(output=folder, overlay=None, own_files=True, separate=False)


def composition(segs):
    found = Composition(segs.shape, int(segs.max()))
    found.labels[:] = segs
    return found


def test_results_of_a_picture(tmp_path, picture):
    case = read(picture, "--box 1 2 5 6 --point 3 4")
    segs = (IMAGE > 128).astype(np.uint8)
    write(case, composition(segs), options(tmp_path / "out"), "{}", 1.0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npz", "a_mask.png", "a_overlay.png",
                                                                       "efficiency.csv"]
    with np.load(tmp_path / "out/a.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["boxes", "intensity", "made_with", "point_labels", "points", "segs"]
        assert (file["segs"] == segs).all() and str(file["made_with"]) == "{}"
        assert str(file["intensity"]) == "8 bits as they are" and file["boxes"].tolist() == [[1, 2, 5, 6]]


def test_results_of_a_volume(tmp_path, volume):
    nib = pytest.importorskip("nibabel")
    case = read(volume, "--box 1 2 3 5 6 7")
    segs = (case.pixels > 99).astype(np.uint16) * 300
    write(case, composition(segs), options(tmp_path / "out"), "{}", 1.0)
    before, mask = nib.load(volume), nib.load(tmp_path / "out" / "v_mask.nii.gz")
    assert (mask.affine == before.affine).all() and mask.get_data_dtype() == np.uint16
    assert (np.asarray(mask.dataobj) == (np.asarray(before.dataobj) > 99) * 300).all()
    with np.load(tmp_path / "out" / "v.npz", allow_pickle=False) as file:
        assert file["spacing"].tolist() == [2, 1, 1] and (file["segs"] == segs).all() and "points" not in file.files
    with pytest.raises(ValueError, match="imgs"):            # a result is no case
        read_case(tmp_path / "out" / "v.npz")


def test_points_and_a_box_reach_the_network(picture):
    class Seen(BrightSam):
        def decode(self, embedding, boxes=None, points=None, masks=None, image_index=None, multimask=False):
            self.seen = boxes, points
            logits, iou = super().decode(embedding, boxes=embedding.new_tensor([[0, 0, 511, 511]]))
            return logits.abs() + 1, iou

    model = Seen()
    case = read(picture, "--point 3 4 --not 5 6")
    segs = segment_points(model, case)
    assert segs.labels.shape == IMAGE.shape and segs.labels.dtype == np.uint8 and segs.labels.all()
    assert segs.mask_sizes.tolist() == [IMAGE.size]
    boxes, (points, labels) = model.seen
    # A lone point may come with SAM's padding point; the given ones come first.
    assert boxes is None and labels[0, :2].tolist() == [1, 0]
    assert points[0, :2].numpy() == pytest.approx(np.array([[3, 4], [5, 6]]) * 512 / 40)
    segment_points(model, read(picture, "--box 1 2 20 25 --not 5 6"))
    assert model.seen[0][0].tolist() == pytest.approx([12.8, 25.6, 256, 320]) and model.seen[1][1][0, 0] == 0
