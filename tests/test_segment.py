"""Images and volumes through the pipeline, with a stand-in network whose masks are known, and with a real one."""
import numpy as np
import pytest
import torch
from fakes import BrightSam

from medficient_mini.nets.sam import build_sam
from medficient_mini.segment import Predictor, segment_image
from medficient_mini.volume import segment_volume


def squares(shape, places):
    image = np.zeros(shape, np.uint8)
    for y0, y1, x0, x1 in places:
        image[y0:y1, x0:x1] = 255
    return image


@pytest.fixture(scope="module")
def l0():
    torch.manual_seed(0)
    return build_sam("medficientsam_l0").eval()


def test_each_box_gives_its_label_and_the_later_wins():
    image = squares((256, 256), [(40, 120, 40, 120), (160, 220, 160, 240)])
    segs = segment_image(BrightSam(), image, np.array([[35., 35, 125, 125], [150, 150, 250, 230], [80, 30, 130, 130]]))
    assert segs.dtype == np.uint8 and set(np.unique(segs)) == {0, 1, 2, 3}
    assert segs[100, 50] == 1 and segs[190, 200] == 2 and segs[100, 100] == 3
    assert abs((segs == 2).sum() - 60 * 80) < 400


def test_no_box_and_many_boxes():
    image = squares((64, 96), [(10, 50, 10, 80)])
    assert not segment_image(BrightSam(), image, np.zeros((0, 4))).any()
    boxes = np.tile([[8., 8, 82, 52]], (300, 1))
    segs = segment_image(BrightSam(), image, boxes)
    assert segs.dtype == np.uint16 and segs.max() == 300


def test_the_order_and_the_batch_of_boxes_change_no_mask(l0):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    boxes = np.array([[5., 5, 60, 50], [30, 20, 110, 80], [70, 5, 100, 85], [0, 0, 119, 89]])
    predictor = Predictor(l0)
    predictor.set_image(image)
    masks, iou, logits = predictor.predict(box=boxes)
    assert masks.shape == (4, 90, 120) and iou.shape == (4, 1) and logits.shape == (4, 1, 256, 256)
    order = [2, 0, 3, 1]
    assert (predictor.predict(box=boxes[order])[0] == masks[order]).all()
    for box, mask in zip(boxes, masks):
        assert (predictor.predict(box=box)[0][0] == mask).all()


def test_predictor_takes_sams_prompts(l0):
    predictor = Predictor(l0)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(box=[0, 0, 5, 5])
    predictor.set_image(np.random.default_rng(1).integers(0, 255, (80, 100), dtype=np.uint8))
    masks, iou, logits = predictor.predict(point_coords=[[20, 30], [50, 60]], point_labels=[1, 0], multimask_output=True)
    assert masks.shape == (1, 3, 80, 100) and iou.shape == (1, 3) and logits.shape == (1, 3, 256, 256)
    masks, _, _ = predictor.predict(box=[10, 10, 60, 60], point_coords=[[20, 30]], point_labels=[1], mask_input=logits[:, 0])
    assert masks.shape == (1, 80, 100)
    with pytest.raises(ValueError, match="as many"):
        predictor.predict(box=[[0, 0, 9, 9], [0, 0, 5, 5]], point_coords=[[20, 30]], point_labels=[1])
    with pytest.raises(ValueError, match="prompts"):
        predictor.predict()
    with pytest.raises(ValueError, match="uint8"):
        predictor.set_image(np.zeros((5, 5), np.float32))


def drifting_volume():
    """A square that moves by 4 pixels a slice, so that only propagation can follow it out of its first box."""
    return np.stack([squares((128, 128), [(40, 80, 20 + 4 * z, 60 + 4 * z)]) for z in range(12)])


class LooseSam(BrightSam):
    """Sees the object up to 5 pixels of the 128 beyond its box, as a network does."""

    def decode(self, embedding, boxes, **options):
        return super().decode(embedding, boxes + 20 * torch.tensor([-1, -1, 1, 1]), **options)


def test_propagation_follows_from_the_middle_slice_both_ways_and_stops_at_the_range():
    volume = drifting_volume()
    box = np.array([[38., 36, 2, 82, 84, 9]])                                # round the square of the middle slice, 5
    segs = segment_volume(LooseSam(), volume, box)
    assert segs.shape == volume.shape and segs.dtype == np.uint8
    assert not segs[:2].any() and not segs[10:].any()
    for z in range(2, 10):
        assert ((segs[z] == 1) & (volume[z] > 0)).sum() / (volume[z] > 0).sum() > 0.9
    assert segs[9, :, 84:].any() and segs[2, :, :36].any()                   # where the given box does not reach


def test_an_empty_mask_falls_back_to_the_given_box():
    volume = np.stack([squares((64, 64), [(20, 40, 20, 40)]) for _ in range(7)])
    volume[4] = 0                                                            # nothing to see here
    segs = segment_volume(BrightSam(), volume, np.array([[15., 15, 0, 45, 45, 6]]))
    assert not segs[4].any() and all(segs[z].any() for z in (0, 1, 2, 3, 5, 6))


def test_every_slice_is_encoded_once_and_cache_limits_change_no_mask():
    volume = drifting_volume()
    boxes = np.array([[20., 36, 0, 100, 84, 5], [30, 36, 3, 110, 84, 11], [60, 30, 6, 120, 90, 6]])
    model = BrightSam()
    whole = segment_volume(model, volume, boxes)
    assert model.encoded == 12
    frugal = BrightSam()
    assert (segment_volume(frugal, volume, boxes, cache_mb=0) == whole).all()
    assert frugal.encoded > 12
    assert (segment_volume(BrightSam(), volume, boxes, cache_mb=9) == whole).all()
    alone = [segment_volume(BrightSam(), volume, box[None]) for box in boxes]
    together = np.zeros_like(whole)
    for k, one in enumerate(alone, 1):
        together[one > 0] = k
    assert (together == whole).all()


def test_rgb_volumes_and_one_slice_boxes():
    volume = np.repeat(drifting_volume()[..., None], 3, axis=-1)
    segs = segment_volume(BrightSam(), volume, np.array([[20., 36, 3, 90, 84, 3]]))
    assert segs[3].any() and not segs[:3].any() and not segs[4:].any()


def test_lite_medsam_loosens_the_propagated_box():
    from medficient_mini.volume import next_prompt
    mask = np.zeros((100, 200), bool)
    mask[10:50, 0:100] = True
    default = torch.zeros(4)
    model = BrightSam()
    assert next_prompt(model, mask, default).tolist() == pytest.approx([0, 25.6, 253.44, 125.44])
    lite = BrightSam("lite_medsam")
    lite.image_size = 256
    assert next_prompt(lite, mask, default).tolist() == pytest.approx([0, 9.8, 129.72, 65.72], abs=1e-2)
    assert next_prompt(model, mask & False, default) is default
