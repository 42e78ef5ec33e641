"""From a loaded network and prompts to masks: `Predictor` with SAM's habits, and one call for an image.

Volumes are in volume.py. Everything here needs of a network only `image_encoder(x)`, `decode(…)`, `image_size` and
`resize`, so its fast form (fast.py) serves as well as the plain one.
"""
import numpy as np
import torch
from torch import Tensor

from .geometry import boxes_to_network, logits_to_mask, to_network

BATCH = 16                           # prompts decoded at once: about 0.3 GB of activations


def label_dtype(count: int) -> type:
    """uint8 for up to 255 labels, else uint16."""
    return np.uint8 if count <= 255 else np.uint16


def device_of(model) -> torch.device:
    return next(model.parameters()).device


@torch.inference_mode()
def encode(model, image: np.ndarray) -> Tensor:
    """uint8 (H, W) or (H, W, 3) -> embedding (1, 256, 64, 64) float32."""
    x = to_network(image, model.image_size, model.resize)[None].to(device_of(model))
    return model.image_encoder(x).float()


@torch.inference_mode()
def decode_boxes(model, embedding: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (N, 4) in network pixels on one embedding -> logits (N, 256, 256) float32 on the CPU."""
    boxes = boxes.to(embedding.device)
    parts = [model.decode(embedding, part)[0][:, 0].float().cpu() for part in boxes.split(BATCH)]
    return torch.cat(parts) if parts else torch.zeros(0, 256, 256)


def segment_image(model, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """uint8 (H, W[, 3]) and boxes (N, 4) in its pixels -> labels (H, W) uint8, uint16 above 255 boxes.

    Box k gives label k (from 1); where masks overlap, the later box wins.
    """
    height, width = image.shape[:2]
    segs = np.zeros((height, width), label_dtype(len(boxes)))
    if not len(boxes):
        return segs
    embedding = encode(model, image)
    prompts = boxes_to_network(boxes, height, width, model.image_size)
    label = 0
    for part in prompts.split(BATCH):
        for logits in decode_boxes(model, embedding, part):
            label += 1
            segs[logits_to_mask(logits[None], height, width, model.image_size)[0]] = label
    return segs


class Predictor:
    """One image, many prompts (the interface of SAM's predictor).

        predictor = Predictor(load_model("weights.pth"))
        predictor.set_image(rgb)                                  # uint8 (H, W, 3) or (H, W)
        masks, iou, logits = predictor.predict(box=[x0, y0, x1, y1])
    """

    def __init__(self, model):
        self.model = model
        self.embedding = None

    def set_image(self, image: np.ndarray) -> None:
        """Compute the embedding of a uint8 (H, W) or (H, W, 3) RGB image. ValueError for anything else."""
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"image: expected uint8 (H, W) or (H, W, 3), found {image.dtype} {image.shape}")
        self.height, self.width = image.shape[:2]
        self.embedding = encode(self.model, image)

    @torch.inference_mode()
    def predict(self, box=None, point_coords=None, point_labels=None, mask_input=None,
                multimask_output: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for N prompts in pixels of the image.

        box: (4,) or (N, 4); point_coords (P, 2) or (N, P, 2) with point_labels (P,) or (N, P), 1 foreground and
        0 background; mask_input: logits (256, 256), (1, 256, 256) or (N, 1, 256, 256) of an earlier call.
        Returns masks (N, H, W) bool, or (N, 3, H, W) with `multimask_output`; iou (N, 1 or 3) float32;
        logits (N, 1 or 3, 256, 256) float32. RuntimeError before `set_image`, ValueError for prompts that do not fit.
        """
        if self.embedding is None:
            raise RuntimeError("predict: call set_image first")
        device, frame = self.embedding.device, (self.height, self.width, self.model.image_size)
        boxes = points = masks = None
        if box is not None:
            boxes = boxes_to_network(np.asarray(box, np.float64).reshape(-1, 4), *frame).to(device)
        if point_coords is not None:
            if point_labels is None or np.size(point_labels) * 2 != np.size(point_coords):
                raise ValueError("point_labels: expected one label, 1 or 0, for each point")
            coords = np.asarray(point_coords, np.float64)
            coords = coords[None] if coords.ndim == 2 else coords                           # (N, P, 2)
            labels = torch.as_tensor(np.asarray(point_labels)).reshape(coords.shape[:2])    # (N, P)
            points = (boxes_to_network(coords, *frame).to(device), labels.to(device))
        if mask_input is not None:
            masks = torch.as_tensor(np.asarray(mask_input), dtype=torch.float32).reshape(-1, 1, 256, 256).to(device)
        counts = {len(p) for p in (boxes, points[0] if points else None, masks) if p is not None}
        if len(counts) != 1:
            raise ValueError("prompts: expected as many boxes as point sets and masks, found "
                             + (", ".join(map(str, sorted(counts))) or "none"))
        logits, iou = self.model.decode(self.embedding, boxes, points, masks, multimask=multimask_output)
        logits, iou = logits.float().cpu(), iou.float().cpu()                               # (N, M, 256, 256), (N, M)
        full = logits_to_mask(logits.flatten(0, 1), *frame).reshape(*logits.shape[:2], self.height, self.width)
        return (full if multimask_output else full[:, 0]), iou.numpy(), logits.numpy()
