"""From a loaded network and prompts to masks: `Predictor`, with SAM's interface, and one call for an image.

Everything here needs of a network only `image_encoder(x)`, `decode(…)`, `image_size` and `resize`, so its fast form
(cpu/fast.py) serves as well.
"""
import warnings

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from .boxes import check_boxes, check_points
from .compose import OVERLAPS, Composition, compose
from .geometry import boxes_to_network, logits_to_mask, postprocess_masks, sam_input, scaled_size, to_network

BATCH = 4                            # prompts decoded at once: larger batches take more memory and no less time


def checked_pixels(pixels, axes: int) -> ndarray:
    """Return an image (two axes) or a volume (three) as an array. ValueError unless it is uint8, grey or RGB."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim < axes or pixels.shape[axes:] not in ((), (3,)) or not pixels.size:
        raise ValueError(f"{'image' if axes == 2 else 'volume'}: expected uint8 of {axes} axes, or one more for 3 "
                         f"colours, found {pixels.dtype} {pixels.shape}")
    return pixels


def checked_boxes(boxes, shape: tuple[int, ...]) -> ndarray:
    """Check boxes by the rules for files; what `check_boxes` remarks there becomes a Python warning here."""
    boxes, remarks = check_boxes(boxes, shape, "image" if len(shape) == 2 else "volume")
    for remark in remarks:
        warnings.warn(remark, stacklevel=3)
    return boxes


@torch.inference_mode()
def encode(model, image: ndarray, as_sam: bool = False) -> Tensor:
    """Compute the embedding (1, 256, 64, 64) float32 of an image, uint8 (H, W) or (H, W, 3); see `sam_input`."""
    size = model.image_size
    x = sam_input(image, size) if as_sam else to_network(image, size, model.resize)
    return model.image_encoder(x[None].to(next(model.parameters()).device))


@torch.inference_mode()
def decode(model, embedding: Tensor, boxes: Tensor | None = None, coords: Tensor | None = None,
           labels: Tensor | None = None, masks: Tensor | None = None, multimask: bool = False) -> tuple[Tensor, Tensor]:
    """Decode N prompts, BATCH at a time: logits (N, 1 or 3, 256, 256) and IoU (N, 1 or 3), float32 on the CPU."""
    prompts = (boxes, coords, labels, masks)
    count, channels = next(len(prompt) for prompt in prompts if prompt is not None), 3 if multimask else 1
    logits, iou = torch.zeros(count, channels, 256, 256), torch.zeros(count, channels)
    for n in range(0, count, BATCH):
        part = slice(n, n + BATCH)
        box, *points, mask = (p if p is None else p[part].to(embedding.device) for p in prompts)
        points = None if coords is None else tuple(points)
        logits[part], iou[part] = model.decode(embedding, boxes=box, points=points, masks=mask, multimask=multimask)
    return logits, iou


def decode_boxes(model, embedding: Tensor, boxes: Tensor) -> Tensor:
    """Decode boxes (N, 4) in pixels of the network's input: logits (N, 256, 256) float32 on the CPU."""
    return decode(model, embedding, boxes)[0][:, 0]


def logits_of_boxes(model, image: ndarray, boxes: ndarray) -> Tensor:
    """Return the logits (N, 256, 256) of boxes (N, 4) in pixels of an image, uint8 (H, W) or (H, W, 3)."""
    prompts = boxes_to_network(boxes, *image.shape[:2], model.image_size)
    return decode_boxes(model, encode(model, image), prompts)


def segment_image(model, image: ndarray, boxes: ndarray, overlap: str = OVERLAPS[0], *,
                  details: bool = False, separate: bool = False) -> ndarray | Composition:
    """Segment the objects in boxes of an image: labels (H, W), where box k gives label k, counted from 1.

    The image is uint8 (H, W) or (H, W, 3) RGB; boxes are (N, 4) x0 y0 x1 y1 in its pixels, both corners included. The
    rest, and the errors, are as in `segment_volume`.
    """
    image = checked_pixels(image, 2)
    shape = image.shape[:2]
    boxes = checked_boxes(boxes, shape)
    found = Composition(shape, len(boxes), overlap, separate)
    if len(boxes):
        logits = logits_of_boxes(model, image, boxes)
        compose(found, np.arange(len(boxes)), logits, boxes, model.image_size)
    return found if details else found.labels


class LongestSide:
    """Scale points (..., 2) and boxes (..., 4) from an image (H, W) to the network: SAM's `ResizeLongestSide`."""

    def __init__(self, target_length: int):
        self.target_length = target_length

    def apply_coords(self, coords: ndarray, original_size: tuple[int, int]) -> ndarray:
        return boxes_to_network(coords, *original_size, self.target_length).numpy()

    def apply_coords_torch(self, coords: Tensor, original_size: tuple[int, int]) -> Tensor:
        return boxes_to_network(coords.cpu(), *original_size, self.target_length).to(coords.device)

    apply_boxes, apply_boxes_torch = apply_coords, apply_coords_torch


class Predictor:
    """One image, many prompts: the interface of `segment_anything.SamPredictor`, argument for argument.

        predictor = Predictor(load_model())
        predictor.set_image(rgb)                                              # uint8 (H, W, 3)
        masks, iou, logits = predictor.predict(box=np.array([x0, y0, x1, y1]), multimask_output=False)

    Not in SAM: `sam_preprocessing=True` prepares images for SAM's own weights of ViT-B, see `sam_input`.
    """

    def __init__(self, sam_model, *, sam_preprocessing: bool = False):
        self.model, self.sam_preprocessing = sam_model, sam_preprocessing
        self.transform = LongestSide(sam_model.image_size)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.model.parameters()).device

    def reset_image(self) -> None:
        """Forget the image."""
        self.is_image_set = False
        self.features = self.original_size = self.input_size = None

    def set_image(self, image: ndarray, image_format: str = "RGB") -> None:
        """Compute the embedding of an image, uint8 (H, W, 3) in the order "RGB" or "BGR", or grey. ValueError."""
        image = checked_pixels(image, 2)
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format: expected RGB or BGR, found {image_format!r}")
        if image_format == "BGR" and image.ndim == 3:
            image = image[..., ::-1]
        self.reset_image()
        self.features = encode(self.model, image, self.sam_preprocessing)
        self.original_size, self.frame = image.shape[:2], (*image.shape[:2], self.model.image_size)
        self.input_size = scaled_size(*self.frame)
        self.is_image_set = True

    def get_image_embedding(self) -> Tensor:
        """Return the embedding of the image, (1, 256, 64, 64). RuntimeError where none is set."""
        if not self.is_image_set:
            raise RuntimeError("An image must be set with .set_image(...) before a mask or its embedding is asked for.")
        return self.features

    def predict(self, point_coords: ndarray | None = None, point_labels: ndarray | None = None,
                box: ndarray | None = None, mask_input: ndarray | None = None, multimask_output: bool = True,
                return_logits: bool = False) -> tuple[ndarray, ndarray, ndarray]:
        """Predict the masks of one prompt, given in pixels of the image, as SAM does.

        Points are (P, 2) x y with labels (P,), 1 or True on the object, 0 beside it; the box (4,) x0 y0 x1 y1; the mask
        (1, 256, 256), logits of an earlier prediction. Returns masks (C, H, W) bool, float32 with `return_logits`;
        predicted IoU (C,); logits (C, 256, 256); C is 3 with `multimask_output`, else 1. Not in SAM: boxes (N, 4)
        without points and mask are N prompts, even a single one, and all results have N in front. RuntimeError where no
        image is set, ValueError for prompts that `check_boxes` or `check_points` refuses, and for none.
        """
        self.get_image_embedding()
        one = True
        if box is not None:
            checked = checked_boxes(box, self.original_size)
            one, box = np.shape(box) == (4,), boxes_to_network(checked, *self.frame)
        if point_coords is not None or point_labels is not None:
            points, labels = check_points(point_coords, point_labels, self.original_size)
            point_coords, point_labels = boxes_to_network(points, *self.frame)[None], torch.from_numpy(labels)[None]
        if mask_input is not None:
            mask_input = torch.as_tensor(mask_input, dtype=torch.float32)[None]
        results = self.predict_torch(point_coords, point_labels, box, mask_input, multimask_output, return_logits)
        return tuple((result[0] if one else result).cpu().numpy() for result in results)

    def predict_torch(self, point_coords: Tensor | None, point_labels: Tensor | None, boxes: Tensor | None = None,
                      mask_input: Tensor | None = None, multimask_output: bool = True,
                      return_logits: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the masks of B prompts, in pixels of the network's input (`transform` brings them there).

        Points are (B, P, 2) with labels (B, P), -1 where there are fewer; boxes (B, 4); mask_input (B, 1, 256, 256).
        Returns masks (B, C, H, W), predicted IoU (B, C), logits (B, C, 256, 256); all else is as in `predict`.
        """
        embedding = self.get_image_embedding()
        prompts = [prompt for prompt in (point_coords, point_labels, boxes, mask_input) if prompt is not None]
        if (len(set(map(len, prompts))) != 1 or (point_coords is None) != (point_labels is None)
                or boxes is not None and boxes.shape[1:] != (4,)
                or mask_input is not None and mask_input.shape[1:] != (1, 256, 256)):
            raise ValueError("prompts: expected as many boxes (B, 4) as masks (B, 1, 256, 256) and as sets of points "
                             f"with labels, found shapes {[tuple(prompt.shape) for prompt in prompts]}")
        if not all(prompt.isfinite().all() for prompt in prompts):
            raise ValueError("prompts: expected finite numbers")
        if boxes is not None:                # checked as pixels of the image, without the rounding of float32
            zoom = np.divide(self.original_size, self.input_size)[[1, 0, 1, 0]]
            check_boxes((boxes.cpu().numpy() * zoom).round(2), self.original_size, "boxes")
            boxes = boxes.float()
        if point_coords is not None:
            if 0 in point_labels.shape[1:] or not np.isin(point_labels.cpu(), (-1, 0, 1)).all():
                raise ValueError("point labels: expected 0, 1 or -1, one for each prompt at least")
            # Of booleans, the padding -1 would become 1.
            point_coords, point_labels = point_coords.float(), point_labels.int()
        logits, iou = decode(self.model, embedding, boxes, point_coords, point_labels, mask_input, multimask_output)
        if return_logits:
            masks = postprocess_masks(logits, *self.frame)
        else:
            masks = torch.from_numpy(logits_to_mask(logits.flatten(0, 1), *self.frame)).unflatten(0, logits.shape[:2])
        return tuple(result.to(self.device) for result in (masks, iou, logits))
