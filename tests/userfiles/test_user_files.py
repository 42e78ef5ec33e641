"""`infer.py` on users' own pictures and NIfTI volumes, with a stand-in network whose masks are known."""
import cv2
import numpy as np
import pytest
from fakes import BrightSam, squares

import eval
import infer
from medficient_mini.inference.compose import Composition
from medficient_mini.userfiles import convert, pick


class OnPoints(BrightSam):
    """Without a box: what is bright, wherever the points are."""

    def decode(self, embedding, boxes=None, points=None, masks=None, **options):
        boxes = embedding.new_tensor([[0, 0, 511, 511]]) if boxes is None else boxes
        return super().decode(embedding, boxes, **options)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words, code=0) -> (stdout, lines of stderr that are no progress) of infer.py in this process."""
    monkeypatch.setattr(infer, "load_model", lambda *arguments: OnPoints())

    def run(*words, code=0):
        capsys.readouterr()
        assert infer.main([*map(str, words)]) == code
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if not line.startswith("segmenting")]
    return run


@pytest.fixture
def pictures(tmp_path):
    """One object each: grey, colour in a subfolder, 16 bit."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    image = squares((60, 90), [(20, 40, 30, 70)])
    cv2.imwrite(str(folder / "a.png"), image)
    cv2.imwrite(str(folder / "sub" / "b.jpg"), np.dstack([image] * 3))
    cv2.imwrite(str(folder / "c.tif"), image.astype(np.uint16) * 10 + 7)
    return folder


@pytest.fixture
def exact_volumes(monkeypatch):
    """Volumes are segmented exactly: the bright voxels of each box. The list holds the `drawn_slice` of every call."""
    drawn = []

    def segment_volume(model, volume, boxes, drawn_slice, *_, **options):
        found = Composition(volume.shape, len(boxes))
        for k, (x0, y0, z0, x1, y1, z1) in enumerate(boxes.astype(int)):
            place = np.s_[z0:z1 + 1, y0:y1 + 1, x0:x1 + 1]
            found.claim(k, place, volume[place] > 128, volume[place] > 128)
        drawn.append(None if drawn_slice is None else drawn_slice.tolist())
        return found

    monkeypatch.setattr(infer, "segment_volume", segment_volume)
    return drawn


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_picture_gives_a_mask_picture_an_overlay_and_an_npz(pictures, tmp_path, run):
    out, err = run("-i", pictures / "a.png", "-o", tmp_path / "out", "--box", 25, 15, 75, 45)
    assert "a.png: intensities: 8 bits as they are" in out and "1 segmented" in out and not err
    names = ["a.npz", "a_mask.png", "a_overlay.png", "efficiency.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    truth = cv2.imread(str(pictures / "a.png"), cv2.IMREAD_GRAYSCALE) > 0
    with np.load(tmp_path / "out/a.npz") as file:
        assert file["segs"].dtype == np.uint8 and dice(file["segs"] == 1, truth) > 0.9
        assert file["boxes"].tolist() == [[25, 15, 75, 45]]
    assert cv2.imread(str(tmp_path / "out/a_overlay.png")).shape[1] >= 512


def test_an_overlay_whose_name_is_too_long_costs_a_line(pictures, tmp_path, run):
    """Fault 9: it cost the masks."""
    name = "a" * 244
    (pictures / "a.png").rename(pictures / f"{name}.png")
    out, err = run("-i", pictures / f"{name}.png", "-o", tmp_path / "out", "--box", 25, 15, 75, 45, code=1)
    assert "1 segmented, 0 skipped as finished, 0 failed" in out and (tmp_path / "out" / f"{name}_mask.png").exists()
    assert len(err) == 1 and "File name too long" in err[0]


def test_a_table_chooses_resumes_and_costs_its_bad_lines(pictures, tmp_path, run):  # fault 36
    """Faults 36 and 37: an absent name ended the run, and after editing the table the old masks stayed."""
    table, words = tmp_path / "b.csv", ("-i", pictures, "-o", tmp_path / "out", "--boxes", tmp_path / "b.csv")
    table.write_text("file,x0,y0,x1,y1\na.png,25,15,75,45\nsub/b.jpg,25,15,75,45\nc.tif,25,15,75,45\nd.png,1,1,9,9\n")
    out, err = run(*words, "--overlay", tmp_path / "show", code=1)
    assert "3 segmented, 0 skipped as finished, 1 failed" in out
    assert "c.tif: intensities: 0.5 and 99.5 percentiles" in out
    assert len(err) == 1 and err[0].startswith("d.png: file: expected")
    assert sorted(path.name for path in (tmp_path / "show").iterdir()) == [f"{stem}_overlay.png" for stem in "abc"]
    table.write_text(table.read_text().replace("d.png,1,1,9,9\n", ""))
    assert "0 segmented, 3 skipped" in run(*words)[0]
    table.write_text(table.read_text().replace("a.png,25,15,75,45", "a.png,25,15,50,45"))
    out, _ = run(*words)
    assert "a.png: done again: other boxes" in out and "1 segmented, 2 skipped" in out
    with np.load(tmp_path / "out/a.npz") as file:
        assert not file["segs"][:, 55:].any()
    assert "c.tif: done again: other window" in run(*words, "--window", 2000, 4000)[0]


def test_a_mask_picture_that_is_gone_is_made_again(pictures, tmp_path, run):  # fault 37
    """Fault 37: a case counted as finished without one of its outputs."""
    words = ("-i", pictures / "a.png", "-o", tmp_path / "out", "--box", 25, 15, 75, 45)
    run(*words)
    (tmp_path / "out/a_mask.png").unlink()
    assert "a.png: done again: a_mask.png is gone" in run(*words)[0] and (tmp_path / "out/a_mask.png").exists()
    assert "1 skipped" in run(*words)[0]


def test_points_are_drawn_and_an_empty_mask_is_said(pictures, tmp_path, run):  # fault 38
    run("-i", pictures / "a.png", "-o", tmp_path / "o", "--point", 50, 30, "--not", 5, 5)
    picture = cv2.imread(str(tmp_path / "o/a_overlay.png"))[..., ::-1]
    scale = picture.shape[0] / 60
    assert picture[int(30.5 * scale), int(50.5 * scale)].tolist() == [0, 200, 0]
    assert picture[int(5.5 * scale), int(5.5 * scale)].tolist() == [230, 0, 0]
    out, err = run("-i", pictures / "a.png", "-o", tmp_path / "o", "--box", 0, 0, 10, 10)
    assert err == ["a.png: label 1: nothing found"] and "1 segmented" in out
    _, err = run("-i", pictures / "a.png", "-o", tmp_path / "o", "--point", 50, 30)
    assert len(err) == 1 and err[0].startswith("a.png: points without a box")


def test_a_bad_file_costs_one_line(pictures, tmp_path, run):
    """Fault 36: so does a name beside another with the same result."""
    (pictures / "bad.png").write_bytes(b"hello")
    for name in ("small.bmp", "a.bmp"):
        cv2.imwrite(str(pictures / name), np.zeros((5, 5), np.uint8))
    out, err = run("-i", pictures, "-o", tmp_path / "out", "--box", 25, 15, 75, 45, code=1)
    assert "2 segmented, 0 skipped as finished, 4 failed" in out
    assert [line.split(":")[0].split("/")[-1] for line in err] == ["a.png", "a.bmp", "bad.png", "small.bmp"]


def test_a_picture_named_like_a_volume_is_drawn_again(pictures, tmp_path, run):
    picture = (pictures / "a.png").rename(pictures / "3D_view.png")
    for done in ("1 segmented", "1 skipped"):
        out, err = run("-i", picture, "-o", tmp_path / "out", "--box", 25, 15, 75, 45, "--overlay", tmp_path / "drawn")
        assert done in out and not err and (tmp_path / "drawn/3D_view_overlay.png").exists()
        (tmp_path / "drawn/3D_view_overlay.png").unlink()


@pytest.mark.parametrize("words, expected", [
    ([], "--pick"), (["--box", 1, 2, 3], "--box: expected 4"), (["--boxes", "absent.csv"], "absent.csv"),
    (["--box", 1, 2, 3, 4, "--window", "heart"], "--window")])
def test_wrong_options_are_one_line(pictures, tmp_path, run, words, expected):
    for source in (pictures, pictures / "a.png"):
        out, err = run("-i", source, "-o", tmp_path / "out", *words, code=1)
        assert len(err) == 1 and expected in err[0] and not (tmp_path / "out").exists()


def test_outputs_never_touch_inputs(pictures, tmp_path, run):
    box = ("--box", 25, 15, 75, 45)
    assert "another folder" in run("-i", pictures, "-o", pictures, *box, code=1)[1][0]
    words = "-i", pictures, "-o", tmp_path / "out", "--overlay", pictures, *box
    assert "another folder" in run(*words, code=1)[1][0]
    for done in ("3 segmented", "3 skipped"):                    # the second run finds the first one's pictures
        assert done in run("-i", pictures, "-o", pictures / "masks", *box)[0]


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_volume_in_another_orientation(tmp_path, run, exact_volumes, axis):
    """test_nifti.py turns all 48; here one goes the whole way: axes in another order, two of them reversed."""
    nib = pytest.importorskip("nibabel")
    affine = np.array([[0, 0, -2.9, 7], [0.7, 0, 0, -40], [0, -1.3, 0, 3], [0, 0, 0, 1]])
    data = np.zeros((24, 28, 20), np.int16)
    data[4:15, 12:24, 7:16] = 900
    truth = data > 0
    data[0, 0, 0] = data[-1, 5, -2] = 900                        # bright, but outside the box
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "v.nii.gz")
    out, err = run("-i", tmp_path / "v.nii.gz", "-o", tmp_path / "out", "--box", 2, 10, 5, 15, 24, 16, "--axis", axis,
                   "--window", 450, 900)
    assert "1 segmented" in out and not err and "window level 450 width 900" in out
    mask = nib.load(tmp_path / "out" / "v_mask.nii.gz")
    assert np.allclose(mask.affine, affine, atol=1e-4) and (np.asarray(mask.dataobj) == truth).all()


def test_a_box_on_one_slice_with_a_range(tmp_path, run, exact_volumes):
    nib = pytest.importorskip("nibabel")
    data = np.full((40, 50, 12), 255, np.uint8)
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, -2, 1])), tmp_path / "v.nii")          # slices run downward
    run("-i", tmp_path / "v.nii", "-o", tmp_path / "out", "--box", 5, 17, 21, 43, "--z", 2, 9, "--slice", 3)
    mask = np.asarray(nib.load(tmp_path / "out" / "v_mask.nii.gz").dataobj)
    expected = np.zeros_like(mask)
    expected[5:22, 17:44, 2:10] = 1
    assert (mask == expected).all() and exact_volumes == [[11 - 3]]
    assert cv2.imread(str(tmp_path / "out" / "v_overlay.png")) is not None


def test_a_volume_through_the_network(tmp_path, run):
    """A square that drifts: prompted on slice 2, where its box fits, it is followed upward."""
    nib = pytest.importorskip("nibabel")
    data = np.zeros((128, 128, 6), np.uint8)
    for k in range(6):
        data[20 + 4 * k:60 + 4 * k, 40:80, k] = 255
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, 2, 1])), tmp_path / "v.nii.gz")
    run("-i", tmp_path / "v.nii.gz", "-o", tmp_path / "out", "--box", 26, 38, 70, 82, "--z", 2, 5, "--slice", 2)
    mask = np.asarray(nib.load(tmp_path / "out" / "v_mask.nii.gz").dataobj)
    assert [bool(mask[..., k].any()) for k in range(6)] == [False, False, True, True, True, True]
    assert dice(mask[..., 2] == 1, data[..., 2] > 0) > 0.9


def test_converted_folders_are_segmented_and_scored(pictures, tmp_path, run):
    for name in ("a.png", "sub/b.png", "c.png"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "masks" / name), squares((60, 90), [(20, 40, 30, 70)]))
    words = ["-i", pictures, "-g", tmp_path / "masks", "-o", tmp_path / "npz", "--modality", "US"]
    assert convert.main([*map(str, words)]) == 0
    out, err = run("-i", tmp_path / "npz", "-o", tmp_path / "segs")
    assert "3 segmented" in out and not err
    assert not eval.main(["-s", str(tmp_path / "segs"), "-g", str(tmp_path / "npz"), "--workers", "1"])
    lines = (tmp_path / "segs" / "metrics.csv").read_text().splitlines()
    assert sum("2D_US" in line for line in lines) == 3


def test_pick_saves_what_was_drawn_and_quitting_ends_the_run(pictures, tmp_path, run, monkeypatch):
    monkeypatch.setattr(infer, "require_display", lambda: None)
    seen = []

    def drawn(model, case, overlap):
        seen.append(case.name)
        case.boxes = np.array([[25.0, 15, 75, 45]])
        return len(seen) == 1

    monkeypatch.setattr(infer, "pick", drawn)
    out, err = run("-i", pictures, "-o", tmp_path / "out", "--pick")
    assert seen == ["a.png", "c.tif"] and "1 segmented" in out and not err
    assert [p.name for p in (tmp_path / "out").glob("*.npz")] == ["a.npz"]
    with np.load(tmp_path / "out/a.npz") as file:
        assert file["boxes"].tolist() == [[25, 15, 75, 45]] and file["segs"][30, 50] == 1


def test_pick_without_a_display_is_one_line(pictures, tmp_path, run, monkeypatch):
    class Failed:
        returncode = 1

    monkeypatch.setattr(pick.subprocess, "run", lambda *words, **options: Failed)
    _, err = run("-i", pictures, "-o", tmp_path / "out", "--pick", code=1)
    assert len(err) == 1 and err[0].startswith("--pick: expected a screen")
