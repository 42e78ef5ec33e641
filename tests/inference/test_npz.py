"""Reading and checking challenge cases: every bad file is one line, every good one comes out uint8 and inside."""
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medficient_mini.inference.npz import list_cases, modality_of, read_case, write_segs

SHARED = Path(__file__).resolve().parents[3] / "shared"
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
VOLUME = RNG.integers(0, 256, (9, 30, 40), dtype=np.uint8)


def save(folder, name="2D_CT_a.npz", **arrays):
    arrays.setdefault("imgs", RGB)
    arrays.setdefault("boxes", np.array([[1, 2, 20, 25]]))
    np.savez_compressed(folder / name, **arrays)
    return folder / name


def fails(path, *words, **options):
    """The one line of the error, which starts with the file's name and holds the words."""
    with pytest.raises(ValueError) as caught:
        read_case(path, **options)
    line = str(caught.value)
    assert line.startswith(path.name + ": ") and "\n" not in line, line
    for word in words:
        assert word in line, line
    return line


def test_an_image_and_a_volume_come_back_as_they_are(tmp_path):
    case = read_case(save(tmp_path))
    assert (case.image == RGB).all() and case.volume is None and not case.is_3d and case.name == "2D_CT_a.npz"
    assert case.boxes.dtype == np.float64 and case.boxes.tolist() == [[1, 2, 20, 25]] and not case.warnings
    path = save(tmp_path, "3D_MR_a.npz", imgs=VOLUME, boxes=np.array([[1, 2, 3, 20, 25, 8]]), spacing=np.array([3, 1, 1]),
                gts=(VOLUME > 99).astype(np.int64))
    case = read_case(path, need_gts=True)
    assert (case.volume == VOLUME).all() and case.image is None and case.modality == "MR"
    assert case.gts.dtype == np.uint8 and (case.gts == (VOLUME > 99)).all() and case.spacing.tolist() == [3, 1, 1]
    assert read_case(path, need_boxes=False).boxes is None


@pytest.mark.parametrize("name, shape, columns, is_3d", [
    ("a.npz", (30, 40), 4, False), ("a.npz", (30, 40, 3), 4, False), ("a.npz", (30, 40, 1), 4, False),
    ("a.npz", (30, 40, 4), 4, False), ("a.npz", (9, 30, 3), 6, True), ("a.npz", (9, 30, 40), 6, True),
    ("a.npz", (9, 30, 40, 3), 6, True), ("3D_CT_a.npz", (9, 30, 3), 6, True), ("3DBox_CT_a.npz", (9, 30, 4), 6, True),
    ("2DBox_CT_a.npz", (9, 30, 3), 4, False), ("2D_CT_a.npz", (30, 40), 4, False)])
def test_the_name_or_the_shapes_decide_the_dimension(tmp_path, name, shape, columns, is_3d):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    case = read_case(save(tmp_path, name, imgs=pixels, boxes=np.zeros((2, columns))))
    assert case.is_3d == is_3d and case.boxes.shape == (2, columns)
    if is_3d:
        assert (case.volume == pixels).all()
    else:
        assert case.image.shape == (*shape[:2], 3)
        assert (case.image[..., 2] == pixels.reshape(*shape[:2], -1)[..., 2 if shape[2:] in ((3,), (4,)) else 0]).all()


def test_masks_tell_a_narrow_volume_from_a_colour_image(tmp_path):
    pixels = VOLUME[:, :, :3]
    path = save(tmp_path, "a.npz", imgs=pixels, gts=(pixels > 9).astype(np.uint8), boxes=np.zeros((0,)))
    assert read_case(path, need_gts=True).volume.shape == pixels.shape


@pytest.mark.parametrize("name, shape, columns", [
    ("2D_CT_a.npz", (9, 30, 40), 4), ("3D_CT_a.npz", (30, 40), 6), ("a.npz", (40,), 4), ("a.npz", (2, 9, 30, 40), 6),
    ("2D_CT_a.npz", (0, 40, 3), 4), ("a.npz", (), 4)])
def test_wrong_rank_of_the_image(tmp_path, name, shape, columns):
    fails(save(tmp_path, name, imgs=np.zeros(shape, np.uint8), boxes=np.zeros((1, columns))), "imgs: expected shape")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int16, np.uint16, np.int64])
@pytest.mark.parametrize("order", "CF")
def test_other_types_within_0_255_are_converted(tmp_path, dtype, order):
    pixels = np.array(VOLUME, dtype, order=order)
    case = read_case(save(tmp_path, "3D_CT_a.npz", imgs=pixels, boxes=np.zeros((0, 6))))
    assert case.volume.dtype == np.uint8 and (case.volume == VOLUME).all() and not case.warnings
    assert case.volume.flags.c_contiguous


def test_fractions_are_rounded_and_0_1_is_spread(tmp_path):
    assert read_case(save(tmp_path, imgs=np.full((4, 5), 99.6))).image.max() == 100
    case = read_case(save(tmp_path, imgs=RGB / 255.0))
    assert (case.image == RGB).all() and len(case.warnings) == 1 and "multiplied by 255" in case.warnings[0]


def test_intensities_outside_0_255(tmp_path):
    fails(save(tmp_path, imgs=RGB * 1.1), "imgs", "0-255", "float64", "to 280.5")
    fails(save(tmp_path, imgs=RGB.astype(np.int16) - 1), "imgs", "int16 from -1")
    fails(save(tmp_path, imgs=RGB.astype(np.uint16) * 257), "65535")
    for bad in (np.nan, np.inf):
        image = RGB.astype(np.float32)
        image[3, 4, 1] = bad
        fails(save(tmp_path, imgs=image), "imgs", "NaN" if np.isnan(bad) else "inf")
    for dtype in (bool, complex, "S1"):
        fails(save(tmp_path, imgs=RGB.astype(dtype)), "imgs: expected uint8")


def test_a_volume_is_never_held_in_the_files_type(tmp_path):
    import tracemalloc
    path = save(tmp_path, "3D_CT_a.npz", imgs=np.zeros((40, 500, 500), np.float64), boxes=np.zeros((0, 6)))
    tracemalloc.start()
    try:
        read_case(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6 + 40e6                  # the uint8 volume and a few pieces of 8 MB; as float64 it has 80 MB


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64, np.float16, np.float32, ">i4", np.uint64])
def test_boxes_of_any_type_become_float64(tmp_path, dtype):
    image = np.zeros((300, 400), np.uint8)
    boxes = np.array([[1, 2, 20, 25], [100, 120, 127, 126]]).astype(dtype)
    case = read_case(save(tmp_path, imgs=image, boxes=boxes))
    assert case.boxes.dtype == np.float64 and case.boxes.tolist() == boxes.astype(float).tolist()
    assert (case.boxes * 4).max() == 508       # what uint8 could not hold


def test_fractional_boxes_stay(tmp_path):
    assert read_case(save(tmp_path, boxes=np.array([[1.25, 2.5, 20.75, 25]]))).boxes.tolist() == [[1.25, 2.5, 20.75, 25]]


@pytest.mark.parametrize("boxes", [np.zeros((0, 4)), np.zeros((0,)), np.zeros((0, 6)), np.zeros((1, 0))])
def test_no_boxes(tmp_path, boxes):
    assert read_case(save(tmp_path, boxes=boxes)).boxes.shape == (0, 4)
    assert read_case(save(tmp_path, "3D_CT_a.npz", imgs=VOLUME, boxes=boxes)).boxes.shape == (0, 6)


def test_a_single_box_without_its_first_axis(tmp_path):
    assert read_case(save(tmp_path, boxes=np.array([1, 2, 3, 4]))).boxes.tolist() == [[1, 2, 3, 4]]
    path = save(tmp_path, "a.npz", imgs=VOLUME, boxes=np.array([1, 2, 3, 4, 5, 6]))
    assert read_case(path).boxes.tolist() == [[1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("boxes, words", [
    (np.zeros((2, 5)), "shape (N, 4)"), (np.zeros((2, 6)), "found (2, 6)"), (np.zeros((1, 2, 4)), "shape"),
    (np.zeros(()), "shape"), (np.array([["a"] * 4]), "numbers"), (np.zeros((1, 4), complex), "numbers"),
    (np.array([[1, 2, np.nan, 4]]), "finite"), (np.array([[0, 0, 9, 9], [1, -np.inf, 3, 4]]), "box 2 of 2: 1 -inf 3 4"),
    (np.array([[10, 2, 5, 4]]), "lower corner"), (np.array([[1, 9, 5, 4]]), "lower corner"),
    (np.array([[-9, 0, -1, 5]]), "40×30 image"), (np.array([[0, 30, 5, 50]]), "touches"),
    (np.array([[40, 0, 50, 9]]), "touches"), (np.zeros((70000, 4)), "65535")])
def test_bad_boxes(tmp_path, boxes, words):
    fails(save(tmp_path, boxes=boxes), "boxes: expected", words)


def test_boxes_over_the_border_are_clipped_with_one_line(tmp_path):
    case = read_case(save(tmp_path, boxes=np.array([[0, 0, 39, 29], [-5, 3, 60, 8], [3, 20, 9, 99]])))
    assert case.boxes.tolist() == [[0, 0, 39, 29], [0, 3, 39, 8], [3, 20, 9, 29]]
    assert len(case.warnings) == 1 and case.warnings[0].startswith("2D_CT_a.npz: boxes: ")
    assert "2 of 3" in case.warnings[0] and "box 2, -5 3 60 8" in case.warnings[0]
    case = read_case(save(tmp_path, boxes=np.array([[0, 0, 40, 30]])))                  # W and H: the border itself
    assert case.boxes.tolist() == [[0, 0, 39, 29]] and not case.warnings


def test_z_range(tmp_path):
    def boxes(first, last, **options):
        path = save(tmp_path, "3D_CT_a.npz", imgs=VOLUME, boxes=np.array([[1, 2, first, 20, 25, last]]))
        case = read_case(path, **options)
        return case.boxes[0, [2, 5]].tolist(), len(case.warnings)

    assert boxes(2, 8) == ([2, 8], 0) and boxes(3, 3) == ([3, 3], 0)
    assert boxes(-2, 5) == ([0, 5], 1) and boxes(2, 9) == ([2, 8], 1)
    for first, last in ((9, 12), (-5, -1), (5, 3), (2, np.nan)):
        with pytest.raises(ValueError, match="3D_CT_a.npz: boxes: expected"):
            boxes(first, last)
    assert boxes(2, 9, z_exclusive=True) == ([2, 8], 0)
    assert boxes(4, 4, z_exclusive=True) == ([4, 4], 1)
    assert boxes(2, 12, z_exclusive=True) == ([2, 8], 1)


def test_missing_fields(tmp_path):
    np.savez(tmp_path / "a.npz", boxes=np.zeros((1, 4)))
    fails(tmp_path / "a.npz", "imgs: expected", "found only boxes")
    np.savez(tmp_path / "b.npz", imgs=RGB)
    fails(tmp_path / "b.npz", "boxes: expected", "found only imgs")
    assert read_case(tmp_path / "b.npz", need_boxes=False).image is not None
    fails(tmp_path / "b.npz", "gts: expected", need_boxes=False, need_gts=True)
    np.savez(tmp_path / "c.npz")
    fails(tmp_path / "c.npz", "empty archive")


@pytest.mark.parametrize("gts, words", [
    (np.zeros((30, 41), np.uint8), "(30, 41)"), (np.zeros((30, 40, 3), np.uint8), "(30, 40)"),
    (np.zeros((30, 40)), "integer"), (np.full((30, 40), -1), "0 to 65535"), (np.full((30, 40), 70000), "70000")])
def test_bad_masks(tmp_path, gts, words):
    path = save(tmp_path, gts=gts)
    fails(path, "gts: expected", words, need_gts=True)
    assert read_case(path).gts is None         # not asked for, not looked at


def test_masks_of_many_labels_are_uint16(tmp_path):
    gts = np.arange(1200).reshape(30, 40)
    case = read_case(save(tmp_path, gts=gts), need_gts=True)
    assert case.gts.dtype == np.uint16 and (case.gts == gts).all()


@pytest.mark.parametrize("spacing", [[1, 1], [1, 0, 1], [1, np.nan, 1], "abc"])
def test_bad_spacing_matters_only_for_distances(tmp_path, spacing):
    path = save(tmp_path, "3D_CT_a.npz", imgs=VOLUME, gts=VOLUME, boxes=np.zeros((0, 6)), spacing=np.array(spacing))
    case = read_case(path)
    assert case.spacing is None and "spacing: expected" in case.warnings[0]
    fails(path, "spacing: expected", need_gts=True)


def npy(shape, descr="|u1", body=b""):
    """An .npy member whose header says whatever we like."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def archive(path, method=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name + ".npy", data)
    return path


def test_a_header_that_claims_terabytes(tmp_path):
    path = archive(tmp_path / "a.npz", imgs=npy((2**20, 2**10, 2**10), body=b"123"))
    fails(path, "imgs: expected the 1,099,511,627,776 bytes")
    fails(archive(tmp_path / "b.npz", imgs=npy((2**40, 2**40, 2**40))), "imgs: expected")
    fails(archive(tmp_path / "c.npz", imgs=npy((30, 40)), boxes=npy((1, 4))), "imgs: expected the 1,200 bytes")
    # The zip directory lies too: member sizes of 4 GB for a few bytes of data.
    data = bytearray(archive(tmp_path / "d.npz", imgs=npy((60000, 60000))).read_bytes())
    size = len(npy((60000, 60000))).to_bytes(4, "little")
    at = data.rindex(size)
    data[at:at + 4] = (2**32 - 2).to_bytes(4, "little")
    (tmp_path / "d.npz").write_bytes(data)
    fails(tmp_path / "d.npz", "imgs: expected the 3,600,000,000 bytes")


def test_damaged_headers_and_objects(tmp_path):
    fails(archive(tmp_path / "a.npz", imgs=b"not an array"), "imgs: expected an array")
    fails(archive(tmp_path / "b.npz", imgs=npy((2, 2))[:20]), "expected")
    fails(archive(tmp_path / "c.npz", imgs=npy((-1, 4))), "imgs")
    fails(archive(tmp_path / "d.npz", imgs=npy((2, 2)).replace(b"(2, 2)", b"import")), "imgs")
    np.savez(tmp_path / "e.npz", imgs=RGB, boxes=np.array([[1, None, 3, "x"]], object))
    fails(tmp_path / "e.npz", "boxes: expected numbers, found Python objects")


def test_unreadable_files(tmp_path):
    whole = save(tmp_path).read_bytes()
    for name, data in {"cut.npz": whole[:len(whole) // 2], "text.npz": b"hello", "empty.npz": b""}.items():
        (tmp_path / name).write_bytes(data)
        fails(tmp_path / name, "unreadable")
    for at in range(0, len(whole), 97):        # whichever byte is hit: one line, or the same image as before
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / "hit.npz").write_bytes(damaged)
        try:
            case = read_case(tmp_path / "hit.npz")
        except ValueError as error:
            assert str(error).startswith("hit.npz: ") and "\n" not in str(error)
        else:
            assert (case.image == RGB).all() and case.boxes.tolist() == [[1, 2, 20, 25]]
    fails(tmp_path / "absent.npz", "No such file")
    fails(tmp_path, "unreadable")


def test_list_cases(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        list_cases(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("b.npz", "sub/a.npz", "a.NPZ", ".tmp-x.npz", "c.txt"):
        (tmp_path / name).touch()
    assert list_cases(tmp_path) == [tmp_path / "a.NPZ", tmp_path / "b.npz", tmp_path / "sub/a.npz"]
    assert list_cases(str(tmp_path / "b.npz")) == [tmp_path / "b.npz"]
    for bad in ("c.txt", "absent"):
        with pytest.raises(ValueError, match=bad):
            list_cases(tmp_path / bad)


def test_modality_of():
    names = {"2DBox_CT_x_y.npz": "CT", "2D_US_1.npz": "US", "/data/3D_MR_Brain_1.npz": "MR", "3DBox_PET.npz": "PET",
             "/data/OCT/17.npz": "OCT", "17.npz": "unknown", Path("2D_XRay_a_b.npz"): "XRay", "4D_CT_1.npz": "unknown"}
    assert {name: modality_of(name) for name in names} == names


@pytest.mark.parametrize("highest, dtype, expected", [(255, np.int64, np.uint8), (256, np.int64, np.uint16),
                                                      (3, np.uint16, np.uint16), (1, bool, np.uint8)])
def test_write_segs(tmp_path, highest, dtype, expected):
    segs = np.zeros((5, 6), dtype)
    segs[2, 3] = highest
    write_segs(tmp_path / "new" / "a.npz", segs, spacing=np.ones(3))
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as file:
        assert file["segs"].dtype == expected and (file["segs"] == segs).all() and file["spacing"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path / "new") == ["a.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_segs(tmp_path / "a.npz", np.ones((2, 2), np.uint8))
    before = (tmp_path / "a.npz").read_bytes()

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(OSError, match="disk full"):
        write_segs(tmp_path / "a.npz", np.zeros((2, 2), np.uint8))
    assert (tmp_path / "a.npz").read_bytes() == before and os.listdir(tmp_path) == ["a.npz"]


def test_shared_cases_are_clean():
    if not (SHARED / "data" / "val").is_dir():
        pytest.skip("../shared/data is absent")
    for path in list_cases(SHARED / "data" / "val")[::12]:
        case = read_case(path, need_gts=True)
        assert not case.warnings and case.gts.shape == case.shape and len(case.boxes) and case.is_3d == path.name.startswith("3D")
