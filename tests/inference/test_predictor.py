"""Images and volumes through the pipeline, with a stand-in network whose masks are known, and with a real one."""
import numpy as np
import pytest
import torch
from fakes import BrightSam, fast_or_skip, squares

from medficient_mini.nets.sam import build_sam
from medficient_mini.inference.predictor import Predictor, segment_image


@pytest.fixture(scope="module", params=["plain", "fast"])
def l0(request):
    torch.manual_seed(0)
    model = build_sam("medficientsam_l0").eval()
    return fast_or_skip(model) if request.param == "fast" else model


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
