"""DSC and NSD against the challenge's recorded numbers, a brute force over all pairs of surfels, and hand counts."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from medficient_mini.evaluation.metrics import case_scores, contour_nsd, dsc, nsd
from medficient_mini.evaluation.surfels import CONTOUR_LENGTHS, surfel_areas

ROOT = Path(__file__).resolve().parents[2]


def surfels_by_loop(mask, spacing):
    """Corners and sizes of the surfels of one mask, corner by corner."""
    padded, sizes = np.pad(mask, 1), surfel_areas(spacing) if mask.ndim == 3 else CONTOUR_LENGTHS
    positions, weights = [], []
    for corner in itertools.product(*[range(n + 1) for n in mask.shape]):
        around = padded[tuple(slice(c, c + 2) for c in corner)].ravel()
        if around.any() and not around.all():
            positions.append(corner)
            weights.append(sizes[int("".join("01"[int(b)] for b in around), 2)])
    return np.array(positions).reshape(-1, mask.ndim), np.array(weights)


def brute_nsd(gt, seg, spacing, tolerance):
    (a, area_a), (b, area_b) = surfels_by_loop(gt, spacing), surfels_by_loop(seg, spacing)
    if not len(a) and not len(b):
        return math.nan
    # Whole steps first, then mm: at 3 * 0.4 > 1.2 the challenge's distance transform rounds in just this way.
    distances = np.sqrt((((a[:, None] - b[None]) * spacing) ** 2).sum(-1))
    near_a = distances.min(1, initial=np.inf) <= tolerance
    near_b = distances.min(0, initial=np.inf) <= tolerance
    return (area_a[near_a].sum() + area_b[near_b].sum()) / (area_a.sum() + area_b.sum())


def ball(shape, centre, radius):
    grid = np.indices(shape).reshape(3, -1).T - centre
    return (np.linalg.norm(grid, axis=1) <= radius).reshape(shape)


def box(shape, *spans):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*span) for span in spans)] = True
    return mask


# ---------------------------------------------------------------------------------------------- the challenge's numbers

def test_every_recorded_pair():
    path = ROOT.parent / "shared" / "parity" / "metrics.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    recorded = np.load(path, allow_pickle=False)
    pairs = sorted({name.split("_")[0] for name in recorded.files})
    assert len(pairs) == 17
    for pair in pairs:
        gts, segs, spacing = (recorded[f"{pair}_{what}"] for what in ("gt", "seg", "spacing"))
        for label in range(1, int(gts.max()) + 1):
            a, b = gts == label, segs == label
            np.testing.assert_allclose(dsc(a, b), recorded[f"{pair}_dsc"][label - 1], rtol=0, atol=1e-9)
            np.testing.assert_allclose(nsd(a, b, spacing), recorded[f"{pair}_nsd"][label - 1], rtol=0, atol=1e-9)
        scores = case_scores(gts, segs, spacing)
        present = np.unique(gts[gts > 0]).astype(int) - 1
        assert scores["labels"] == len(present)
        assert scores["dsc"] == pytest.approx(recorded[f"{pair}_dsc"][present].mean(), abs=1e-9)
        expected = recorded[f"{pair}_nsd"][present].mean() if scores["dsc"] > 0.2 else 0.0
        assert scores["nsd"] == pytest.approx(expected, abs=1e-9)


# --------------------------------------------------------------------------------------------------------- surfel sizes

def test_surfel_areas_by_hand():
    areas = surfel_areas((1.0, 2.0, 3.0))                   # z, y, x; bit 7 - (4z + 2y + x) of the code
    z, y, x = np.array([0.5, 0, 0]), np.array([0, 1.0, 0]), np.array([0, 0, 1.5])
    corner = np.linalg.norm(np.cross(y - z, x - z)) / 2
    for one in range(8):                                     # one voxel inside, or one outside: a triangle
        assert areas[1 << one] == pytest.approx(corner) and areas[255 - (1 << one)] == pytest.approx(corner)
    assert areas[0] == areas[255] == 0
    assert areas[0b11110000] == pytest.approx(2 * 3)         # a plane across z
    assert areas[0b11001100] == pytest.approx(1 * 3)         # across y
    assert areas[0b10101010] == pytest.approx(1 * 2)         # across x
    edge = np.hypot(0.5, 1.0) * 3                            # two voxels beside each other along x: a slanted rectangle
    assert areas[0b11000000] == pytest.approx(edge)
    assert areas[0b10000001] == pytest.approx(2 * corner)    # opposite corners: two triangles
    assert areas[0b10010110] == pytest.approx(4 * corner)    # no two beside each other: four
    # Three voxels in an L on the face z = 0: the triangle over the bend, and a flat trapezoid.
    m, p, q = np.array([0.5, 0, 0]), np.array([0.5, 2.0, 0]), np.array([0.5, 0, 3.0])
    pf, qf = np.array([0, 2.0, 1.5]), np.array([0, 1.0, 3.0])
    triangle = lambda a, b, c: np.linalg.norm(np.cross(b - a, c - a)) / 2
    assert areas[0b11100000] == pytest.approx(triangle(m, p, q) + triangle(p, pf, qf) + triangle(p, qf, q))


def test_surfel_areas_do_not_depend_on_which_side_is_inside():
    areas = surfel_areas((0.7, 1.3, 2.2))
    more_than_four = [code for code in range(256) if bin(code).count("1") > 4]
    assert all(areas[code] == pytest.approx(areas[255 - code]) for code in more_than_four)
    assert (areas[1:255] > 0).all()
    assert surfel_areas((3.0, 3.0, 3.0)) == pytest.approx(9 * surfel_areas((1.0, 1.0, 1.0)))


# ---------------------------------------------------------------------------------------------------------- brute force

SHAPE = (6, 8, 9)
MASKS = {
    "hollow": (ball(SHAPE, (3, 4, 4), 3.2) & ~ball(SHAPE, (3, 4, 4), 1.5), ball(SHAPE, (3, 4, 3), 3)),
    "far apart": (box(SHAPE, (0, 2), (0, 2), (0, 2)), box(SHAPE, (5, 6), (6, 8), (6, 9))),
    "touching the border": (box(SHAPE, (0, 3), (0, 8), (5, 9)), box(SHAPE, (0, 6), (1, 8), (0, 9))),
    "noise": tuple(np.random.default_rng(0).random((2, *SHAPE)) < 0.3),
    "empty prediction": (ball(SHAPE, (3, 4, 4), 3), np.zeros(SHAPE, bool)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("spacing, tolerance", [((2.5, 0.8, 0.8), 2), ((0.4, 1.7, 3.1), 2), ((1, 1, 1), 0),
                                                ((0.4, 0.4, 0.4), 1.2), ((1, 2, 3), 100)])
def test_nsd_matches_brute_force(name, spacing, tolerance):
    gt, seg = MASKS[name]
    assert nsd(gt, seg, spacing, tolerance) == pytest.approx(brute_nsd(gt, seg, spacing, tolerance), abs=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_2d_as_the_challenge_and_by_contour(name):
    gt, seg = (mask.any(0) if name == "far apart" else mask[3] for mask in MASKS[name])
    assert nsd(gt, seg) == pytest.approx(brute_nsd(gt[..., None], seg[..., None], (1, 1, 1), 2), abs=1e-12)
    assert contour_nsd(gt, seg) == pytest.approx(brute_nsd(gt, seg, (1, 1), 2), abs=1e-12)


def test_tolerance_is_inclusive_where_it_is_hit_exactly():
    gt, seg = box((1, 4, 40), (0, 1), (1, 2), (3, 4)), box((1, 4, 40), (0, 1), (1, 2), (8, 9))
    assert nsd(gt, seg, (0.4, 0.4, 0.4), 2.0) == 1.0         # five voxels of 0.4 mm
    assert nsd(gt, seg, (0.4, 0.4, 0.4), 1.99) < 1.0


def test_area_of_a_square_counts_in_2d_but_not_in_its_contour():
    gt, seg = box((60, 60), (5, 55), (5, 55)), box((60, 60), (8, 58), (5, 55))
    assert nsd(gt, seg) > 0.95 > 0.6 > contour_nsd(gt, seg) > 0.4


def test_dsc_by_hand():
    gt, seg = box((4, 4), (0, 2), (0, 4)), box((4, 4), (1, 4), (0, 4))
    assert dsc(gt, seg) == 2 * 4 / (8 + 12)
    assert dsc(gt, gt) == 1 and dsc(gt, ~gt) == 0 and dsc(gt, gt & False) == 0
    assert all(math.isnan(score(gt & False, gt & False)) for score in (dsc, nsd, contour_nsd))


# ---------------------------------------------------------------------------------------------------------- whole cases

def test_case_means_over_the_labels_of_the_ground_truth():
    gts, segs = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint16)
    gts[2:8, 2:8], gts[10:18, 4:12], gts[3:6, 15:25] = 1, 7, 255
    segs[3:9, 2:8], segs[10:18, 4:12], segs[15:18, 20:25] = 1, 7, 9          # 255 missed, 9 not in the ground truth
    scores = case_scores(gts, segs, contour=True)
    assert scores["labels"] == 3
    for key, function in (("dsc", dsc), ("nsd", nsd), ("nsd_contour", contour_nsd)):
        assert scores[key] == pytest.approx(np.mean([function(gts == label, segs == label) for label in (1, 7, 255)]))
    assert 0 < scores["nsd_contour"] < 1


def test_case_conventions():
    gts = np.zeros((20, 30), np.uint8)
    gts[4:9, 4:14] = 1
    low = np.zeros_like(gts)
    low[4:5, 4:9] = 1                                                         # DSC 2 * 5 / 55 = 0.18
    assert case_scores(gts, low)["dsc"] == pytest.approx(10 / 55) and nsd(gts == 1, low == 1) > 0
    assert case_scores(gts, low, contour=True)["nsd"] == case_scores(gts, low, contour=True)["nsd_contour"] == 0
    assert case_scores(gts, gts * 0) == {"labels": 1, "dsc": 0.0, "nsd": 0.0}
    for segs in (gts, gts * 0):
        assert case_scores(gts * 0, segs) == {"labels": 0, "dsc": None, "nsd": None}
    volume = np.stack([gts] * 3)
    assert case_scores(volume, volume, (5, 1, 1), contour=True)["nsd_contour"] == 1.0


@pytest.mark.parametrize("spacing, words", [(None, "found none"), ((1, 0, 1), r"found \[1, 0, 1\]"),
                                            ((1, 1), ""), ((1, 1, math.nan), ""), (np.ones((9, 40)), "")])
def test_a_bad_spacing_is_refused_in_one_line(spacing, words):                # fault 41
    with pytest.raises(ValueError, match="spacing: expected 3 positive numbers in mm, " + words) as error:
        case_scores(np.ones((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8), spacing)
    assert "\n" not in str(error.value)


def test_masks_of_different_shapes_are_refused():
    for score in (dsc, nsd, contour_nsd):
        with pytest.raises(ValueError, match=r"of one shape with 2 or 3 axes, found \(4, 4\) and \(4, 5\)"):
            score(np.zeros((4, 4)), np.zeros((4, 5)))


def test_the_import_costs_no_scipy():
    for path in (ROOT / "medficient_mini" / "evaluation").glob("*.py"):
        assert not any(line.startswith(("import scipy", "from scipy")) for line in path.read_text().splitlines()), path
