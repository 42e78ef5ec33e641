"""Which object keeps a pixel that two masks claim: hand-made logits, and the synthetic cases of ../shared/cases."""
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import BrightSam, squares

from medficient_mini import dsc, load_model, segment_volume
from medficient_mini.inference.compose import Composition, compose, lost_objects
from medficient_mini.inference.npz import read_case
from medficient_mini.inference.predictor import segment_image

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
# Squares of 256×256 pixels, from and to along both axes, with their logit.
SQUARES = {"ring": (20, 199, 1.0), "cavity": (80, 139, 0.5), "crossing": (130, 239, 2.0), "twin": (22, 199, 0.9)}
STRAY = (0, 8, 255, 60)              # a box far from the mask that comes with it


def composed(names, overlap="inside", boxes=None, size=256):
    found = Composition((256, 256), len(names), overlap, separate=True)
    logits = torch.full((len(names), 256, 256), -1.0)
    for one, name in zip(logits, names):
        first, last, value = SQUARES[name]
        one[first:last + 1, first:last + 1] = value
    if boxes is None:
        boxes = [(SQUARES[name][0],) * 2 + (SQUARES[name][1],) * 2 for name in names]
    compose(found, np.arange(len(names)), logits, np.array(boxes, float), size)
    return found


def test_an_inner_object_goes_on_top_and_else_the_higher_logit_wins():
    found = composed(["cavity", "ring", "crossing"])
    assert found.labels[100, 100] == 1 and found.labels[50, 50] == 2 and found.labels[220, 220] == 3
    assert found.labels[170, 170] == 3                                       # ring and crossing: the higher logit
    assert found.mask_sizes.tolist() == [60 * 60, 180 * 180, 110 * 110]
    assert found.kept_sizes().sum() == (found.labels > 0).sum()
    assert composed(["cavity", "ring"], "higher").labels[100, 100] == 2
    for names in (["cavity", "ring"], ["ring", "cavity"]):
        assert composed(names, "later").labels[100, 100] == 2
    with pytest.raises(ValueError, match="overlap: expected one of"):
        composed(["ring"], "late")


def test_neither_a_poor_mask_nor_a_twin_lies_inside():
    assert composed(["twin", "ring"]).labels[100, 100] == 2                  # hardly smaller: the higher logit
    assert composed(["cavity", "ring"], boxes=[STRAY, (20, 20, 199, 199)]).labels[100, 100] == 2


@pytest.mark.parametrize("overlap", ["inside", "higher"])
def test_the_order_of_the_boxes_plays_no_part(overlap):
    names, order = ["cavity", "ring", "crossing", "twin"], [2, 0, 3, 1]
    labels = composed(names, overlap, size=512).labels
    permuted = composed([names[k] for k in order], overlap, size=512).labels
    assert np.array_equal(np.array([0, *(k + 1 for k in order)])[permuted], labels)
    assert len(np.unique(labels)) > 2


def test_lost_objects_are_named_and_own_masks_kept():
    boxes = np.array([[5., 5, 35, 35], [5, 5, 35, 35], [40, 40, 60, 60]])
    found = segment_image(BrightSam(), squares((64, 64), [(10, 30, 10, 30)]), boxes, details=True, separate=True)
    assert set(np.unique(found.labels)) == {0, 1}                            # the first of equal boxes keeps all
    own = (found.labels == 1).sum()
    assert lost_objects(found) == [f"label 2: {own} of the {own} pixels of its mask went to other objects",
                                   "label 3: nothing found"]
    masks = found.masks()
    assert masks.dtype == bool and masks.shape == (3, 64, 64)
    assert np.array_equal(masks[0], masks[1]) and np.array_equal(masks[0], found.labels == 1) and not masks[2].any()


@pytest.mark.parametrize("propagation", ["sections", "published"])
def test_own_masks_of_a_volume_are_bits(propagation):
    volume = np.stack([squares((64, 64), [(10, 30, 10, 30)])] * 3)
    boxes = np.tile([[5., 5, 0, 35, 35, 2]], (9, 1))
    boxes[:, 5] = [0, 1, 2] * 3
    found = segment_volume(BrightSam(), volume, boxes, propagation=propagation, details=True, separate=True)
    own = np.unpackbits(found.bits, axis=0, count=9, bitorder="little")
    assert own.shape == (9, 3, 64, 64) and np.array_equal(own.sum((1, 2, 3)), found.mask_sizes)
    assert not own[0, 1:].any() and np.array_equal(own[2], own[8])
    assert np.array_equal(found.kept_sizes(), [(found.labels == k).sum() for k in range(1, 10)])


def test_another_overlap_is_refused_though_there_is_no_box():
    with pytest.raises(ValueError, match="overlap: expected one of"):
        segment_image(BrightSam(), np.zeros((8, 8), np.uint8), np.zeros((0, 4)), "late")


@pytest.mark.skipif(not CASES.is_dir(), reason=f"synthetic cases absent: {CASES}")
def test_nested_objects_with_the_default_weights(one_thread):
    model, labels = load_model(precision="f32"), {}
    for name in ("inner_first", "outer_first"):
        case = read_case(CASES / f"2D_MR_nested_{name}.npz", need_gts=True)
        labels[name] = segment_image(model, case.pixels, case.boxes)
        assert all(dsc(case.gts == k, labels[name] == k) >= 0.95 for k in (1, 2))
    assert np.array_equal(labels["inner_first"], np.array([0, 2, 1])[labels["outer_first"]])
    case = read_case(CASES / "3D_MR_nested_inner_first.npz", need_gts=True)
    found = segment_volume(model, case.pixels, case.boxes, details=True, separate=True)
    for k, own in enumerate(found.masks(), 1):                               # no worse than each mask by itself
        truth = case.gts == k
        assert own.any() and dsc(truth, found.labels == k) >= dsc(truth, own) - 0.02
