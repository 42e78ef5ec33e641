"""MedficientSAM in plain PyTorch: segment medical images and volumes from boxes, on a laptop."""
