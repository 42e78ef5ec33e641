"""`infer.py` on users' own pictures and NIfTI volumes, with a stand-in network whose masks are known."""
import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import BrightSam

import infer
from medficient_mini.inference.npz import read_case
from medficient_mini.userfiles.convert import main as convert

ROOT = Path(__file__).resolve().parents[2]


class OnPoints(BrightSam):
    """Without a box: what is bright, wherever the points are."""

    def decode(self, embedding, boxes=None, points=None, masks=None, **options):
        if boxes is None:
            boxes = BrightSam().anchor.new_tensor([[0, 0, 511, 511]])
        return super().decode(embedding, boxes, **options)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words, code=0) -> (stdout, lines of stderr that are no progress) of infer.py in this process."""
    monkeypatch.setattr(infer, "load", lambda arguments: OnPoints())

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words)])
        capsys.readouterr()
        assert infer.main() == code
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if not line.startswith("segmenting")]
    return run


@pytest.fixture
def pictures(tmp_path):
    """One object each: grey, colour in a subfolder, 16 bit."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    image = np.zeros((60, 90), np.uint8)
    image[20:40, 30:70] = 255
    cv2.imwrite(str(folder / "a.png"), image)
    cv2.imwrite(str(folder / "sub" / "b.jpg"), np.dstack([image] * 3))
    cv2.imwrite(str(folder / "c.tif"), image.astype(np.uint16) * 10 + 7)
    return folder


@pytest.fixture
def exact_volumes(monkeypatch):
    """Volumes are segmented exactly: the bright voxels of each box. The list holds the `start` of every call."""
    starts = []

    def segment_volume(model, volume, boxes, start=None, **options):
        segs = np.zeros(volume.shape, np.uint8)
        for k, (x0, y0, z0, x1, y1, z1) in enumerate(boxes.astype(int), 1):
            place = np.s_[z0:z1 + 1, y0:y1 + 1, x0:x1 + 1]
            segs[place][volume[place] > 128] = k
        starts.append(None if start is None else start.tolist())
        return segs

    monkeypatch.setattr(infer, "segment_volume", segment_volume)
    return starts


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_picture_gives_a_mask_picture_an_overlay_and_an_npz(pictures, tmp_path, run):
    out, err = run("-i", pictures / "a.png", "-o", tmp_path / "out", "--box", 25, 15, 75, 45, "--box", 0, 0, 9, 9)
    assert "a.png: intensities: 8 bits as they are" in out and "1 segmented" in out and not err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npz", "a_mask.png", "a_overlay.png", "efficiency.csv"]
    mask = cv2.imread(str(tmp_path / "out/a_mask.png"), cv2.IMREAD_UNCHANGED)
    truth = cv2.imread(str(pictures / "a.png"), cv2.IMREAD_GRAYSCALE) > 0
    assert mask.shape == truth.shape and mask.dtype == np.uint8 and mask.max() == 1 and dice(mask > 0, truth) > 0.9
    with np.load(tmp_path / "out/a.npz") as file:
        assert (file["segs"] == mask).all() and len(file["boxes"]) == 2
    assert cv2.imread(str(tmp_path / "out/a_overlay.png")).shape[1] >= 512


def test_prompts_typed_now_are_computed_now_and_tables_resume(pictures, tmp_path, run):
    for _ in range(2):
        assert "1 segmented, 0 skipped" in run("-i", pictures / "a.png", "-o", tmp_path / "o", "--point", 50, 30)[0]
    (tmp_path / "b.csv").write_text("file,x0,y0,x1,y1\na.png,25,15,75,45\nsub/b.jpg,25,15,75,45\nc.tif,25,15,75,45\n")
    words = ("-i", pictures, "-o", tmp_path / "out", "--boxes", tmp_path / "b.csv", "--overlay", tmp_path / "show")
    out, err = run(*words)
    assert "3 segmented, 0 skipped" in out and not err and "c.tif: intensities: 0.5 and 99.5 percentiles" in out
    truth = cv2.imread(str(pictures / "a.png"), cv2.IMREAD_GRAYSCALE) > 0
    for stem in "abc":
        assert dice(cv2.imread(str(tmp_path / f"out/{stem}_mask.png"), cv2.IMREAD_UNCHANGED) > 0, truth) > 0.9
        assert (tmp_path / "show" / f"{stem}_overlay.png").exists()
    assert "0 segmented, 3 skipped" in run(*words)[0]


def test_points_are_drawn_and_an_empty_mask_is_said(pictures, tmp_path, run):
    run("-i", pictures / "a.png", "-o", tmp_path / "o", "--point", 50, 30, "--not", 5, 5)
    picture = cv2.imread(str(tmp_path / "o/a_overlay.png"))[..., ::-1]
    scale = picture.shape[0] / 60
    assert picture[int(30.5 * scale), int(50.5 * scale)].tolist() == [0, 200, 0]
    assert picture[int(5.5 * scale), int(5.5 * scale)].tolist() == [230, 0, 0]
    out, err = run("-i", pictures / "a.png", "-o", tmp_path / "o", "--box", 0, 0, 10, 10)
    assert err == ["a.png: nothing found"] and "1 segmented" in out


def test_a_bad_file_costs_one_line(pictures, tmp_path, run):
    (pictures / "bad.png").write_bytes(b"hello")
    cv2.imwrite(str(pictures / "small.bmp"), np.zeros((5, 5), np.uint8))
    out, err = run("-i", pictures, "-o", tmp_path / "out", "--box", 25, 15, 75, 45, code=1)
    assert "3 segmented, 0 skipped as finished, 2 failed" in out
    assert [line.split(":")[0] for line in err] == ["bad.png", "small.bmp"]


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
    for _ in range(2):                                           # the second run finds the first one's pictures
        assert "3 segmented" in run("-i", pictures, "-o", pictures / "masks", *box)[0]
    cv2.imwrite(str(pictures / "a.bmp"), np.zeros((60, 90), np.uint8))
    assert "file names that differ" in run("-i", pictures, "-o", tmp_path / "out", *box, code=1)[1][0]
    (pictures / "npz").mkdir()
    np.savez(pictures / "npz" / "2D_CT_a.npz", imgs=np.zeros((9, 9), np.uint8), boxes=np.array([[1, 1, 5, 5]]))
    before = (pictures / "npz" / "2D_CT_a.npz").read_bytes()
    for source in (pictures / "npz", pictures / "npz" / "2D_CT_a.npz"):
        run("-i", source, "-o", pictures / "npz", "--overwrite", code=1)
    assert (pictures / "npz" / "2D_CT_a.npz").read_bytes() == before


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_volumes_in_all_48_orientations(tmp_path, run, exact_volumes, axis):
    nib = pytest.importorskip("nibabel")
    affines, truths, lines = [], [], []
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        affine = np.eye(4)
        for a in range(3):
            affine[order[a], a] = signs[a] * (0.7, 1.3, 2.9)[order[a]]
        affine[:3, 3] = rng.normal(0, 50, 3)
        data = np.zeros(np.array([24, 28, 20])[list(order)], np.int16)
        inside = tuple(slice(low, high) for low, high in np.array([(4, 15), (12, 24), (7, 16)])[list(order)])
        data[inside] = 900
        name = f"v{len(affines)}.nii.gz"
        nib.save(nib.Nifti1Image(data, affine), tmp_path / "in" / name)
        data[0, 0, 0] = data[-1, 5, -2] = 900                    # bright, but outside the box
        corners = [s.start - 2 for s in inside] + [s.stop + 1 for s in inside]
        lines.append(",".join(map(str, [name, *corners])))
        affines.append(affine)
        truth = np.zeros(data.shape, bool)
        truth[inside] = True
        truths.append(truth)
    (tmp_path / "b.csv").write_text("\n".join(lines))
    out, err = run("-i", tmp_path / "in", "-o", tmp_path / "out", "--boxes", tmp_path / "b.csv", "--axis", axis,
                   "--window", 450, 900)
    assert "48 segmented" in out and not err and "window level 450 width 900" in out
    for k, (affine, truth) in enumerate(zip(affines, truths)):
        mask = nib.load(tmp_path / "out" / f"v{k}_mask.nii.gz")
        assert np.allclose(mask.affine, affine, atol=1e-4) and mask.shape == truth.shape
        assert (np.asarray(mask.dataobj) == truth).all()


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


def test_converted_folders_are_segmented_and_scored(pictures, tmp_path, run, capsys):
    import eval as score
    from medficient_mini.training.samples import scan_cases
    for path in ("a.png", "sub/b.jpg", "c.tif"):
        target = tmp_path / "masks" / Path(path).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), cv2.imread(str(pictures / "a.png"), cv2.IMREAD_GRAYSCALE))
    assert convert(["-i", str(pictures), "-g", str(tmp_path / "masks"), "-o", str(tmp_path / "npz"), "--modality", "US",
                    "--margin", "3"]) == 0
    assert [case.modality for case in scan_cases(tmp_path / "npz", need_masks=True)] == ["US"] * 3
    out, err = run("-i", tmp_path / "npz", "-o", tmp_path / "segs")
    assert "3 segmented" in out and not err
    sys.argv = ["eval.py", "-s", str(tmp_path / "segs"), "-g", str(tmp_path / "npz"), "--workers", "1"]
    assert not score.main()
    for path in (tmp_path / "npz").glob("*.npz"):
        gts = read_case(path, need_gts=True).gts
        with np.load(tmp_path / "segs" / path.name) as file:
            assert dice(file["segs"] > 0, gts > 0) > 0.9
    assert (tmp_path / "segs" / "metrics.csv").read_text().count("2D_US") == 3


def test_pick_saves_what_was_drawn_and_quitting_ends_the_run(pictures, tmp_path, run, monkeypatch):
    monkeypatch.setattr(infer, "require_display", lambda: None)
    seen = []

    def drawn(model, case, **options):
        seen.append(case.name)
        if len(seen) == 2:
            return None
        case.boxes = np.array([[25.0, 15, 75, 45]])
        return infer.segment_image(model, case.image, case.boxes)

    monkeypatch.setattr(infer, "pick", drawn)
    out, err = run("-i", pictures, "-o", tmp_path / "out", "--pick")
    assert seen == ["a.png", "c.tif"] and "1 segmented" in out
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npz")) == ["a.npz"]


def test_pick_without_a_display_is_one_line(pictures, tmp_path, run, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    out, err = run("-i", pictures, "-o", tmp_path / "out", "--pick", code=1)
    assert len(err) == 1 and err[0].startswith("--pick: expected a screen")


def test_help_shows_the_options():
    text = subprocess.run([sys.executable, ROOT / "infer.py", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--box", "--boxes", "--point", "--not", "--pick", "--window", "--axis", "--z", "--slice"):
        assert option in text
