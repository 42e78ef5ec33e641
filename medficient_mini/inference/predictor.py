"""From a loaded network and prompts to masks: `Predictor`, with SAM's interface, and one call for an image.

Volumes are in volume.py. Everything here needs of a network only `image_encoder(x)`, `decode(…)`, `image_size` and
`resize`, so its fast form (cpu/fast.py) serves as well as the plain one.
"""
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import check_boxes, check_points
from .compose import OVERLAPS, Composition, compose
from .geometry import boxes_to_network, logits_to_mask, postprocess_masks, scaled_size, to_network

BATCH = 16                           # prompts decoded at once: about 0.3 GB of activations
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)       # of the colours, SAM's preprocessing


def device_of(model) -> torch.device:
    """Return the device that a network's weights are on."""
    return next(model.parameters()).device


def check_pixels(pixels: np.ndarray, axes: int) -> np.ndarray:
    """Return an image (two axes) or a volume (three) as an array. ValueError unless it is uint8, grey or RGB."""
    pixels = np.asarray(pixels)
    channels = pixels.shape[axes:]
    if pixels.dtype != np.uint8 or pixels.ndim < axes or channels not in ((), (3,)) or not pixels.size:
        name, shape = ("image", "(H, W)") if axes == 2 else ("volume", "(D, H, W)")
        raise ValueError(f"{name}: expected uint8 {shape} or {shape[:-1]}, 3), found {pixels.dtype} {pixels.shape}")
    return pixels


def check_prompt_boxes(boxes, shape: tuple[int, ...]) -> np.ndarray:
    """Check boxes by the rules for files (`check_boxes`); what a file's user would read becomes a Python warning."""
    boxes, lines = check_boxes(boxes, shape, "image" if len(shape) == 2 else "volume")
    for line in lines:
        warnings.warn(line, stacklevel=3)
    return boxes


def check_overlap(overlap: str) -> None:
    """Raise ValueError, one line, for an unknown rule."""
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap: expected one of {', '.join(OVERLAPS)}, found {overlap!r}")


@torch.inference_mode()
def encode(model, image: np.ndarray) -> Tensor:
    """Compute the embedding (1, 256, 64, 64) float32 of an image, uint8 (H, W) or (H, W, 3)."""
    x = to_network(image, model.image_size, model.resize)[None].to(device_of(model))
    return model.image_encoder(x).float()


@torch.inference_mode()
def decode(model, embedding: Tensor, boxes: Tensor | None = None, points: tuple[Tensor, Tensor] | None = None,
           masks: Tensor | None = None, multimask: bool = False) -> tuple[Tensor, Tensor]:
    """Decode N prompts on one embedding, some at a time: all masks of this package come from here.

    Args:
        embedding: (1, 256, 64, 64).
        boxes: (N, 4) x0 y0 x1 y1 in pixels of the network's input.
        points: ((N, P, 2), (N, P)), x y in the same pixels and 1 on the object, 0 beside it, -1 for padding.
        masks: (N, 1, 256, 256), logits.
        multimask: whether to give three masks for each prompt instead of one.

    Returns:
        Logits (N, C, 256, 256) and predicted IoU (N, C), C = 1 or 3, both float32 on the CPU.
    """
    prompts = [prompt.to(embedding.device).split(BATCH) if prompt is not None else None
               for prompt in (boxes, *(points or (None, None)), masks)]
    count = max(len(parts) for parts in prompts if parts is not None)
    logits, ious = [torch.zeros(0, 3 if multimask else 1, 256, 256)], [torch.zeros(0, 3 if multimask else 1)]
    for n in range(count):
        box, coords, labels, mask = (parts and parts[n] for parts in prompts)
        if not len(next(prompt for prompt in (box, coords, mask) if prompt is not None)):
            break                                                # no prompt at all
        found, iou = model.decode(embedding, box, coords if coords is None else (coords, labels), mask,
                                  multimask=multimask)
        logits.append(found.float().cpu())
        ious.append(iou.float().cpu())
    return torch.cat(logits), torch.cat(ious)


def decode_boxes(model, embedding: Tensor, boxes: Tensor) -> Tensor:
    """Decode boxes (N, 4) in pixels of the network's input: logits (N, 256, 256) float32 on the CPU."""
    return decode(model, embedding, boxes)[0][:, 0]


def segment_image(model, image: np.ndarray, boxes: np.ndarray, overlap: str = OVERLAPS[0], *,
                  details: bool = False, separate: bool = False) -> np.ndarray | Composition:
    """Segment the objects in boxes of an image: labels (H, W), where box k gives label k, counted from 1.

    Args:
        model: what `load_model` returns.
        image: uint8 (H, W) or (H, W, 3) RGB.
        boxes: (N, 4) x0 y0 x1 y1 in its pixels, both corners included.
        overlap: one of OVERLAPS, who gets a pixel that several objects claim: see `compose`.
        details: return the whole Composition: labels, sizes and what was lost.
        separate: let the Composition keep each object's own mask as well.

    Raises:
        ValueError: one line, for another image, boxes that `check_boxes` refuses or another `overlap`.
    """
    image = check_pixels(image, 2)
    boxes = check_prompt_boxes(boxes, image.shape[:2])
    check_overlap(overlap)
    found = Composition(image.shape[:2], len(boxes), separate)
    if len(boxes):
        prompts = boxes_to_network(boxes, *image.shape[:2], model.image_size)
        logits = decode_boxes(model, encode(model, image), prompts)
        compose(found, np.arange(len(boxes)), logits, boxes, model.image_size, overlap)
    return found if details else found.labels


class LongestSide:
    """Scale prompts from pixels of an image to those of the network's input: SAM's `ResizeLongestSide`, by its names.

    Coordinates are (..., 2), boxes (..., 4); `original_size` is the image's (H, W). What comes back is float32.
    """

    def __init__(self, target_length: int):
        self.target_length = target_length

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Scale coordinates given as an array."""
        return boxes_to_network(coords, *original_size, self.target_length).numpy()

    def apply_coords_torch(self, coords: Tensor, original_size: tuple[int, int]) -> Tensor:
        """Scale coordinates given as a tensor, which stays on its device."""
        return boxes_to_network(coords.cpu(), *original_size, self.target_length).to(coords.device)

    apply_boxes, apply_boxes_torch = apply_coords, apply_coords_torch


def sam_input(image: np.ndarray, size: int) -> Tensor:
    """Turn an image, uint8 (H, W, 3) RGB, into a network's input as SAM does: float32 (1, 3, size, size).

    It differs from `to_network` in two ways: the resizing is antialiased, and the colours are normalised by fixed
    numbers, the mean and deviation of natural images, not by the smallest and largest value of this one.
    """
    height, width = scaled_size(*image.shape[:2], size)
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]               # (1, 3, H, W)
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True).float()
    x = (x - torch.tensor(SAM_MEAN)[:, None, None]) / torch.tensor(SAM_STD)[:, None, None]
    return F.pad(x, (0, size - width, 0, size - height))


class Predictor:
    """One image, many prompts: the interface of `segment_anything.SamPredictor`, argument for argument.

        predictor = Predictor(load_model())
        predictor.set_image(rgb)                                          # uint8 (H, W, 3)
        masks, iou, logits = predictor.predict(box=np.array([x0, y0, x1, y1]), multimask_output=False)

    Images are prepared as MedSAM and its successors do. `preprocessing="sam"` prepares them as SAM does, for SAM's
    own weights of ViT-B (the same network as MedSAM's): see `sam_input`. One network may serve several predictors.
    Prompts that SAM would take without a word raise ValueError here: see `predict`.
    """

    def __init__(self, model, *, preprocessing: str = "medsam"):
        if preprocessing not in ("medsam", "sam"):
            raise ValueError(f"preprocessing: expected medsam or sam, found {preprocessing!r}")
        self.model, self.preprocessing = model, preprocessing
        self.transform = LongestSide(model.image_size)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        """The device of the network, where tensors of `predict_torch` are expected."""
        return device_of(self.model)

    def reset_image(self) -> None:
        """Forget the image."""
        self.is_image_set = False
        self.features = self.original_size = self.input_size = None

    @torch.inference_mode()
    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Compute the embedding of an image, uint8 (H, W, 3) in the order "RGB" or "BGR", or grey (H, W).

        ValueError for anything else.
        """
        image = check_pixels(image, 2)
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format: expected RGB or BGR, found {image_format!r}")
        if image_format == "BGR":
            image = image[..., ::-1] if image.ndim == 3 else image
        self.reset_image()
        if self.preprocessing == "sam":
            rgb = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
            self.features = self.model.image_encoder(sam_input(rgb, self.model.image_size).to(self.device)).float()
        else:
            self.features = encode(self.model, image)
        self.original_size = image.shape[:2]
        self.input_size = scaled_size(*self.original_size, self.model.image_size)
        self.is_image_set = True

    def get_image_embedding(self) -> Tensor:
        """Return the embedding of the image, (1, 256, 64, 64). RuntimeError where none is set."""
        if not self.is_image_set:
            raise RuntimeError("An image must be set with .set_image(...) before its embedding or a mask is asked for.")
        return self.features

    def predict(self, point_coords: np.ndarray | None = None, point_labels: np.ndarray | None = None,
                box: np.ndarray | None = None, mask_input: np.ndarray | None = None, multimask_output: bool = True,
                return_logits: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict the masks of one prompt, given in pixels of the image.

        Args:
            point_coords: (P, 2) x y.
            point_labels: (P,), 1 on the object, 0 beside it; booleans mean the same.
            box: (4,) x0 y0 x1 y1. Not in SAM: boxes (N, 4), alone, are N prompts, also for N = 0 and 1.
            mask_input: (1, 256, 256), the logits of an earlier prediction.
            multimask_output: whether to give three masks for the prompt (C = 3) instead of one (C = 1).
            return_logits: whether to give logits, float32, in place of masks.

        Returns:
            masks (C, H, W) bool; predicted IoU (C,) float32; logits (C, 256, 256) float32. With boxes (N, 4) each has
            a first axis of N more.

        Raises:
            RuntimeError: no image is set.
            ValueError: no prompt at all, or one that `check_boxes` or `check_points` refuses.
        """
        self.get_image_embedding()
        boxes = points = labels = masks = None
        many = box is not None and (np.ndim(box) != 1 or not np.size(box))
        if many and (point_coords is not None or mask_input is not None):
            raise ValueError("box: expected shape (4,) together with points or a mask, or use predict_torch, "
                             f"found {np.shape(box)}")
        if box is not None:
            checked = check_prompt_boxes(box, self.original_size)
            boxes = torch.from_numpy(self.transform.apply_boxes(checked, self.original_size))
        if point_coords is not None or point_labels is not None:
            checked, labels = check_points(point_coords, point_labels, self.original_size)
            points = torch.from_numpy(self.transform.apply_coords(checked, self.original_size))[None]
            labels = torch.from_numpy(labels)[None]
        if mask_input is not None:
            masks = torch.as_tensor(mask_input, dtype=torch.float32)[None]
        results = self.predict_torch(points, labels, boxes, masks, multimask_output, return_logits)
        return tuple((result if many else result[0]).cpu().numpy() for result in results)

    @torch.inference_mode()
    def predict_torch(self, point_coords: Tensor | None, point_labels: Tensor | None, boxes: Tensor | None = None,
                      mask_input: Tensor | None = None, multimask_output: bool = True,
                      return_logits: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the masks of B prompts, given in pixels of the network's input (`transform` brings them there).

        Args:
            point_coords: (B, P, 2) x y.
            point_labels: (B, P), 1 on the object, 0 beside it, -1 where there are fewer points than P.
            boxes: (B, 4) x0 y0 x1 y1.
            mask_input: (B, 1, 256, 256), logits.

        Returns:
            Masks (B, C, H, W) bool, predicted IoU (B, C) and logits (B, C, 256, 256), the options as in `predict`.

        Raises:
            RuntimeError, ValueError: as `predict`.
        """
        embedding, points = self.get_image_embedding(), None
        self._check(point_coords, point_labels, boxes, mask_input)
        if point_coords is not None:
            points = point_coords.float(), point_labels.int()            # booleans would turn the padding, -1, to True
        logits, iou = decode(self.model, embedding, boxes, points, mask_input, multimask_output)
        frame = (*self.original_size, self.model.image_size)
        if return_logits:
            masks = postprocess_masks(logits, *frame)
        else:
            masks = torch.from_numpy(logits_to_mask(logits.flatten(0, 1), *frame)).unflatten(0, logits.shape[:2])
        return masks.to(self.device), iou.to(self.device), logits.to(self.device)

    def _check(self, coords, labels, boxes, masks) -> None:
        """Raise ValueError for prompts of `predict_torch` that do not fit the image or one another."""
        counts = [len(prompt) for prompt in (coords, labels, boxes, masks) if prompt is not None]
        if len(set(counts)) != 1 or (coords is None) != (labels is None):
            raise ValueError("prompts: expected as many boxes as masks and sets of points with labels, found "
                             + (", ".join(map(str, counts)) or "none"))
        if boxes is not None:                                            # as pixels of the image
            scale = np.array([self.original_size, self.input_size])[:, [1, 0, 1, 0]]
            check_boxes(boxes.cpu().numpy() * (scale[0] / scale[1]), self.original_size, "boxes")
        if coords is not None and (coords.shape != (*labels.shape, 2) or not coords.isfinite().all()
                                   or not torch.isin(labels.int(), torch.tensor([-1, 0, 1], device=labels.device)).all()):
            raise ValueError("points: expected finite (B, P, 2) with labels (B, P) of 1, 0 or -1, found "
                             f"{tuple(coords.shape)} with {tuple(labels.shape)}")
        if masks is not None and masks.shape[1:] != (1, 256, 256):
            raise ValueError(f"mask_input: expected logits (B, 1, 256, 256), found {tuple(masks.shape)}")
