"""MedficientSAM in plain PyTorch: segment medical images and volumes from boxes, on a laptop."""
from .inference.checkpoint import load_model
from .inference.predictor import Predictor
from .inference.volume import Stopped, segment_volume
from .evaluation.metrics import dsc, nsd

__all__ = ["Predictor", "Stopped", "dsc", "load_model", "nsd", "segment_volume"]
