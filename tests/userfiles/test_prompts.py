"""Boxes and points from the command line on users' own files."""
import argparse

import cv2
import numpy as np
import pytest
import torch
from fakes import BrightSam

from medficient_mini.inference.npz import read_case
from medficient_mini.userfiles.prompts import (Prompts, add_prompt_options, list_user_files, prompts_of, read_boxes, read_user_case,
                                     segment_points, write_user_case)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (30, 40), dtype=np.uint8)


def parse(words):
    parser = argparse.ArgumentParser()
    add_prompt_options(parser)
    return prompts_of(parser.parse_args(words.split()))


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
    assert parse("") == Prompts() and not parse("").given
    assert parse("--box 1 2 3 4 --box -1 2.5 3 4").boxes == [[1, 2, 3, 4], [-1, 2.5, 3, 4]]
    prompts = parse("--point 1 2 --point 3 4 --not 5 6 --window lung --axis coronal")
    assert prompts.points == [[1, 2], [3, 4]] and prompts.background == [[5, 6]] and prompts.at_hand
    assert prompts.window == (-600, 1500) and prompts.axis == "coronal"
    assert parse("--box 1 2 3 4 --z 3 9 --slice 4").z == (3, 9)


@pytest.mark.parametrize("words, line", [
    ("--box 1 2 3", "--box: expected 4"), ("--box 1 2 3 4 5 6 7", "--box"), ("--not 1 2", "--not"),
    ("--box 1 2 3 4 --box 1 2 3 4 --point 1 2", "--point"), ("--box 1 2 3 4 --boxes b.csv", "--boxes"),
    ("--box 1 2 3 4 --slice 2", "--slice"), ("--pick --box 1 2 3 4", "--pick"), ("--window heart --box 1 2 3 4", "--window"), ("--boxes absent.csv", "absent.csv")])
def test_bad_options_are_one_line(words, line):
    with pytest.raises(ValueError, match=f"^{line}[^\n]*$"):
        parse(words)


@pytest.mark.parametrize("text", [
    "file,x0,y0,x1,y1\na.png,1,2,3,4\nb.png, 5,6,7,8.5\na.png,9,9,10,10\n", "\ufefffile;x0;y0;x1;y1\r\na.png;1;2;3;4\r\n"
    "b.png;5;6;7;8.5\r\n\r\na.png;9;9;10;10", "a.png,1,2,3,4\nb.png,5,6,7,8.5\na.png,9,9,10,10"])
def test_tables(tmp_path, text):
    (tmp_path / "b.csv").write_text(text, encoding="utf-8")
    assert read_boxes(tmp_path / "b.csv") == {"a.png": [[1, 2, 3, 4], [9, 9, 10, 10]], "b.png": [[5, 6, 7, 8.5]]}


@pytest.mark.parametrize("text, line", [
    ("", "expected lines"), ("file,x0,y0,x1,y1\n", "expected lines"), ("a.png,1,2,3\n", "line 1"),
    ("file,x0\na.png,1,2,3,4\nb.png,1,2,x,4", "line 3: expected a file and 4 or 6 numbers, found b.png,1,2,x,4"),
    (",1,2,3,4", "line 1")])
def test_bad_tables_are_one_line(tmp_path, text, line):
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(ValueError, match=f"^b.csv: {line}"):
        read_boxes(tmp_path / "b.csv")


def test_the_table_chooses_the_files(tmp_path, picture):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.png", "sub/c.png", "d.png"):
        (tmp_path / name).write_bytes(picture.read_bytes())
    assert len(list_user_files(tmp_path, Prompts())) == 4
    prompts = Prompts(table={"sub/a.png": [[1, 2, 3, 4]], "d.png": [[0, 0, 9, 9]]})
    assert list_user_files(tmp_path, prompts) == [tmp_path / "d.png", tmp_path / "sub/a.png"]
    assert read_user_case(tmp_path / "sub/a.png", tmp_path, prompts).boxes.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="found no e.png"):
        list_user_files(tmp_path, Prompts(table={"e.png": [[1, 2, 3, 4]]}))


def test_a_picture_with_boxes_and_points(picture):
    case = read_user_case(picture, picture, parse("--box 1 2 50 20 --not 39.5 29"))
    assert (case.image == IMAGE[..., None]).all() and not case.is_3d and case.intensity == "8 bits as they are"
    assert case.boxes.tolist() == [[1, 2, 39, 20]] and len(case.warnings) == 1 and case.warnings[0].startswith("a.png: boxes")
    assert case.points.tolist() == [[39.5, 29]] and case.point_labels.tolist() == [0]
    case = read_user_case(picture, picture, parse("--point 3 4 --not 5 6 --window 100 50"))
    assert case.boxes.shape == (0, 4) and case.point_labels.tolist() == [1, 0] and "level 100" in case.intensity


@pytest.mark.parametrize("words, line", [
    ("--box 1 2 3 4 5 6", "boxes: expected 4 numbers"), ("--box 5 2 3 4", "boxes: expected the lower corner"),
    ("--box 50 2 60 4", "boxes: expected a box that touches"), ("--box nan 2 60 4", "boxes: expected finite"),
    ("--point 40 4", "points: expected them inside the 40×30 image, found 40 4"), ("--point nan 4", "points"),
    ("--box 1 2 3 4 --z 1 2", "--z: expected a NIfTI")])
def test_bad_prompts_on_a_picture(picture, words, line):
    with pytest.raises(ValueError, match=f"^a.png: {line}[^\n]*$"):
        read_user_case(picture, picture, parse(words))


def test_a_volume_with_boxes(volume):
    case = read_user_case(volume, volume, parse("--box 1 2 3 5 6 7 --box 0 0 0 7 8 12"))
    assert case.is_3d and case.boxes.tolist() == [[1, 2, 3, 5, 6, 7], [0, 0, 0, 7, 8, 9]] and len(case.warnings) == 1
    assert case.spacing.tolist() == [2, 1, 1] and case.start is None
    case = read_user_case(volume, volume, parse("--box 1 2 5 6 --z 3 7 --slice 4"))
    assert case.boxes.tolist() == [[1, 2, 3, 5, 6, 7]] and case.start.tolist() == [4]
    # Coronal slices lie along file axis 1; a box of four counts along axes 0 and 2. Rows run downward: 9 - 2, 9 - 6.
    case = read_user_case(volume, volume, parse("--box 1 2 5 6 --z 3 7 --slice 4 --axis coronal"))
    assert case.boxes.tolist() == [[1, 3, 3, 5, 7, 7]] and case.start.tolist() == [4]
    # Sagittal slices run to the left as file axis 0 does; columns to the back, rows downward.
    case = read_user_case(volume, volume, parse("--box 1 2 5 6 --z 3 7 --axis sagittal"))
    assert case.boxes.tolist() == [[1, 3, 3, 5, 7, 7]]


def test_boxes_on_a_reversed_axis(tmp_path):
    nib = pytest.importorskip("nibabel")
    nib.save(nib.Nifti1Image(np.zeros((8, 9, 10), np.uint8), np.diag([1.0, 1, -2, 1])), tmp_path / "v.nii")
    case = read_user_case(tmp_path / "v.nii", tmp_path, parse("--box 1 2 5 6 --z 3 7 --slice 4"))
    assert case.boxes.tolist() == [[7 - 5, 8 - 6, 9 - 7, 7 - 1, 8 - 2, 9 - 3]] and case.start.tolist() == [5]


@pytest.mark.parametrize("words, line", [
    ("--box 1 2 3 4", "boxes: expected 6 numbers"), ("--point 1 2", "--point, --not"), ("--box 1 2 9 5 6 3", "boxes"),
    ("--box 1 2 12 5 6 15", "boxes: expected a box that touches the 8×9×10 volume"),
    ("--box 1 2 3 4 --z 12 15", "boxes"), ("--box 1 2 3 4 --z 3 7 --slice 8", "--slice: expected")])
def test_bad_prompts_on_a_volume(volume, words, line):
    with pytest.raises(ValueError, match=f"^v.nii.gz: {line}[^\n]*$"):
        read_user_case(volume, volume, parse(words))


def test_results_of_a_picture(tmp_path, picture):
    case = read_user_case(picture, picture, parse("--box 1 2 5 6 --point 3 4"))
    segs = (IMAGE > 128).astype(np.uint8)
    write_user_case(tmp_path / "out", case, segs)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npz", "a_mask.png"]
    mask = cv2.imread(str(tmp_path / "out/a_mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.dtype == np.uint8 and (mask == segs).all()
    with np.load(tmp_path / "out/a.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["boxes", "intensity", "point_labels", "points", "segs"] and (file["segs"] == segs).all()
        assert str(file["intensity"]) == "8 bits as they are" and file["boxes"].tolist() == [[1, 2, 5, 6]]


def test_results_of_a_volume(tmp_path, volume):
    nib = pytest.importorskip("nibabel")
    case = read_user_case(volume, volume, parse("--box 1 2 3 5 6 7"))
    segs = (case.volume > 99).astype(np.uint16) * 300
    write_user_case(tmp_path / "out", case, segs)
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
            return torch.ones(1, 1, 256, 256), torch.ones(1, 1)

    model = Seen()
    segs = segment_points(model, read_user_case(picture, picture, parse("--point 3 4 --not 5 6")))
    assert segs.shape == IMAGE.shape and segs.dtype == np.uint8 and segs.all()
    boxes, (points, labels) = model.seen
    assert boxes is None and labels.tolist() == [[1, 0]]
    assert points[0].numpy() == pytest.approx(np.array([[3, 4], [5, 6]]) * 512 / 40)
    segment_points(model, read_user_case(picture, picture, parse("--box 1 2 20 25 --not 5 6")))
    assert model.seen[0][0].tolist() == pytest.approx([12.8, 25.6, 256, 320]) and model.seen[1][1].tolist() == [[0]]
