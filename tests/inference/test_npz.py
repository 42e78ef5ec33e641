"""The one reader of NPZ files: every bad file is one line, the same for all who read; good ones come out checked."""
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import odd_inputs  # noqa: E402
from medficient_mini.inference.boxes import check_boxes, check_points  # noqa: E402
from medficient_mini.inference.npz import (list_cases, modality_of, read_case, read_header, read_labels,  # noqa: E402
                                           write_segs)

SHARED = Path(__file__).resolve().parents[3] / "shared"
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
VOLUME = RNG.integers(0, 256, (9, 30, 40), dtype=np.uint8)


def save(folder, name="2D_CT_a.npz", **arrays):
    """A case of RGB and one box, with these fields changed, or left out where they are None."""
    arrays = {"imgs": RGB, "boxes": np.array([[1, 2, 20, 25]]), **arrays}
    np.savez(folder / name, **{field: array for field, array in arrays.items() if array is not None})
    return folder / name


def error_of(function, *arguments, **options):
    """The line of its ValueError, "" where it has none."""
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------ the corpus

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    odd_inputs.make(folder)
    return folder


# Faults 7, 8, 23 and 41.
@pytest.mark.parametrize("name", [*odd_inputs.right_cases(), *odd_inputs.wrong_headers(), *odd_inputs.wrong_numbers()])
def test_inference_training_and_evaluation_give_the_same_answer(corpus, name):
    path, fault = corpus / name, odd_inputs.fault_of(name)
    whole = error_of(read_case, path, need_gts=True)
    header = error_of(read_header, path, need_gts=True)
    labels = error_of(read_labels, path, "gts")
    for line in filter(None, (whole, header, labels)):
        assert line.startswith(f"{name}: ") and "expected" in line and "found" in line and len(line.splitlines()) == 1
    assert bool(whole) == (fault in ("imgs", "boxes", "gts", "file"))
    if fault in ("imgs", "gts", "file"):
        in_header = name in odd_inputs.wrong_headers()
        assert header == (whole if in_header else "")
        if in_header and "missing" not in name or fault == "gts":
            assert labels == whole
    elif fault == "spacing":
        assert not header and ("spacing: expected" in labels or "missing" in name)
    elif "objects" not in name:
        assert not header and not labels
    if not fault:
        case, described = read_case(path, need_gts=True), read_header(path)
        assert (case.is_3d, case.shape, case.modality) == (described.is_3d, described.shape, described.modality)
        assert case.is_3d or case.pixels.flags.writeable and case.pixels.flags.c_contiguous
        assert (read_labels(path, "gts")[0] == case.gts).all() and described.has_gts


def test_whichever_byte_is_damaged_the_answer_is_one_line_or_the_same_case(tmp_path):
    whole = save(tmp_path).read_bytes()
    for at in [*range(0, 260, 7), *range(3600, len(whole), 13)]:       # headers and directory, not the pixels
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / "hit.npz").write_bytes(damaged)
        line = error_of(read_case, tmp_path / "hit.npz")
        if line:
            assert line.startswith("hit.npz: ") and "\n" not in line
        else:
            case = read_case(tmp_path / "hit.npz")
            assert (case.pixels == RGB).all() and case.boxes.tolist() == [[1, 2, 20, 25]]
    assert "No such file" in error_of(read_case, tmp_path / "absent.npz")
    assert "unreadable" in error_of(read_case, tmp_path)


# The brother of fault 39.
def test_files_that_never_arrived_are_called_what_they_are(corpus):
    for name, words in {"empty": "an empty file", "page": "a web page", "pointer": "git lfs pull"}.items():
        assert words in error_of(read_header, corpus / f"2D_CT_file-{name}.npz")


# --------------------------------------------------------------------------------------------------------- pixels

def test_an_image_and_a_volume_come_back_as_they_are(tmp_path):
    case = read_case(save(tmp_path))
    assert (case.pixels == RGB).all() and not case.is_3d and case.name == "2D_CT_a.npz"
    assert case.boxes.dtype == np.float64 and case.boxes.tolist() == [[1, 2, 20, 25]] and not case.warnings
    path = save(tmp_path, "3D_MR_a.npz", imgs=VOLUME, boxes=np.array([[1, 2, 3, 20, 25, 8]]),
                spacing=np.array([3, 1, 1]), gts=(VOLUME > 99).astype(np.int64))
    case = read_case(path, need_gts=True)
    assert (case.pixels == VOLUME).all() and case.modality == "MR" and case.gts.dtype == np.uint8
    assert (case.gts == (VOLUME > 99)).all() and case.spacing.tolist() == [3, 1, 1]
    assert read_case(path, need_boxes=False).boxes is None and read_case(path).gts is None


@pytest.mark.parametrize("name, shape, columns, is_3d", [
    ("a.npz", (30, 40), 4, False), ("a.npz", (30, 40, 3), 4, False), ("a.npz", (30, 40, 1), 4, False),
    ("a.npz", (30, 40, 4), 4, False), ("a.npz", (9, 30, 3), 6, True), ("a.npz", (9, 30, 40), 6, True),
    ("a.npz", (9, 30, 40, 3), 6, True), ("3D_CT_a.npz", (9, 30, 3), 6, True), ("3DBox_CT_a.npz", (9, 30, 4), 6, True),
    ("2DBox_CT_a.npz", (9, 30, 3), 4, False), ("2D_CT_a.npz", (30, 40), 4, False)])
def test_the_name_or_the_shapes_decide_the_dimension(tmp_path, name, shape, columns, is_3d):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    path = save(tmp_path, name, imgs=pixels, boxes=np.zeros((2, columns)))
    case = read_case(path)
    assert case.is_3d == is_3d == read_header(path).is_3d and case.boxes.shape == (2, columns)
    if is_3d:
        assert (case.pixels == pixels).all()
    else:
        assert case.pixels.shape == (*shape[:2], 3)
        assert (case.pixels == np.broadcast_to(pixels.reshape(*shape[:2], -1)[..., :3], case.pixels.shape)).all()


def test_masks_tell_a_narrow_volume_from_a_colour_image(tmp_path):
    path = save(tmp_path, "a.npz", imgs=VOLUME[..., :3], gts=VOLUME[..., :3] // 99, boxes=np.zeros(0))
    assert read_header(path).is_3d and read_case(path).is_3d and read_labels(path, "gts")[0].shape == (9, 30, 3)
    path = save(tmp_path, "a.npz", imgs=VOLUME[..., :3], gts=VOLUME[..., 0] // 99, boxes=np.zeros(0))
    assert not read_header(path).is_3d and read_case(path, need_gts=True).pixels.shape == (9, 30, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.int16, np.uint16, np.int64])
@pytest.mark.parametrize("order", "CF")
def test_other_types_within_0_255_are_converted(tmp_path, dtype, order):
    pixels = np.array(VOLUME, dtype, order=order)
    case = read_case(save(tmp_path, "3D_CT_a.npz", imgs=pixels, boxes=np.zeros((0, 6))))
    assert case.pixels.dtype == np.uint8 and (case.pixels == VOLUME).all() and not case.warnings
    assert case.pixels.flags.c_contiguous


@pytest.mark.parametrize("highest", [1.0001, 1.01])
def test_rounding_above_1_is_no_brightness(tmp_path, highest):               # fault 8: the image stayed almost black
    case = read_case(save(tmp_path, imgs=RGB / 255.0 * highest))
    assert np.abs(case.pixels.astype(int) - RGB).max() <= 3 and case.pixels.max() == 255
    assert len(case.warnings) == 1 and f"found 0 to {highest}: multiplied by 255" in case.warnings[0]


def test_fractions_are_rounded_and_0_1_is_spread(tmp_path):
    assert read_case(save(tmp_path, imgs=np.full((4, 5), 99.6), boxes=np.zeros(0))).pixels.max() == 100
    case = read_case(save(tmp_path, imgs=RGB / 255.0))
    assert (case.pixels == RGB).all() and len(case.warnings) == 1 and "multiplied by 255" in case.warnings[0]


def test_a_volume_is_never_held_in_the_files_type(tmp_path):
    path = save(tmp_path, "3D_CT_a.npz", imgs=np.zeros((40, 300, 500), np.float64), boxes=np.zeros((0, 6)))
    tracemalloc.start()
    try:
        read_case(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e6 + 36e6                   # the uint8 volume and a few pieces of 8 MB; as float64 it has 48 MB


# ---------------------------------------------------------------------------------------------------------- boxes

@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float16, ">i4", np.uint64])
def test_boxes_of_any_type_become_float64(tmp_path, dtype):
    boxes = np.array([[1, 2, 20, 25], [100, 120, 127, 126]]).astype(dtype)
    case = read_case(save(tmp_path, imgs=np.zeros((300, 400), np.uint8), boxes=boxes))
    assert case.boxes.dtype == np.float64 and (case.boxes == boxes).all()
    assert (case.boxes * 4).max() == 508       # what uint8 could not hold


# Fault 34: the rules are one function, and what it refuses in a file it refuses from Python.
@pytest.mark.parametrize("boxes, words", [
    (np.zeros((2, 5)), "shape (N, 4)"), (np.zeros((2, 6)), "found (2, 6)"), (np.zeros((1, 2, 4)), "shape"),
    (np.zeros(()), "shape"), (np.array([["a"] * 4]), "numbers"), (np.zeros((1, 4), complex), "numbers"),
    (np.array([[1, 2, np.nan, 4]]), "finite"), (np.array([[0, 0, 9, 9], [1, -np.inf, 3, 4]]), "box 2 of 2: 1 -inf 3 4"),
    (np.array([[10, 2, 5, 4]]), "lower corner"), (np.array([[1, 9, 5, 4]]), "lower corner"),
    (np.array([[-9, 0, -1, 5]]), "40×30 pixels"), (np.array([[0, 30, 5, 50]]), "touches"),
    (np.array([[40, 0, 50, 9]]), "touches"), (np.zeros((70000, 4)), "65535")])
def test_bad_boxes(tmp_path, boxes, words):
    line = error_of(check_boxes, boxes, (30, 40), "a")
    assert line.startswith("boxes: expected") and words in line and "\n" not in line
    assert error_of(read_case, save(tmp_path, boxes=boxes)) == f"2D_CT_a.npz: {line}"


def test_lists_single_boxes_and_no_boxes():
    assert check_boxes([1.25, 2.5, 20.75, 25], (30, 40), "a")[0].tolist() == [[1.25, 2.5, 20.75, 25]]
    assert check_boxes([1, 2, 3, 4, 5, 6], (9, 30, 40), "a")[0].tolist() == [[1, 2, 3, 4, 5, 6]]
    for none in ([], np.zeros((0, 4)), np.zeros((0, 6)), np.zeros((1, 0))):
        assert check_boxes(none, (30, 40), "a")[0].shape == (0, 4)
        assert check_boxes(none, (9, 30, 40), "a")[0].shape == (0, 6)


def test_boxes_over_the_border_are_clipped_with_one_line():
    given = np.array([[0, 0, 39, 29], [-5, 3, 60, 8], [3, 20, 9, 99.0]])
    before = given.copy()
    boxes, lines = check_boxes(given, (30, 40), "a.npz")
    assert boxes.tolist() == [[0, 0, 39, 29], [0, 3, 39, 8], [3, 20, 9, 29]] and (given == before).all()
    assert len(lines) == 1 and lines[0].startswith("a.npz: boxes: ") and "found 2 " in lines[0]
    assert "box 2 of 3: -5 3 60 8" in lines[0]
    assert check_boxes([[0, 0, 40, 30]], (30, 40), "a")[1] == []                        # W and H: the border itself


def test_z_range():
    def boxes(first, last, **options):
        boxes, lines = check_boxes([[1, 2, first, 20, 25, last]], (9, 30, 40), "a", **options)
        return boxes[0, [2, 5]].tolist(), len(lines)

    assert boxes(2, 8) == ([2, 8], 0) and boxes(3, 3) == ([3, 3], 0) and boxes(1.6, 4.4) == ([2, 4], 0)
    assert boxes(-2, 5) == ([0, 5], 1) and boxes(2, 9) == ([2, 8], 1)
    assert boxes(2, 9, z_exclusive=True) == ([2, 8], 0) and boxes(2, 12, z_exclusive=True) == ([2, 8], 1)
    assert boxes(4, 4, z_exclusive=True) == ([4, 4], 1)
    for first, last in ((9, 12), (-5, -1), (5, 3), (2, np.nan)):
        for z_exclusive in (False, True):
            assert error_of(boxes, first, last, z_exclusive=z_exclusive).startswith("boxes: expected")


# Faults 34 and 35.
def test_points():
    points, labels = check_points([[0, 0], [39.5, 29]], [True, False], (30, 40))
    assert points.dtype == np.float64 and points.tolist() == [[0, 0], [39.5, 29]]
    assert labels.dtype == np.int64 and labels.tolist() == [1, 0]
    for bad, bad_labels in (([[40, 3]], [1]), ([[np.nan, 3]], [1]), ([[-1, 3]], [1]), ([[1, 2, 3]], [1]), ([1, 2], [1]),
                            ([["a", "b"]], [1]), ([[1, 2]], [2]), ([[1, 2]], [-1]), ([[1, 2]], [1, 1]), ([[1, 2]], 1)):
        line = error_of(check_points, bad, bad_labels, (30, 40))
        assert "expected" in line and line.startswith("point") and "\n" not in line


# --------------------------------------------------------------------------------------------------------- labels

# Fault 23: it is the shape that is wrong, and nobody asks for the spacing of an image.
@pytest.mark.parametrize("imgs", [RGB, RGB[..., 0], None])
@pytest.mark.parametrize("shape", [(1, 30, 40), (30, 40, 3)])
def test_labels_of_an_image_with_a_third_axis(tmp_path, imgs, shape):
    path = save(tmp_path, imgs=imgs, gts=np.ones(shape, np.uint8))
    line = error_of(read_labels, path, "gts")
    assert line.startswith("2D_CT_a.npz: gts: expected") and str(shape) in line and "spacing" not in line
    if imgs is not None:
        assert error_of(read_case, path, need_gts=True) == error_of(read_header, path) == line


def test_labels_without_images(tmp_path):
    path = save(tmp_path, "3D_CT_a.npz", imgs=None, boxes=None, segs=VOLUME.astype(np.int32), spacing=np.ones(3))
    labels, spacing = read_labels(path, "segs")
    assert labels.dtype == np.uint8 and (labels == VOLUME).all() and spacing is None
    path = save(tmp_path, imgs=None, gts=np.arange(1200).reshape(30, 40, 1))
    assert read_labels(path, "gts")[0].dtype == np.uint16 and read_labels(path, "gts")[0].shape == (30, 40)
    assert error_of(read_labels, path, "segs") == "2D_CT_a.npz: segs: expected this array, found only boxes, gts"


# Fault 41: one line, whatever the array.
@pytest.mark.parametrize("spacing", [[1, 1], [1, 0, 1], [1, np.nan, 1], "abc", np.eye(50), []])
def test_bad_spacing_matters_only_for_distances(tmp_path, spacing):
    path = save(tmp_path, "3D_CT_a.npz", imgs=VOLUME, gts=VOLUME, boxes=np.zeros((0, 6)), spacing=np.array(spacing))
    case = read_case(path, need_gts=True)
    assert case.spacing is None and "spacing: expected" in case.warnings[0] and "\n" not in case.warnings[0]
    line = error_of(read_labels, path, "gts")
    assert line.startswith("3D_CT_a.npz: spacing: expected") and "\n" not in line


# ---------------------------------------------------------------------------------------------- names and writing

def test_names(tmp_path):
    names = {"2DBox_CT_x_y.npz": "CT", "2D_US_1.npz": "US", "/data/3D_MR_Brain_1.npz": "MR", "3DBox_PET.npz": "PET",
             "/data/OCT/17.npz": "OCT", "17.npz": "unknown", Path("2D_XRay_a_b.npz"): "XRay", "4D_CT_1.npz": "unknown"}
    assert {name: modality_of(name) for name in names} == names
    assert modality_of("3D_CT_STS_004.npz", True) == "CT STS" and modality_of("2D_US_1.npz", True) == "US"
    (tmp_path / "b.npz").touch()
    assert list_cases(tmp_path) == list_cases(str(tmp_path / "b.npz")) == [tmp_path / "b.npz"]


@pytest.mark.parametrize("highest, dtype, expected", [(255, np.int64, np.uint8), (256, np.int64, np.uint16),
                                                      (3, np.uint16, np.uint8), (1, bool, np.uint8)])
def test_write_segs(tmp_path, highest, dtype, expected):
    segs = np.zeros((5, 6), dtype)
    segs[2, 3] = highest
    write_segs(tmp_path / "new" / "a.npz", segs, spacing=np.ones(3))
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as file:
        assert file["segs"].dtype == expected and (file["segs"] == segs).all() and file["spacing"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path / "new") == ["a.npz"]


def test_shared_cases_are_clean():
    if not (SHARED / "data" / "val").is_dir():
        pytest.skip("../shared/data is absent")
    for path in list_cases(SHARED / "data" / "val")[::24]:
        case = read_case(path, need_gts=True)
        assert not case.warnings and case.gts.shape == case.shape and len(case.boxes)
        assert case.is_3d == path.name.startswith("3D")
