"""Volumes: prompts of every slice (the default) and the published propagation, with a stand-in network."""
from functools import partial

import numpy as np
import pytest
import torch
from fakes import BrightSam, squares

from medficient_mini.inference.volume import Stopped, next_prompt, section_boxes, segment_volume

propagate = partial(segment_volume, propagation="published")


# ------------------------------------------------------------------------------------------------- sections

def test_section_boxes_by_hand():
    box = np.array([[0., 0, 0, 10, 20, 4]])
    assert section_boxes(box, 2).tolist() == [[0, 0, 10, 20]]
    # slice 0 is 2 of 2.5 from the middle: the ellipsoid's section has sqrt(1 - 0.64) = 0.6 of the box, midway is 0.8
    assert section_boxes(box, 0) == pytest.approx(np.array([[1, 2, 9, 18]]))
    assert section_boxes(box, 4) == pytest.approx(section_boxes(box, 0))
    # drawn on slice 1: the upper half ellipsoid reaches 3.5, the lower 1.5
    start = np.array([1])
    assert section_boxes(box, 1, start).tolist() == [[0, 0, 10, 20]]
    scale = (1 + np.sqrt(1 - (1 / 1.5) ** 2)) / 2
    assert section_boxes(box, 0, start) == pytest.approx(np.array([[5 - 5 * scale, 10 - 10 * scale, 5 + 5 * scale, 10 + 10 * scale]]))
    one = np.array([[3., 4, 7, 9, 9, 7], [0, 0, 6, 8, 8, 7]])
    assert section_boxes(one, 7)[0].tolist() == [3, 4, 9, 9]                 # a one-slice box is the prompt itself
    assert section_boxes(one, 7)[1, 0] == pytest.approx(4 - 4 * (1 + np.sqrt(0.75)) / 2)


class Recorder(BrightSam):
    """Keeps the prompts."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def decode(self, embedding, boxes, **options):
        self.seen.append(boxes.clone())
        return super().decode(embedding, boxes, **options)


@pytest.mark.parametrize("start", [None, np.array([3, 6])])
def test_sections_prompt_every_slice_and_each_is_encoded_once(start):
    volume = np.stack([squares((96, 128), [(40, 80, 40, 80)])] * 9)
    boxes = np.array([[30, 36, 2, 90, 84, 6], [100, 60, 5, 110, 90, 6]], np.uint8)          # 255 would overflow in sums
    model = Recorder()
    segs = segment_volume(model, volume, boxes, start)
    assert model.encoded == 5                                                # slices 2 to 6, though 5 and 6 serve two boxes
    scale, expected = model.image_size / 128, []
    for z in (2, 3, 4, 5, 6):
        here = [0] if z < 5 else [0, 1]
        prompts = section_boxes(boxes[here].astype(float), z, None if start is None else start[here]) * scale
        expected.append(prompts.ravel().tolist())
    seen = sorted(prompts.ravel().tolist() for prompts in model.seen)        # slices side by side end in any order
    assert [len(numbers) for numbers in seen] == [len(numbers) for numbers in sorted(expected)]
    assert sum(seen, []) == pytest.approx(sum(sorted(expected), []), rel=1e-5)
    assert (segs[2:7] == 1).any((1, 2)).all() and not segs[[0, 1, 7, 8]].any()
    bright = (segs[4] == 1) & (volume[4] > 0)
    assert bright.sum() > 0.9 * (volume[4] > 0).sum()                        # the mask lies where the square is


def test_masks_stay_in_the_given_box_and_nothing_drifts():
    volume = drifting_volume()
    box = np.array([[38., 44, 2, 82, 76.4, 9]])                              # cuts the square above and below as well
    published, new = propagate(LooseSam(), volume, box), segment_volume(LooseSam(), volume, box)
    assert published[..., 83:].any() and published[:, :44].any()             # follows the square out of the box
    assert not new[..., 83:].any() and not new[..., :38].any() and not new[:, :44].any() and not new[:, 78:].any()
    assert new[:, 44].any() and new[:, 76].any()


def test_an_empty_end_slice_stays_empty_and_the_next_is_not_harmed():
    volume = np.stack([squares((64, 64), [(20, 40, 20, 40)])] * 7)
    volume[[0, 3]] = 0
    segs = segment_volume(BrightSam(), volume, np.array([[15., 15, 0, 45, 45, 6]]))
    assert not segs[[0, 3]].any() and segs[[1, 2, 4, 5, 6]].any((1, 2)).all()


def test_several_pieces_first_and_last_slice_and_the_image_border():
    volume = np.stack([squares((64, 64), [(0, 20, 0, 20), (44, 64, 44, 64)])] * 4)
    segs = segment_volume(LooseSam(), volume, np.array([[0., 0, 0, 63, 63, 3]]))
    for z in range(4):
        assert segs[z, 10, 10] == 1 and segs[z, 54, 54] == 1 and segs[z, 32, 32] == 0
    assert segs[1, 0, 0] == 1 and segs[1, 63, 63] == 1


def test_one_slice_boxes_rgb_and_no_box():
    volume = np.repeat(drifting_volume()[..., None], 3, axis=-1)
    segs = segment_volume(BrightSam(), volume, np.array([[20., 36, 3, 90, 84, 3]]))
    assert segs.shape == volume.shape[:3] and segs[3].any() and not segs[:3].any() and not segs[4:].any()
    assert not segment_volume(BrightSam(), volume, np.zeros((0, 6))).any()


def test_many_boxes_and_unknown_names():
    volume = squares((64, 64), [(10, 50, 10, 50)])[None]
    boxes = np.tile([[8., 8, 0, 52, 52, 0]], (260, 1))
    segs = segment_volume(BrightSam(), volume, boxes, overlap="later")
    assert segs.dtype == np.uint16 and segs.max() == 260
    assert segment_volume(BrightSam(), volume, boxes[:3]).max() == 1         # equal logits: the first keeps the voxel
    for wrong in (dict(propagation="section"), dict(overlap="late"), dict(overlap="late", propagation="published")):
        with pytest.raises(ValueError, match="expected one of"):
            segment_volume(BrightSam(), volume, boxes, **wrong)


def test_progress_and_stopping():
    volume, seen = drifting_volume(), []
    boxes = np.array([[38., 36, 2, 82, 84, 4], [30, 36, 7, 110, 84, 8]])
    for segment in (segment_volume, propagate):
        seen.clear()
        segment(BrightSam(), volume, boxes, progress=lambda done, total: seen.append((done, total)))
        assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and len({total for _, total in seen}) == 1
        assert seen[-1][0] == seen[-1][1] >= 5
        with pytest.raises(Stopped, match="stopped after 2 of"):
            segment(BrightSam(), volume, boxes, progress=lambda *state: seen.append(state),
                    should_stop=lambda: seen[-1][0] == 2)
        seen.append((0, 0))


def test_boxes_and_volumes_are_checked():                                    # fault 34
    volume = drifting_volume()
    for wrong in (np.ones((3, 4)), [[5., 5, 3, np.nan, 9, 5]], [[60, 5, 3, 5, 50, 5]], [[5, 5, 50, 60, 50, 60]]):
        with pytest.raises(ValueError, match="boxes: expected"):
            segment_volume(BrightSam(), volume, np.array(wrong))
    with pytest.raises(ValueError, match="uint8"):
        segment_volume(BrightSam(), volume.astype(float), np.zeros((0, 6)))


# ---------------------------------------------------------------------------------------- published propagation

def drifting_volume():
    """A square that moves by 4 pixels a slice, so that only propagation can follow it out of its first box."""
    return np.stack([squares((128, 128), [(40, 80, 20 + 4 * z, 60 + 4 * z)]) for z in range(12)])


class LooseSam(BrightSam):
    """Sees the object up to 5 pixels of the 128 beyond its box, as a network does."""

    def decode(self, embedding, boxes, **options):
        return super().decode(embedding, boxes + 20 * torch.tensor([-1, -1, 1, 1]), **options)


def test_published_propagation_follows_from_the_middle_slice_both_ways_and_stops_at_the_range():
    volume = drifting_volume()
    box = np.array([[38., 36, 2, 82, 84, 9]])                                # round the square of the middle slice, 5
    segs = propagate(LooseSam(), volume, box)
    assert segs.shape == volume.shape and segs.dtype == np.uint8
    assert not segs[:2].any() and not segs[10:].any()
    for z in range(2, 10):
        assert ((segs[z] == 1) & (volume[z] > 0)).sum() / (volume[z] > 0).sum() > 0.9
    assert segs[9, :, 84:].any() and segs[2, :, :36].any()                   # where the given box does not reach


def test_published_propagation_an_empty_mask_falls_back_to_the_given_box():
    volume = np.stack([squares((64, 64), [(20, 40, 20, 40)]) for _ in range(7)])
    volume[4] = 0                                                            # nothing to see here
    segs = propagate(BrightSam(), volume, np.array([[15., 15, 0, 45, 45, 6]]))
    assert not segs[4].any() and all(segs[z].any() for z in (0, 1, 2, 3, 5, 6))


def test_published_propagation_encodes_every_slice_once_and_forgotten_ones_again(monkeypatch):
    volume = drifting_volume()
    boxes = np.array([[20., 36, 0, 100, 84, 5], [30, 36, 3, 110, 84, 11], [60, 30, 6, 120, 90, 6]])
    model = BrightSam()
    whole = propagate(model, volume, boxes)
    assert model.encoded == 12
    for count in (0, 2):
        monkeypatch.setattr("medficient_mini.inference.volume.KEPT", count)
        frugal = BrightSam()
        assert (propagate(frugal, volume, boxes) == whole).all() and frugal.encoded > 12
    alone = [propagate(BrightSam(), volume, box[None]) for box in boxes]
    together = np.zeros_like(whole)
    for k, one in enumerate(alone, 1):
        together[one > 0] = k
    assert (together == whole).all()


def test_published_propagation_takes_rgb_volumes_and_one_slice_boxes():
    volume = np.repeat(drifting_volume()[..., None], 3, axis=-1)
    segs = propagate(BrightSam(), volume, np.array([[20., 36, 3, 90, 84, 3]]))
    assert segs[3].any() and not segs[:3].any() and not segs[4:].any()


def test_lite_medsam_loosens_the_propagated_box():
    mask = np.zeros((100, 200), bool)
    mask[10:50, 0:100] = True
    default = torch.zeros(4)
    model = BrightSam()
    assert next_prompt(model, mask, default).tolist() == pytest.approx([0, 25.6, 253.44, 125.44])
    lite = BrightSam("lite_medsam")
    lite.image_size = 256
    assert next_prompt(lite, mask, default).tolist() == pytest.approx([0, 9.8, 129.72, 65.72], abs=1e-2)
    assert next_prompt(model, mask & False, default) is default


@pytest.mark.parametrize("wrong", [[np.nan], ["middle"], [1.5], [7], [[1], [1, 2]]])
def test_a_drawn_slice_that_is_none(wrong):                                  # fault 35
    with pytest.raises(ValueError, match="drawn_slice: expected"):
        segment_volume(BrightSam(), np.zeros((5, 9, 9), np.uint8), [[1, 1, 0, 5, 5, 3]], wrong)
