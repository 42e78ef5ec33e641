"""Every network against outputs recorded from its authors' code, and its size against the papers'."""

import numpy as np
import pytest
import torch
from fakes import PARITY, deterministic_sam, fast_or_skip

from medficient_mini.machine import keep_memory
from medficient_mini.nets.sam import NETWORKS, build_sam

recorded = pytest.mark.skipif(not PARITY.is_dir(), reason=f"recorded outputs absent: {PARITY}")

pytestmark = pytest.mark.usefixtures("one_thread")
PARAMETERS = {"medficientsam_l0": 34.79, "medficientsam_l1": 47.65, "medficientsam_l2": 61.33,
              "medsam_vit_b": 93.74, "lite_medsam": 9.79}                     # millions, papers' tables
ONE_OF_EACH_ENCODER = ("medficientsam_l0", "lite_medsam")                     # with all prompts, and in their fast form


def compare(actual: torch.Tensor, index, value, tolerance):
    found = actual.detach().numpy().reshape(-1)[index]
    assert np.abs(found - value).max() < tolerance


@pytest.mark.parametrize("name", NETWORKS)
def test_size(name):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in build_sam(name).parameters()) / 1e6, 2) == PARAMETERS[name]


@recorded
@pytest.mark.parametrize("name", NETWORKS)
def test_parity(name):
    keep_memory()                                                             # 4 s of page faults less for ViT-B
    record = np.load(PARITY / f"{name}.npz")
    model = deterministic_sam(name, int(record["seed"]))
    assert record["size"] == model.image_size
    check_parity(model, record, all_prompts=name in ONE_OF_EACH_ENCODER)
    if name.startswith("medficientsam"):
        with torch.inference_mode():
            assert model.image_encoder(torch.rand(1, 3, 64, 64)).shape == (1, 256, 64, 64)     # at another size too
    if name in ONE_OF_EACH_ENCODER:
        check_parity(fast_or_skip(model), record, all_prompts=False)


@torch.inference_mode()
def check_parity(model, record, all_prompts):
    import inputs
    seed = int(record["seed"])
    embedding = model.image_encoder(inputs.image(seed, int(record["size"])))
    assert embedding.shape == (1, 256, 64, 64)
    compare(embedding, record["embedding_index"], record["embedding_value"], 1e-4)

    boxes, points = torch.from_numpy(record["boxes"]).float(), torch.from_numpy(record["points"]).float()
    points = points, torch.from_numpy(record["point_labels"])
    prompts = {"box": dict(boxes=boxes)}
    if all_prompts:
        prompts |= {"box_multi": dict(boxes=boxes, multimask=True), "points": dict(points=points, multimask=True),
                    "box_points_mask": dict(boxes=boxes, points=points, masks=inputs.mask_prompt(seed))}
    for case, prompt in prompts.items():
        logits, iou = model.decode(embedding, **prompt)
        assert logits.shape == tuple(record[f"{case}_shape"])
        compare(logits, record[f"{case}_index"], record[f"{case}_value"], 1e-3)
        assert np.abs(iou.numpy() - record[f"{case}_iou"]).max() < 1e-3
        positive = (logits[:, 0] > 0).flatten(1).sum(1).numpy()
        assert np.abs(positive - record[f"{case}_positive"]).max() <= 2      # a logit within rounding of 0 may flip


@torch.inference_mode()
def test_prompts_of_several_images_in_one_batch():
    model = build_sam("lite_medsam").eval()
    embedding = torch.randn(2, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10., 20, 90, 80], [40, 40, 200, 220], [5, 5, 50, 60]])
    together, iou = model.decode(embedding, boxes, image_index=torch.tensor([1, 0, 1]))
    for i, image in enumerate([1, 0, 1]):
        alone, alone_iou = model.decode(embedding[image:image + 1], boxes[i:i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-4) and torch.allclose(iou[i], alone_iou[0], atol=1e-4)
    assert not torch.allclose(together[1], together[2], atol=1e-2)


def test_linear_attention_equals_its_definition():
    from medficient_mini.nets.efficientvit import LiteMLA
    q, k, v = torch.rand(3, 1, 1, 32, 7, generator=torch.Generator().manual_seed(1)) - 0.3
    found = LiteMLA.attend(torch.cat([q, k, v], dim=2).mT)[0, 0].T           # (32, 7)
    weight = torch.relu(q[0, 0]).T @ torch.relu(k[0, 0])                     # (query, key)
    expected = v[0, 0] @ (weight / weight.sum(1, keepdim=True)).T
    assert torch.allclose(found, expected, atol=1e-5)


def test_linear_attention_accumulates_in_float32():
    from medficient_mini.nets.efficientvit import LiteMLA
    qkv = torch.rand(1, 1, 4096, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = LiteMLA.attend(qkv)
    assert found.dtype == torch.float32 and torch.equal(found, LiteMLA.attend(qkv.float()))
