"""Pixels between image and network, against the definition written out here."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medficient_mini.inference import geometry


@pytest.mark.parametrize("height, width, size", [(300, 400, 512), (700, 200, 256), (512, 512, 512), (37, 1000, 512), (1, 9, 256)])
def test_masks_equal_the_two_step_enlargement(height, width, size):
    coarse = torch.randn(3, 1, 9, 9, generator=torch.Generator().manual_seed(height))
    logits = F.interpolate(coarse, (256, 256), mode="bicubic")[:, 0] - 0.3
    full = F.interpolate(logits[:, None], (size, size), mode="bilinear", align_corners=False)
    scale = size / max(height, width)
    full = full[..., :max(1, round(height * scale)), :max(1, round(width * scale))]
    full = F.interpolate(full, (height, width), mode="bilinear", align_corners=False)[:, 0].numpy()
    found = geometry.logits_to_mask(logits, height, width, size)
    sure = np.abs(full) > 1e-4                                              # a logit within rounding of 0 may flip
    assert found.shape == (3, height, width) and found.dtype == bool
    assert (found[sure] == (full[sure] > 0)).all() and sure.mean() > 0.9
    assert np.abs(geometry.postprocess_masks(logits[:, None], height, width, size)[:, 0].numpy() - full).max() < 1e-5
    assert geometry.enlargement.cache_info().maxsize <= 4                   # fault 18: matrices of up to 4 MB each
    region = slice(height // 3, height), slice(1, width // 2 + 1)
    for one, expected in zip(logits, full):
        assert np.abs(geometry.enlarged_logits(one, height, width, size, region) - expected[region]).max() < 1e-4


def test_an_empty_and_a_full_mask():
    logits = torch.stack([torch.full((256, 256), -1.0), torch.full((256, 256), 1.0)])
    masks = geometry.logits_to_mask(logits, 30, 50, 512)
    assert not masks[0].any() and masks[1].all()


@pytest.mark.parametrize("resize", ["bilinear", "area"])
def test_to_network_scales_pads_and_normalises(resize):
    image = np.full((100, 200), 50, np.uint8)
    image[:50] = 150
    x = geometry.to_network(image, 512, resize)
    assert x.shape == (3, 512, 512) and x.dtype == torch.float32
    assert (x[:, 256:] == 0).all()                                          # 200 -> 512, so 100 -> 256; the rest is padding
    assert (x[:, :120] == 1).all() and (x[:, 140:] == 0).all()


def test_a_constant_image_becomes_zeros():
    assert (geometry.to_network(np.full((10, 10, 3), 7, np.uint8), 256) == 0).all()


def test_boxes_are_scaled_with_the_image_and_not_rounded():
    found = geometry.boxes_to_network(np.array([[1, 2, 101, 52]]), 100, 200, 512)
    assert torch.allclose(found, torch.tensor([[2.56, 5.12, 258.56, 133.12]]))


def test_box_of_mask_is_tight_and_inclusive():
    mask = np.zeros((10, 12), bool)
    mask[3:5, 6:11] = True
    assert geometry.box_of_mask(mask).tolist() == [6, 3, 10, 4]
    assert geometry.box_of_mask(np.zeros((3, 3), bool)) is None
