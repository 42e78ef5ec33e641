"""MedficientSAM in plain PyTorch: segment medical images and volumes from boxes, on a laptop.

    from medficient_mini import Predictor, Stopped, dsc, load_model, nsd, segment_volume
"""
from importlib import import_module

FRONT = {"load_model": "inference.checkpoint", "Predictor": "inference.predictor",
         "segment_volume": "inference.volume", "Stopped": "inference.volume",
         "dsc": "evaluation.metrics", "nsd": "evaluation.metrics"}
__all__ = list(FRONT)


def __getattr__(name):
    """Import a name when it is asked for, since scores need no torch, whose import takes longer than they do."""
    if name not in FRONT:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f".{FRONT[name]}", __name__), name)
