"""Folders of images and masks -> challenge NPZ files that the package's own reader accepts."""
import cv2
import numpy as np
import pytest

from medficient_mini.inference.npz import list_cases, read_case
from medficient_mini.userfiles.convert import loosen, main, number_objects, pair_files

RNG = np.random.default_rng(0)


def brute_boxes(gts):
    boxes = []
    for k in range(1, int(gts.max()) + 1):
        where = np.argwhere(gts == k)[:, ::-1]
        boxes.append([*where.min(0), *where.max(0)])
    return boxes


def scattered():
    labels = np.zeros((40, 50), np.uint8)
    labels[2:8, 3:9] = 2
    labels[20:30, 30:45] = 2
    labels[8, 9] = 2                      # touches the first by a corner
    labels[35:38, 5:25] = 7
    labels[0, 49] = 7                     # one stray pixel
    return labels


def save_picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)


def test_labels_become_consecutive_objects_with_tight_boxes():
    labels = scattered()
    gts, boxes, dropped = number_objects(labels, False, 1)
    assert (gts == np.where(labels == 7, 2, labels // 2)).all() and gts.dtype == np.uint8 and dropped == 0
    assert boxes.tolist() == brute_boxes(gts) == [[3, 2, 44, 29], [5, 0, 49, 37]]


def test_instances_and_small_objects():
    gts, boxes, dropped = number_objects(scattered(), True, 5)
    assert dropped == 1 and gts[0, 49] == 0 and gts[8, 9] == gts[2, 3] == 1
    assert boxes.tolist() == brute_boxes(gts) == [[3, 2, 9, 8], [30, 20, 44, 29], [5, 35, 24, 37]]
    gts, boxes, dropped = number_objects(scattered(), True, 10000)
    assert not gts.any() and boxes.shape == (0, 4) and dropped == 4


def test_volumes_and_many_objects():
    labels = np.zeros((6, 20, 20), np.uint16)
    labels[1:3, 2:5, 2:9] = 9
    labels[3, 5, 9] = 9                   # touches by a corner in 3D
    labels[5, 10:12, 10:12] = 9
    gts, boxes, _ = number_objects(labels, True, 1)
    assert boxes.tolist() == brute_boxes(gts) == [[2, 2, 1, 9, 5, 3], [10, 10, 5, 11, 11, 5]]
    gts, boxes, _ = number_objects((np.arange(900).reshape(30, 30) * 3).astype(np.uint16), False, 1)
    assert gts.dtype == np.uint16 and len(boxes) == 899 and gts.max() == 899


def test_margins_stay_inside_and_follow_the_seed():
    boxes = np.array([[0, 0, 49, 39], [10, 12, 20, 22]] * 200)
    moved = loosen(boxes, (40, 50), 5, np.random.default_rng(3))
    assert (moved[::2] == boxes[::2]).all()
    outward = np.abs(moved[1::2] - boxes[1::2])
    assert (moved[1::2, :2] <= boxes[1::2, :2]).all() and (moved[1::2, 2:] >= boxes[1::2, 2:]).all()
    assert set(np.unique(outward)) == set(range(6))
    assert (loosen(boxes, (40, 50), 5, np.random.default_rng(3)) == moved).all()
    assert (loosen(boxes, (40, 50), 0, np.random.default_rng(3)) == boxes).all()
    volume = loosen(np.array([[5, 5, 2, 9, 9, 4]] * 50), (7, 20, 20), 3, np.random.default_rng(0))
    assert (volume[:, [2, 5]] == [2, 4]).all() and (volume[:, :2] >= 2).all()


def test_names_that_belong_together(tmp_path):
    for name in ("images/a.png", "images/sub/a.jpg", "images/b.nii.gz", "images/c_0000.nii", "images/d.png", "images/e.png",
                 "masks/a_mask.png", "masks/sub/a.png", "masks/b_seg.nii.gz", "masks/c.nii", "masks/e.png", "masks/e-GT.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pairs = {p.name if p.parent.name != "sub" else "sub": [m.name for m in found]
             for p, found in pair_files(tmp_path / "images", tmp_path / "masks")}
    assert pairs == {"a.png": ["a_mask.png"], "sub": ["a.png"], "b.nii.gz": ["b_seg.nii.gz"], "c_0000.nii": ["c.nii"],
                     "d.png": [], "e.png": ["e-GT.bmp", "e.png"]}
    for name in ("one/x.png", "one/x_Segmentation.png"):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [(p.name, [m.name for m in found]) for p, found in pair_files(tmp_path / "one", tmp_path / "one")] == [
        ("x.png", ["x_Segmentation.png"])]


def test_pictures_become_cases(tmp_path, capsys):
    grey = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
    colour = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    save_picture(tmp_path / "i/a.png", grey)
    save_picture(tmp_path / "g/a_mask.png", scattered())
    save_picture(tmp_path / "i/p/b.bmp", colour)
    save_picture(tmp_path / "g/p/b.png", ((scattered() > 0) * 255).astype(np.uint8))
    words = ["-i", str(tmp_path / "i"), "-g", str(tmp_path / "g"), "-o", str(tmp_path / "o"), "--modality", "US"]
    assert main(words + ["--instances", "--min-size", "3", "--margin", "4", "--seed", "5"]) == 0
    assert "2 written" in capsys.readouterr().out
    paths = list_cases(tmp_path / "o")
    assert [p.name for p in paths] == ["2D_US_a.npz", "2D_US_p-b.npz"]
    a, b = (read_case(p, need_gts=True) for p in paths)
    assert (a.image == grey[..., None]).all() and (b.image == colour[..., ::-1]).all() and not a.warnings + b.warnings
    assert a.modality == "US" and set(np.unique(a.gts)) == {0, 1, 2, 3} and len(a.boxes) == len(b.boxes) == 3
    tight = np.array(brute_boxes(a.gts))
    assert (np.abs(a.boxes - tight) <= 4).all() and (a.boxes != tight).any()
    with np.load(paths[0], allow_pickle=False) as file:
        assert sorted(file.files) == ["boxes", "gts", "imgs", "intensity"] and str(file["intensity"]) == "8 bits as they are"
    before = [p.read_bytes() for p in paths]
    main(words + ["--instances", "--min-size", "3", "--margin", "4", "--seed", "5"])
    with np.load(paths[0], allow_pickle=False) as file:
        assert (file["boxes"] == a.boxes).all()
    assert len(before) == len(list_cases(tmp_path / "o"))


def test_volumes_become_cases_along_the_wanted_axis(tmp_path):
    nib = pytest.importorskip("nibabel")
    affine = np.array([[0, 0, 3.0, 0], [0.8, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])       # file axes: P→A, S→I, L→R
    data = RNG.normal(0, 400, (8, 9, 10)).astype(np.int16)
    labels = np.zeros(data.shape, np.float64)
    labels[1:4, 2:5, 6:8] = 3
    for folder, array in (("i", data), ("g", labels)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(array, affine), tmp_path / folder / "v.nii.gz")
    words = ["-i", str(tmp_path / "i/v.nii.gz"), "-g", str(tmp_path / "g/v.nii.gz"), "--modality", "CT", "--window", "40", "400"]
    assert main(words + ["-o", str(tmp_path / "axial")]) == 0
    case = read_case(tmp_path / "axial" / "3D_CT_v.npz", need_gts=True)
    assert case.spacing.tolist() == pytest.approx([1, 0.8, 3]) and case.volume.shape == (9, 8, 10)
    # Slices run upward (file axis 1 reversed), rows backward (axis 0 reversed), columns leftward (axis 2 reversed).
    expected = data.transpose(1, 0, 2)[::-1, ::-1, ::-1]
    assert (case.volume == np.floor(np.clip((expected + 160) / 400, 0, 1) * 255 + 0.5)).mean() > 0.99
    assert case.boxes.tolist() == brute_boxes(case.gts) == [[2, 4, 4, 3, 6, 6]]
    assert main(words + ["-o", str(tmp_path / "sagittal"), "--axis", "sagittal"]) == 0
    assert read_case(tmp_path / "sagittal" / "3D_CT_v.npz").volume.shape == (10, 9, 8)


def test_bad_pairs_are_one_line_each_and_the_rest_goes_on(tmp_path, capsys):
    image = np.zeros((40, 50), np.uint8)
    for name in ("good", "small", "lonely", "empty", "corrupt", "tiny"):
        save_picture(tmp_path / f"i/{name}.png", image)
    save_picture(tmp_path / "g/good.png", scattered())
    save_picture(tmp_path / "g/small.png", scattered()[:, :40])
    save_picture(tmp_path / "g/empty.png", image)
    image[5, 5] = 1
    save_picture(tmp_path / "g/tiny.png", image)
    (tmp_path / "g/corrupt.png").write_bytes(b"hello")
    (tmp_path / "i/volume.nii").write_bytes(b"hello")
    save_picture(tmp_path / "g/volume.png", image)
    words = ["-i", str(tmp_path / "i"), "-g", str(tmp_path / "g"), "-o", str(tmp_path / "o"), "--modality", "US"]
    assert main(words + ["--min-size", "2"]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("converting")]
    assert [line.split(":")[0] for line in lines] == ["corrupt.png", "empty.png", "lonely.png", "small.png", "tiny.png", "volume.png"]
    assert "found none" in lines[2] and "expected the image's size (40, 50), found (40, 40)" in lines[3]
    assert "1 written" in out and "1 objects below --min-size dropped" in out and "2 images without objects" in out and "4 failed" in out
    assert [p.name for p in list_cases(tmp_path / "o")] == ["2D_US_good.npz"]


@pytest.mark.parametrize("extra, words", [
    (["--modality", "C_T"], "--modality"), (["--modality", "CT", "--window", "liver"], "--window"),
    (["--modality", "CT", "--margin", "-1"], "--min-size, --margin")])
def test_bad_options_are_one_line(tmp_path, capsys, extra, words):
    assert main(["-i", str(tmp_path), "-g", str(tmp_path), "-o", str(tmp_path), *extra]) == 1
    err = capsys.readouterr().err
    assert err.startswith(words) and err.count("\n") == 1


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert main(["-i", str(tmp_path), "-g", str(tmp_path), "-o", str(tmp_path), "--modality", "CT"]) == 1
    assert "found none" in capsys.readouterr().err
