"""Augmentation, prompts and targets."""
import numpy as np
import pytest
import torch

from medficient_mini.inference.geometry import boxes_to_network
from medficient_mini.inference.volume import section_boxes
from medficient_mini.training import augment as module
from medficient_mini.training.augment import Objects, augment, draw_augmented, mask_to_network, photometric


def test_flips_move_image_and_labels_together():
    image = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9)
    seen = set()
    for seed in range(20):
        moved, labels, flip = augment(image, image.astype(np.int32), np.random.default_rng(seed), "flips", 512)
        expected = image[::-1] if flip[1] else image
        expected = expected[:, ::-1] if flip[0] else expected
        assert np.array_equal(moved, expected) and np.array_equal(labels, expected)
        seen.add(flip)
    assert len(seen) == 4


@pytest.mark.parametrize("shape", [(20, 1), (1, 20), (1, 1), (1, 20, 3)])
def test_an_image_one_pixel_wide(shape):                                       # fault 3
    for seed in range(9):
        moved, labels, _ = augment(np.zeros(shape, np.uint8), np.ones(shape[:2], np.uint8), np.random.default_rng(seed),
                                   "full", 512)
        assert moved.shape == shape and labels.shape == shape[:2]


@pytest.mark.parametrize("channels, limit", [((), 512), ((3,), 50)])
def test_rotation_moves_image_and_labels_together(channels, limit):
    labels = np.zeros((80, 100), np.uint8)
    labels[25:50, 30:70] = 3
    image = np.where(labels > 0, 200, 50).astype(np.uint8)
    image = np.repeat(image[..., None], 3, 2) if channels else image
    rotated = 0
    for seed in range(8):
        moved, moved_labels, flip = augment(image, labels, np.random.default_rng(seed), "full", limit)
        assert moved.dtype == np.uint8 and moved.shape == (*moved_labels.shape, *channels)
        assert moved.min() >= 50                                               # no new darkest value from outside
        inside = moved.reshape(*moved.shape[:2], -1)[..., 0] > 125
        assert (inside != (moved_labels == 3)).mean() < 0.02 and set(np.unique(moved_labels)) <= {0, 3}
        if flip is None:
            rotated += 1
            assert max(moved.shape) == min(limit, 100)
            assert 0.5 * 0.64 < (moved_labels == 3).mean() / 0.125 < 1.6
    assert 2 <= rotated <= 7


def test_what_moves_all_objects_away_is_drawn_again(monkeypatch):
    image, labels, drawn = np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8), []

    def lossy(image, labels, rng, mode, limit):
        drawn.append(mode)
        return image, labels * (len(drawn) == 3), (False, False)

    monkeypatch.setattr(module, "augment", lossy)
    assert draw_augmented(image, labels, None, "full", 8)[1].any() and drawn == ["full"] * 3
    assert draw_augmented(image, labels, None, "full", 8)[1].any() and drawn[3:] == ["full"] * 9
    assert not draw_augmented(image, labels * 0, None, "full", 8)[1].any() and len(drawn) == 13


@pytest.mark.parametrize("colour", [False, True])
def test_photometric_changes_values_alone(colour):
    image = np.tile(np.arange(40, 200, 4, dtype=np.uint8), (40, 1))
    image = np.stack([image, image[::-1].T, image.T] if colour else [image] * 3, axis=2)
    inverted = same = 0
    for seed in range(40):
        with np.errstate(all="raise"):
            changed = photometric(image, np.random.default_rng(seed))
        assert changed.dtype == np.uint8 and changed.shape == image.shape and changed.std() > 10
        if not colour:
            assert (changed == changed[..., :1]).all()
            assert np.array_equal(changed[..., 0], photometric(image[..., 0].copy(), np.random.default_rng(seed)))
        same += changed is image
        inverted += np.corrcoef(changed.ravel(), image.ravel())[0, 1] < 0
    assert 5 <= same <= 20 and (inverted == 0 if colour else 1 <= inverted <= 9)


@pytest.mark.parametrize("shape", [(300, 200), (1, 900), (900, 1), (100, 257), (3, 2)])
def test_a_mask_of_one_pixel_never_vanishes(shape):                            # fault 3
    mask = np.zeros(shape, bool)
    assert not mask_to_network(mask, 32).any()
    for column in range(0, shape[1], 7):
        mask[:], mask[shape[0] // 2, column] = False, True
        assert mask_to_network(mask, 32).any() and mask_to_network(mask, 256).any()


def test_a_mask_is_scaled_and_padded_as_its_image():
    mask = np.zeros((100, 200), bool)
    mask[20:60, 40:120] = True
    small, expected = mask_to_network(mask, 64), np.zeros((64, 64), np.uint8)
    expected[6:19, 13:38] = 1                                                  # rows 6.4 to 19.2, columns 12.8 to 38.4
    assert small.dtype == np.uint8 and np.array_equal(small, expected)
    assert mask_to_network(mask, 512).sum() == pytest.approx(mask.sum() * 2.56 ** 2, rel=0.03)


def test_boxes_are_loosened_by_at_most_shift_and_jitter():
    box, rng = np.array([1.0, 10, 19, 14]), np.random.default_rng(0)
    boxes = np.array([Objects(1, 8, 8).loosen(box, (30, 40), rng) for _ in range(300)])
    assert boxes.min(0).tolist() == [0, 5, 19, 14] and boxes.max(0).tolist() == [1, 10, 24, 19]
    half = np.array([Objects(1, 8, 8).loosen(box, (30, 40), rng, factor=0.5) for _ in range(300)])
    assert half.max(0).tolist() == [1, 10, 21.5, 16.5]
    strong = Objects(1, 8, 8, 0, 0.4).loosen(np.tile(box, (300, 1)), (30, 40), rng)
    assert strong[:, 2].min() < 15 and (strong[:, 2:] > strong[:, :2]).all()
    assert strong.min() >= 0 and strong[:, [0, 2]].max() <= 39
    assert Objects(1, 8, 8, 0).loosen(box, (30, 40), rng).tolist() == box.tolist()


def test_five_of_many_labels_are_drawn():
    labels, rng = np.repeat(np.arange(10), 10).reshape(10, 10), np.random.default_rng(0)
    drawn = [Objects(5, 20, 40, shift=0).draw(labels, rng) for _ in range(4)]
    assert all(targets["box_valid"].all() and (targets["masks"].sum((1, 2)) == 40).all() for targets in drawn)
    rows = [targets["boxes"][:, 1].tolist() for targets in drawn]              # row k of `labels` is label k
    assert all(0 not in some for some in rows) and len({tuple(sorted(some)) for some in rows}) > 1
    assert Objects(12, 20, 40).draw(labels, rng)["box_valid"].tolist() == [True] * 9 + [False] * 3


def test_prompts_in_use_are_those_of_inference_and_reach_beyond_the_end():
    labels = np.zeros((24, 30), np.uint8)
    labels[5:12, 6:20] = 4
    objects, rng = np.array([[4, 6, 5, 2, 19, 11, 8], [7, 0, 0, 0, 9, 9, 1]]), np.random.default_rng(0)
    drawer, seen = Objects(2, 30, 30, shift=0), set()
    for flip in [(False, False)] * 20 + [(True, True)]:
        moved = labels[::-1, ::-1] if flip[0] else labels
        targets = drawer.draw_in_use(moved, rng, objects, 8, flip)             # the last slice of label 4
        assert targets["box_valid"].tolist() == [True, False]
        assert np.array_equal(targets["masks"][0, :24].numpy(), moved > 0)
        seen.add(tuple(targets["boxes"][0].tolist()))
        last = targets["boxes"][0]
    ends = np.array([[6, 5, low, 19, 11, high] for low in (1, 2) for high in (8, 9)], float)
    assert {tuple(box) for box in boxes_to_network(section_boxes(ends, 8), 24, 30, 30).tolist()} <= seen
    assert torch.allclose((last[:2] + last[2:]) / 2, torch.tensor([29 - 12.5, 23 - 8.0]))
    for z, valid in ((1, 2), (9, 1), (10, 0)):                                 # slices without a label
        targets = drawer.draw_in_use(labels * 0, rng, objects, z, (False, False))
        assert targets["box_valid"].sum() == valid and not targets["masks"].any()
