"""Images through the pipeline with a stand-in network, and `Predictor` beside `segment_anything.SamPredictor`."""
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from fakes import PARITY, BrightSam, squares

from medficient_mini.inference import predictor as module
from medficient_mini.inference.checkpoint import NoRandomStart, load_strictly
from medficient_mini.inference.geometry import SAM_MEAN, SAM_STD, sam_input
from medficient_mini.inference.predictor import Predictor, decode, segment_image
from medficient_mini.nets.sam import build_sam

IMAGE = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
BOXES = np.array([[5., 5, 60, 50], [30, 20, 110, 80], [70, 5, 100, 85]])


def test_each_box_gives_its_label_and_later_is_the_published_rule():
    image = squares((256, 256), [(40, 120, 40, 120), (160, 220, 160, 240)])
    boxes = np.array([[35., 35, 125, 125], [150, 150, 250, 230], [80, 30, 130, 130]])
    segs = segment_image(BrightSam(), image, boxes, "later")
    assert segs.dtype == np.uint8 and set(np.unique(segs)) == {0, 1, 2, 3}
    assert segs[100, 50] == 1 and segs[190, 200] == 2 and segs[100, 100] == 3
    assert abs((segs == 2).sum() - 60 * 80) < 400
    many = segment_image(BrightSam(), image, np.tile(boxes[:1], (300, 1)), "later")
    assert many.dtype == np.uint16 and many.max() == 300


def test_shapes_of_one_prompt_and_of_several_boxes():
    predictor = Predictor(BrightSam())
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(box=[0, 0, 5, 5])
    predictor.set_image(IMAGE)
    masks, iou, logits = predictor.predict(box=BOXES[0])
    assert masks.shape == (3, 90, 120) and masks.dtype == bool and iou.shape == (3,) and logits.shape == (3, 256, 256)
    masks, iou, logits = predictor.predict(box=BOXES, multimask_output=False)
    assert masks.shape == (3, 1, 90, 120) and iou.shape == (3, 1) and logits.shape == (3, 1, 256, 256)
    for box, mask in zip(BOXES, masks):
        assert (predictor.predict(None, None, box, None, False)[0] == mask).all()
    assert predictor.original_size == (90, 120) and predictor.input_size == (384, 512) and predictor.is_image_set
    predictor.reset_image()
    with pytest.raises(RuntimeError):
        predictor.get_image_embedding()


def test_prompts_are_checked_as_those_of_files():                            # faults 34 and 35
    predictor = Predictor(BrightSam())
    predictor.set_image(IMAGE)
    assert predictor.predict(box=np.zeros((0, 4)))[0].shape == (0, 3, 90, 120)
    assert not segment_image(BrightSam(), IMAGE, np.zeros((0, 4))).any()
    for wrong in (np.ones((2, 6)), [5, 5, np.nan, 9], [60, 5, 5, 50], [500, 5, 600, 50]):
        for call in (lambda: predictor.predict(box=wrong), lambda: segment_image(BrightSam(), IMAGE, np.array(wrong))):
            with pytest.raises(ValueError, match="boxes: expected"):
                call()
    for labels in ([2], [1, 0], [np.nan]):
        with pytest.raises(ValueError, match="point labels: expected"):
            predictor.predict([[9, 9]], np.array(labels))
    with pytest.raises(ValueError, match="as many"):
        predictor.predict([[9, 9]], [1], box=BOXES)
    for mask in (np.zeros((256, 256)), np.zeros((1, 128, 128)), np.zeros((3, 256, 256))):
        with pytest.raises(ValueError, match="prompts: expected"):
            predictor.predict(mask_input=mask)
    with pytest.raises(ValueError, match="prompts: expected"):
        predictor.predict_torch(None, None, torch.tensor([1., 2, 30, 40]))
    assert predictor.predict_torch(None, None, torch.tensor([[1., 2, 30, 40]]).double())[2].dtype == torch.float32
    with pytest.raises(ValueError, match="prompts"):
        predictor.predict()
    with pytest.raises(ValueError, match="uint8"):
        predictor.set_image(IMAGE.astype(float))


def test_boolean_labels_mean_1_and_0():                                      # fault 35
    class Listener(BrightSam):
        def decode(self, embedding, boxes=None, points=None, masks=None, multimask=False):
            self.labels = points[1]
            return torch.zeros(1, 3, 256, 256), torch.zeros(1, 3)
    predictor = Predictor(Listener())
    predictor.set_image(IMAGE)
    for labels in (np.array([True, False]), [1, 0]):
        predictor.predict(point_coords=np.array([[9, 9], [20, 20]]), point_labels=labels)
        assert predictor.model.labels.dtype != torch.bool and predictor.model.labels.tolist() == [[1, 0]]
    predictor.predict_torch(torch.ones(1, 2, 2, dtype=torch.float64), torch.tensor([[True, False]]))
    assert predictor.model.labels.dtype != torch.bool


def test_many_prompts_are_decoded_in_batches(monkeypatch):                   # fault 18
    seen, model = [], BrightSam()
    whole = model.decode

    def counted(embedding, boxes=None, **options):
        seen.append(len(boxes))
        return whole(embedding, boxes, **options)
    model.decode = counted
    decode(model, torch.zeros(1, 256, 64, 64), boxes=torch.ones(2 * module.BATCH + 1, 4))
    assert seen == [module.BATCH, module.BATCH, 1]


def test_predictors_in_threads_and_a_shared_model():
    pictures = [squares((64, 64), [(8 * k, 8 * k + 20, 10, 50)]) for k in range(4)]
    box = [5, 5, 58, 58]

    def run(job):
        predictor = Predictor(job[0])
        predictor.set_image(job[1])
        return [predictor.predict(box=box)[0] for _ in range(5)]
    shared = BrightSam()
    jobs = [(shared, picture) for picture in pictures] + [(BrightSam(), picture) for picture in pictures]
    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(list(pool.map(run, jobs)), alone)


# --------------------------------------------------------------------------------------- beside segment_anything

@cache
def sam_pair():
    """(our Predictor, SamPredictor) with the same weights and image: ViT-B with the first of its 12 blocks."""
    package = pytest.importorskip("segment_anything", reason="optional package segment-anything is not installed")
    if not PARITY.is_dir():
        pytest.skip(f"recorded weights absent: {PARITY}")
    with torch.device("meta"), NoRandomStart():
        model = build_sam("medsam_vit_b").eval()
    model.image_encoder.blocks = model.image_encoder.blocks[:1]              # tests/nets has the others
    sys.path.insert(0, str(PARITY))
    import weights
    state = weights.fill({key: value.shape for key, value in model.state_dict().items()}, 7)
    load_strictly(model, {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}, PARITY)
    from segment_anything.build_sam import _build_sam
    theirs = _build_sam(768, 1, 12, [])
    theirs.load_state_dict(model.state_dict(), strict=False)
    image = np.zeros((600, 1024, 3), np.uint8)            # as long as the input: torchvision's resizing plays no part
    image[100:400, 200:700] = np.random.default_rng(1).integers(50, 255, (300, 500, 3))
    pair = Predictor(model, sam_preprocessing=True), package.SamPredictor(theirs.eval())
    for one in pair:
        one.set_image(image)
    return pair


def test_signatures_are_sams():
    theirs = pytest.importorskip("segment_anything", reason="optional package segment-anything").SamPredictor
    for name in ("set_image", "predict", "predict_torch", "get_image_embedding", "reset_image"):
        found, expected = (inspect.signature(getattr(kind, name)).parameters.values() for kind in (Predictor, theirs))
        assert [(p.name, p.default, p.kind) for p in found] == [(p.name, p.default, p.kind) for p in expected], name
    assert list(inspect.signature(Predictor).parameters)[0] == list(inspect.signature(theirs).parameters)[0]


def test_sams_preprocessing_is_sams():
    package = pytest.importorskip("segment_anything", reason="optional package segment-anything is not installed")
    image = np.random.default_rng(3).integers(0, 255, (40, 30, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
    theirs = package.utils.transforms.ResizeLongestSide(256).apply_image(image)
    found = sam_input(image, 256)[:, :theirs.shape[0], :theirs.shape[1]].permute(1, 2, 0).numpy() * SAM_STD + SAM_MEAN
    assert np.abs(found - theirs).max() < 1.01                               # Pillow rounds to whole numbers otherwise
    assert torch.equal(sam_input(image[..., ::-1], 256), sam_input(image[..., ::-1].copy(), 256))    # a view, as of BGR


@pytest.mark.parametrize("prompt", ["points", "box", "both", "mask", "torch"])
def test_masks_are_sams(prompt):
    ours, theirs = sam_pair()
    points, labels, box = np.array([[300., 200], [650, 380]]), np.array([1, 0]), np.array([180., 90, 720, 420])
    mask = np.random.default_rng(2).normal(size=(1, 256, 256)).astype(np.float32)
    if prompt == "torch":
        boxes = torch.tensor([[180., 90, 720, 420], [10, 10, 500, 300]])
        found, expected = ([x.numpy() for x in one.predict_torch(
            None, None, one.transform.apply_boxes_torch(boxes, one.original_size), None, False)] for one in (ours, theirs))
    else:
        arguments = {"points": (points, labels), "box": (None, None, box), "both": (points, labels, box, None, False),
                     "mask": (points, labels, None, mask, True, True)}[prompt]
        with torch.inference_mode():
            found, expected = ours.predict(*arguments), theirs.predict(*arguments)
    assert [x.shape for x in found] == [x.shape for x in expected] and [x.dtype for x in found] == [x.dtype for x in expected]
    assert np.abs(found[2] - expected[2]).max() < 1e-3 and np.abs(found[1] - expected[1]).max() < 1e-3
    if prompt == "mask":                                                     # return_logits
        assert np.abs(found[0] - expected[0]).max() < 1e-3
    else:
        assert (found[0] != expected[0]).mean() < 1e-4                       # logits within rounding of 0


def label_everything(predictor, image, boxes):
    """A labelling loop as written for segment_anything; only the import and the model's line differ here."""
    annotations = []
    predictor.set_image(image)
    for box in boxes:
        masks, scores, logits = predictor.predict(box=box, multimask_output=True)
        best = int(np.argmax(scores))
        refined, scores, _ = predictor.predict(None, None, box[None, :], logits[best:best + 1], False)
        mask = refined[0] if refined.ndim == 3 else refined[0, 0]
        rows, columns = np.nonzero(mask)
        if not len(rows):
            continue
        annotations.append({
            "segmentation": mask,
            "area": int(mask.sum()),
            "bbox": [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1],
            "predicted_iou": float(np.ravel(scores)[0]),
        })
    boxes_torch = predictor.transform.apply_boxes_torch(torch.as_tensor(boxes), image.shape[:2])
    batch, _, _ = predictor.predict_torch(point_coords=None, point_labels=None, boxes=boxes_torch, multimask_output=False)
    assert batch.shape == (len(boxes), 1, *image.shape[:2])
    predictor.reset_image()
    return sorted(annotations, key=lambda a: -a["area"])


def test_a_loop_written_for_segment_anything_runs_on_the_default_weights():
    from medficient_mini import Predictor, load_model
    image = np.full((256, 256, 3), 40, np.uint8)
    image[60:140, 50:170] = 220
    found = label_everything(Predictor(load_model()), image, np.array([[45., 55, 175, 145]]))
    assert len(found) == 1 and abs(found[0]["area"] / (80 * 120) - 1) < 0.1


@pytest.mark.parametrize("wrong, words", [
    (dict(box=[[1, 2, 3, 4], [1, 2]]), "boxes: expected rows of numbers"),
    (dict(point_coords=[[1, 2], [3]], point_labels=[1, 1]), "points: expected rows of numbers"),
    (dict(point_coords=np.zeros((0, 2)), point_labels=np.zeros(0)), "points: expected")])
def test_prompts_of_no_shape(wrong, words):                                  # fault 34
    predictor = Predictor(BrightSam())
    predictor.set_image(IMAGE)
    with pytest.raises(ValueError, match=words):
        predictor.predict(**wrong)


@pytest.mark.parametrize("labels", [[[0.5]], [[1.9]], [[]]])
def test_labels_of_points_are_whole(labels):                                 # fault 34
    predictor = Predictor(BrightSam())
    predictor.set_image(IMAGE)
    labels = torch.tensor(labels)
    with pytest.raises(ValueError, match="point labels: expected"):
        predictor.predict_torch(torch.full((1, labels.shape[1], 2), 9.0), labels, torch.tensor([[5.0, 5, 60, 50]]))


def test_a_box_at_the_last_pixel_of_a_shrunk_image():                        # float32 rounds it to beyond the border
    predictor = Predictor(BrightSam())
    predictor.set_image(np.zeros((60, 1000), np.uint8))
    assert predictor.predict(box=[999, 59, 999, 59])[0].shape == (3, 60, 1000)
