"""Folders of images and masks -> challenge NPZ files that the package's own reader accepts."""
import cv2
import numpy as np
import pytest
from test_pictures import write, write_with_exif

from medficient_mini.inference.npz import list_cases, read_case
from medficient_mini.userfiles import convert
from medficient_mini.userfiles.convert import main, number_objects, pair_files
from medficient_mini.userfiles.pictures import save_label_picture

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


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, pixels)


@pytest.fixture
def run(tmp_path, capsys):
    """run(*words, code=0) -> (stdout, lines of stderr that are no progress) of i/ and g/ converted into o/."""
    def run(*words, code=0):
        folders = [word for letter in "igo" for word in (f"-{letter}", str(tmp_path / letter))]
        assert main([*folders, "--modality", "US", *map(str, words)]) == code
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if not line.startswith("converting")]
    return run


def case_of(tmp_path, name="2D_US_a"):
    return read_case(tmp_path / f"o/{name}.npz", need_gts=True)


def test_labels_become_consecutive_objects_with_tight_boxes():
    labels = scattered()
    gts, boxes = number_objects(labels, False, 1)
    assert (gts == np.where(labels == 7, 2, labels // 2)).all() and gts.dtype == np.uint8
    assert boxes.tolist() == brute_boxes(gts) == [[3, 2, 44, 29], [5, 0, 49, 37]]


def test_instances_and_small_objects():
    gts, boxes = number_objects(scattered(), True, 5)
    assert gts[0, 49] == 0 and gts[8, 9] == gts[2, 3] == 1
    assert boxes.tolist() == brute_boxes(gts) == [[3, 2, 9, 8], [30, 20, 44, 29], [5, 35, 24, 37]]
    gts, boxes = number_objects(scattered(), True, 10000)
    assert not gts.any() and boxes.shape == (0, 4)


def test_volumes_and_many_objects():
    labels = np.zeros((6, 20, 20), np.uint16)
    labels[1:3, 2:5, 2:9] = 9
    labels[3, 5, 9] = 9                   # touches by a corner in 3D
    labels[5, 10:12, 10:12] = 9
    gts, boxes = number_objects(labels, True, 1)
    assert boxes.tolist() == brute_boxes(gts) == [[2, 2, 1, 9, 5, 3], [10, 10, 5, 11, 11, 5]]
    gts, boxes = number_objects((np.arange(900).reshape(30, 30) * 3).astype(np.uint16), False, 1)
    assert gts.dtype == np.uint16 and len(boxes) == 899 and gts.max() == 899


def test_names_that_belong_together(tmp_path):
    for name in ("images/a.png", "images/sub/a.jpg", "images/b.nii.gz", "images/c_0000.nii", "images/d.png", "images/e.png",
                 "masks/a_mask.png", "masks/sub/a.png", "masks/b_seg.nii.gz", "masks/c.nii", "masks/e.png",
                 "masks/e-GT.bmp", "one/x.png", "one/x_Segmentation.png", "around/y.png", "around/gt/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def pairs(images, masks):
        found, lonely = pair_files(tmp_path / images, tmp_path / masks)
        assert not lonely
        return {path.relative_to(tmp_path / images).as_posix(): [mask.name for mask in masks] for path, masks in found.items()}

    assert pairs("images", "masks") == {"a.png": ["a_mask.png"], "sub/a.jpg": ["a.png"], "b.nii.gz": ["b_seg.nii.gz"],
                                        "c_0000.nii": ["c.nii"], "d.png": [], "e.png": ["e-GT.bmp", "e.png"]}
    assert pairs("one", "one") == {"x.png": ["x_Segmentation.png"]}
    assert pairs("around", "around/gt") == {"y.png": ["y.png"]}


def test_pictures_become_cases_and_subfolders_stay_in_their_names(tmp_path, run):       # fault 20
    grey = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
    colour = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    save(tmp_path / "i/a.png", grey)
    save(tmp_path / "g/a_mask.png", scattered())
    save(tmp_path / "i/patient1/slice_01.bmp", colour)
    save(tmp_path / "g/patient1/slice_01.png", (scattered() > 0).astype(np.uint8) * 255)
    assert "2 of 2 written" in run("--instances", "--min-size", 3)[0]
    assert [path.name for path in list_cases(tmp_path / "o")] == ["2D_US_a.npz", "2D_US_patient1-slice_01.npz"]
    a, b = case_of(tmp_path), case_of(tmp_path, "2D_US_patient1-slice_01")
    assert (a.pixels == grey[..., None]).all() and (b.pixels == colour).all() and not a.warnings + b.warnings
    assert a.modality == "US" and set(np.unique(a.gts)) == {0, 1, 2, 3} and len(a.boxes) == len(b.boxes) == 3
    assert a.boxes.tolist() == brute_boxes(a.gts)
    with np.load(tmp_path / "o/2D_US_a.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["boxes", "gts", "imgs", "intensity"] and str(file["intensity"]) == "8 bits as they are"


def test_volumes_become_cases_along_the_wanted_axis(tmp_path, run):
    nib = pytest.importorskip("nibabel")
    affine = np.array([[0, 0, 3.0, 0], [0.8, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])       # file axes: P→A, S→I, L→R
    data = RNG.normal(0, 400, (8, 9, 10)).astype(np.int16)
    labels = np.zeros(data.shape, np.float64)
    labels[1:4, 2:5, 6:8] = 3
    for folder, array in (("i", data), ("g", labels)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(array, affine), tmp_path / folder / "v.nii.gz")
    run("--modality", "CT", "--window", 40, 400)
    case = case_of(tmp_path, "3D_CT_v")
    assert case.spacing.tolist() == pytest.approx([1, 0.8, 3]) and case.pixels.shape == (9, 8, 10)
    # Slices run upward (file axis 1 reversed), rows backward (axis 0 reversed), columns leftward (axis 2 reversed).
    expected = data.transpose(1, 0, 2)[::-1, ::-1, ::-1]
    assert (case.pixels == np.floor(np.clip((expected + 160) / 400, 0, 1) * 255 + 0.5)).mean() > 0.99
    assert case.boxes.tolist() == brute_boxes(case.gts) == [[2, 4, 4, 3, 6, 6]]
    run("--modality", "MR", "--axis", "sagittal")
    case = case_of(tmp_path, "3D_MR_v")
    assert case.pixels.shape == (10, 9, 8)
    assert case.boxes[:, [2, 5]].tolist() == [[2, 3]] and case.boxes.tolist() == brute_boxes(case.gts)


@pytest.mark.parametrize("values, kept", [
    ((0, 1, 2, 255), (0, 1, 2)), ((0, 1, 65535), (0, 1)), ((0, 5, 15, 255), (0, 5, 15)), ((1, 2, 255), (1, 2)), ((0, 255), (0, 255)),
    ((0, 128, 255), (0, 128, 255)), ((0, 85, 170, 255), (0, 85, 170, 255))], ids=lambda values: f"{len(values)}-{max(values)}")
@pytest.mark.parametrize("kind", ["picture", "nifti"])
def test_the_greatest_number_beside_small_labels_is_no_object(tmp_path, run, values, kept, kind):       # fault 23
    labels = np.tile(np.repeat(np.array(values, np.min_scalar_type(max(values))), 6), (4, 1))
    if kind == "picture":
        save(tmp_path / "i/a.png", labels)
        save(tmp_path / "g/a.png", labels)
    else:
        nib = pytest.importorskip("nibabel")
        for folder in "ig":
            (tmp_path / folder).mkdir()
            nib.save(nib.Nifti1Image(labels[None], np.eye(4)), tmp_path / folder / "a.nii")
    out, err = run()
    ignored = len(kept) < len(values)
    assert f"with {len(kept) - (kept[0] == 0)} objects" in out
    assert len(err) == ignored and all(f"{values[-1]} beside labels up to" in line for line in err)


def test_a_palette_mask_and_its_border_of_no_class(tmp_path, run):              # faults 23, 24
    labels = scattered()
    labels[20:22, 30:45] = 255
    save(tmp_path / "i/a.png", labels)
    (tmp_path / "g").mkdir()
    save_label_picture(tmp_path / "g/a.png", labels)
    assert "with 2 objects" in run()[0]
    assert (case_of(tmp_path).gts == np.array([0, 0, 1] + [0] * 4 + [2] + [0] * 248)[labels]).all()


@pytest.mark.parametrize("mask_orientation", [1, 6])
def test_a_turned_image_beside_a_mask_is_said(tmp_path, run, mask_orientation):         # fault 27
    (tmp_path / "g").mkdir(), (tmp_path / "i").mkdir()
    square = np.zeros((40, 40), np.uint8)
    square[5:15, 3:9] = 1
    write_with_exif(tmp_path / "i/a.png", square * 200, 6)
    write_with_exif(tmp_path / "g/a.png", square, mask_orientation)
    _, err = run()
    assert "a.png: imgs: turned as its EXIF orientation says, see that a.png fits" in err
    assert ("a.png: gts: turned as its EXIF orientation says" in err) == (mask_orientation == 6)
    case = case_of(tmp_path)
    assert (case.pixels[..., 0] > 0)[case.gts > 0].all() == (mask_orientation == 6)
    write_with_exif(tmp_path / "g/a.png", square[:30], 1)
    _, err = run(code=1)
    assert "expected the image's size (40, 40), found (30, 40)" in err[0]


def test_bad_pairs_are_one_line_each_and_the_rest_goes_on(tmp_path, run, monkeypatch):  # faults 14 and 41
    image = np.zeros((40, 50), np.uint8)
    for name in ("good", "small", "lonely", "empty", "corrupt", "strange", "tiny"):
        save(tmp_path / f"i/{name}.png", image)
    for name in ("good", "strange"):
        save(tmp_path / f"g/{name}.png", scattered())
    save(tmp_path / "g/small.png", scattered()[:, :40])
    save(tmp_path / "g/empty.png", image)
    image[5, 5] = 1
    save(tmp_path / "g/tiny.png", image)
    (tmp_path / "g/corrupt.png").write_bytes(b"hello")
    (tmp_path / "i/volume.nii").write_bytes(b"hello")
    save(tmp_path / "g/volume.png", image)
    read = convert.load_picture

    def load_picture(path, window):
        if path.stem == "strange":
            raise cv2.error("something\nunexpected\nover lines")
        return read(path, window)

    monkeypatch.setattr(convert, "load_picture", load_picture)
    out, err = run("--min-size", 2, code=1)
    names = ["corrupt.png", "empty.png", "lonely.png", "small.png", "strange.png", "tiny.png", "volume.nii"]
    assert [line.split(":")[0] for line in err] == names
    assert "found 0" in err[2] and "expected the image's size (40, 50), found (40, 40)" in err[3]
    assert err[4] == "strange.png: something"
    assert "1 of 8 written" in out and "2 objects, 5 failed" in out
    assert [path.name for path in list_cases(tmp_path / "o")] == ["2D_US_good.npz"]


def test_one_name_in_two_unicode_forms(tmp_path, run):                          # fault 36's brother
    save(tmp_path / "i/mu\u0308ller.png", scattered())
    save(tmp_path / "g/m\u00fcller_mask.png", scattered())
    assert "1 of 1 written" in run()[0] and case_of(tmp_path, "2D_US_m\u00fcller").gts.any()


def test_what_is_missing_is_named_and_the_rest_goes_on(tmp_path, run):          # faults 21, 33
    for name in ("i/a.png", "g/a.png", "g/b_mask.png", "g/c.png"):
        save(tmp_path / name, scattered())
    out, err = run()
    assert "1 of 1 written" in out
    assert err == [f"{name}: gts: expected an image of the same name, found none" for name in ("b_mask.png", "c.png")]
    for name in ("i/b.png", "g/c.png"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "absent" / name)
    save(tmp_path / "i/c.png", scattered())
    out, err = run(code=1)
    assert "1 of 3 written" in out and [line.split(":")[0] for line in err] == ["b.png", "c.png"]


def test_two_images_of_one_name_are_told_apart(tmp_path, run):
    for name in ("i/p-a.png", "g/p-a.png", "i/p/a.png", "g/p/a.png"):
        save(tmp_path / name, scattered())
    out, err = run(code=1)
    assert "1 of 2 written" in out and len(err) == 1 and "expected one image for 2D_US_p-a.npz, found" in err[0]


@pytest.mark.parametrize("extra, words", [
    (["--modality", "C_T"], "--modality"), (["--modality", "CT", "--window", "liver"], "--window"),
    (["--modality", "CT"], ".*found none")])
def test_bad_options_and_empty_folders_are_one_line(run, tmp_path, extra, words):
    (tmp_path / "i").mkdir()
    _, err = run(*extra, code=1)
    assert len(err) == 1 and __import__("re").match(words, err[0])


def test_an_output_that_is_a_file_is_one_line(run, tmp_path):                   # fault 41
    for name in ("i/a.png", "g/a.png", "i/b.png", "g/b.png"):
        save(tmp_path / name, scattered())
    (tmp_path / "o").touch()
    _, err = run(code=1)
    assert len(err) == 1 and "File exists" in err[0]
