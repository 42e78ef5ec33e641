"""The two training scripts end to end on tiny cases; gradients and overfitting of the real networks."""
import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_distill  # noqa: E402
import train_finetune  # noqa: E402
from medficient_mini.inference.checkpoint import load_model, load_state, read_torch  # noqa: E402
from medficient_mini.training.samples import FinetuneDataset, scan_cases  # noqa: E402
from medficient_mini.training.losses import dice_loss, finetune_loss, focal_loss  # noqa: E402
from medficient_mini.nets import efficientvit  # noqa: E402
from medficient_mini.nets.sam import build_sam  # noqa: E402
from medficient_mini.training.optim import AdamW, clip_grad_norm  # noqa: E402
from medficient_mini.training.volume_cache import SliceCache  # noqa: E402


def disc_case(folder, name, centre, radius, depth=0):
    """A bright disc on noise, label 1, as a 2D or a 3D case."""
    y, x = np.mgrid[:64, :64]
    mask = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius ** 2).astype(np.uint8)
    noise = np.random.default_rng(radius).integers(0, 40, (64, 64))
    image = (noise + 180 * mask).astype(np.uint8)
    if depth:
        np.savez_compressed(folder / f"3D_MR_{name}.npz", imgs=np.stack([image] * depth), gts=np.stack([mask] * depth),
                            spacing=np.ones(3))
    else:
        np.savez_compressed(folder / f"2D_US_{name}.npz", imgs=np.stack([image] * 3, -1), gts=mask)


@pytest.fixture
def shallow(monkeypatch):
    """L0 with one attention block and little before it: the same keys and code, half the weights to compute and save."""
    monkeypatch.setitem(efficientvit.DEPTHS, "l0", (0, 0, 0, 0, 1))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Four tiny cases and a teacher with random weights: whole, and its encoder alone."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "cases").mkdir()
    for k in range(3):
        disc_case(folder / "cases", f"disc_{k}", (20 + 9 * k, 30), 9 + 3 * k)
    disc_case(folder / "cases", "disc_9", (32, 32), 15, depth=2)
    torch.manual_seed(0)
    state = build_sam("lite_medsam").state_dict()
    torch.save(state, folder / "teacher.pth")
    torch.save({key: value for key, value in state.items() if key.startswith("image_encoder.")}, folder / "encoder.pth")
    return folder


def call(monkeypatch, script, *options):
    """Run a script's main() in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, options)])
    threads = torch.get_num_threads()
    try:
        return script.main()
    finally:
        torch.set_num_threads(threads)


def common(bench, out):
    return ["--data", bench / "cases", "--cache", bench / "cache", "--out", out, "--val-fraction", 0.3, "--workers", 0,
            "--threads", 1, "--log-steps", 1, "--device", "cpu", "--size", 64]


def test_defaults_are_the_papers(monkeypatch):
    """MedficientSAM, Tables 2 and 3."""
    for script, expected in (
            (train_distill, dict(student="l1", lr=0.075, weight_decay=5e-4, bs=2, epochs=8, clip=0.5, schedule="plateau",
                                 flips=True, augment=False, mask_loss=0, average=None)),
            (train_finetune, dict(lr=2e-6, bs=8, epochs=8, schedule="cosine", augment="none", freeze="none", boxes=5,
                                  box_shift=5, average=None))):
        monkeypatch.setattr(sys, "argv", [script.__name__])
        found = vars(script.parse_arguments())
        assert {key: found[key] for key in expected} == expected


def test_distill_then_finetune_then_load(shallow, bench, tmp_path, monkeypatch):
    """Cached teacher with mask loss, resumed; its encoder with the teacher's decoder into stage 2; both files load."""
    teacher = bench / "teacher.pth"
    options = [*common(bench, tmp_path / "distill"), "--student", "l0", "--teacher", teacher, "--embeddings",
               tmp_path / "embeddings", "--embeddings-limit", 2, "--mask-loss", 1, "--decoder-weights", teacher, "--lr", 1e-4,
               "--schedule", "cosine", "--start-from-statistics", "--average", 0.9, "--balance", "--decay-matrices-only",
               "--samples-per-epoch", 2]
    assert call(monkeypatch, train_distill, *options, "--steps", 1) == 0
    lost, *others = sorted((tmp_path / "embeddings").rglob("*.npy"))
    assert len(others) in (2, 3)                                               # two to train on, the validation's one or two
    embedding, written = np.load(lost), [path.stat().st_mtime_ns for path in others]
    lost.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train_distill, "statistics_of", lambda _: pytest.fail("the checkpoint holds the teacher's statistics"))
        assert call(monkeypatch, train_distill, *options, "--steps", 2, "--resume") == 0
    assert np.allclose(np.load(lost), embedding, atol=0.01) and np.ptp(embedding) > 1
    assert [path.stat().st_mtime_ns for path in others] == written
    assert read_torch(tmp_path / "distill" / "last.pt")["extra"]["teacher_variance"].shape == (256,)
    rows = list(csv.DictReader(open(tmp_path / "distill" / "log.csv")))
    assert [row["step"] for row in rows] == ["1", "2"] and all(0 <= float(row["dsc"]) <= 1 for row in rows)
    name, state = load_state(tmp_path / "distill" / "best.pt")
    assert name == "medficientsam_l0" and all(key.startswith("image_encoder.") for key in state)

    options = [*common(bench, tmp_path / "tune"), "--weights", tmp_path / "distill" / "best.pt", "--bs", 2, "--steps", 1]
    with pytest.raises(ValueError, match="--decoder-weights"):
        call(monkeypatch, train_finetune, *options)
    assert call(monkeypatch, train_finetune, *options, "--decoder-weights", teacher, "--freeze", "prompt", "--freeze-norm",
                "--augment", "full") == 0
    tuned, start_from = load_model(tmp_path / "tune" / "best.pt"), load_state(teacher)[1]
    assert torch.equal(tuned.prompt_encoder.no_mask_embed.weight, start_from["prompt_encoder.no_mask_embed.weight"])
    assert not torch.equal(tuned.mask_decoder.iou_token.weight, start_from["mask_decoder.iou_token.weight"])
    assert torch.equal(tuned.image_encoder.backbone.stages[0].op_list[0].norm.running_mean,
                       state["image_encoder.backbone.stages.0.op_list.0.norm.running_mean"])


def test_distill_with_the_teacher_in_memory(shallow, bench, tmp_path, monkeypatch):
    assert call(monkeypatch, train_distill, *common(bench, tmp_path), "--student", "l0", "--teacher", bench / "encoder.pth",
                "--lr", 1e-3, "--steps", 1, "--samples-per-epoch", 2, "--limit-samples", 2, "--val-limit", 1) == 0
    row = list(csv.DictReader(open(tmp_path / "log.csv")))[-1]
    assert float(row["loss"]) > 0 and float(row["val_error"]) > 0 and "dsc" not in row


def test_bad_input_of_the_scripts(shallow, bench, tmp_path, monkeypatch):
    for name in ("none", "one", "blank"):
        (tmp_path / name).mkdir()
    disc_case(tmp_path / "one", "disc", (32, 32), 9)
    np.savez(tmp_path / "blank" / "2D_US_a.npz", imgs=np.zeros((8, 8), np.uint8), gts=np.zeros((8, 8), np.uint8))
    base = [*common(bench, tmp_path / "out"), "--teacher", bench / "teacher.pth", "--student", "l0"]
    for options, words in (
            (["--data", tmp_path / "none"], "none"),
            (["--data", tmp_path / "one"], "one: no validation slice in 0 cases, expected --val or more cases"),
            (["--mask-loss", 1], "--mask-loss: needs --decoder-weights"),
            (["--embeddings", tmp_path / "emb", "--augment"], "--augment: expected --mask-loss or --plain"),
            (["--size", 100], "--size: expected a multiple of 32"),
            (["--teacher", tmp_path / "absent.pth"], "absent.pth"),
            (["--init", bench / "teacher.pth"], "holds lite_medsam, expected medficientsam_l0")):
        with pytest.raises(ValueError, match=words):
            call(monkeypatch, train_distill, *base, *options)
    np.savez(tmp_path / "none" / "2D_CT_a.npz", imgs=np.zeros((8, 8), np.uint8))
    for options, words in ((["--data", tmp_path / "none"], "none: no usable case"),
                           (["--val", tmp_path / "blank"], "blank: no validation slice with a label in 1 cases")):
        with pytest.raises(ValueError, match=words):
            call(monkeypatch, train_finetune, *common(bench, tmp_path / "out"), "--size", 256, "--weights",
                 bench / "teacher.pth", *options)
    train_distill.claim_folder(tmp_path / "emb", bench / "teacher.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(b"another teacher")
    with pytest.raises(ValueError, match="one folder per teacher"):
        train_distill.claim_folder(tmp_path / "emb", other)


def test_bad_input_is_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_finetune.py", "--data", str(tmp_path), "--weights", str(tmp_path / "no.pt"),
                                      "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_finetune.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.count("\n") == 1 and "no.pt" in err


def test_statistics_of_embeddings():
    embeddings = torch.randn(3, 256, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    mean, variance = train_distill.statistics_of(embeddings)
    assert torch.allclose(mean, embeddings.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, embeddings.var((0, 2, 3), correction=0), atol=1e-4)


# ------------------------------------------------------------------------------------------ gradients, overfitting

def decode_disc(model, image, box):
    logits, iou = model.decode(model.image_encoder(image), box)
    return logits, iou


def test_mask_terms_reach_the_encoder_and_in_the_published_form_do_not(shallow):
    torch.manual_seed(0)
    model = build_sam("medficientsam_l0").eval()
    image, box = torch.rand(1, 3, 64, 64), torch.tensor([[100.0, 100, 300, 300]])
    masks = torch.zeros(1, 64, 64)
    masks[:, 12:38, 12:38] = 1
    stem = model.image_encoder.backbone.stages[0].op_list[0].conv.weight
    logits, iou = decode_disc(model, image, box)
    up = nn.functional.interpolate(logits, (64, 64), mode="bilinear")
    for loss in (dice_loss(up, masks), focal_loss(up, masks), finetune_loss(logits, iou.detach(), masks)):
        grad, = torch.autograd.grad(loss, stem, retain_graph=True)
        assert grad.isfinite().all() and grad.abs().max() > 0
    assert not finetune_loss(logits, iou.detach(), masks, mask_gradient=False).requires_grad
    assert finetune_loss(logits, iou, masks, mask_gradient=False).requires_grad        # the IoU head's error alone


def test_finetuning_overfits_a_disc(shallow, bench):
    """Random weights, one case, at most 25 updates of the stage 2 loss: DSC > 0.95."""
    torch.manual_seed(1)
    model = build_sam("medficientsam_l0").train().to(memory_format=torch.channels_last)
    cases = scan_cases(bench / "cases")[:1]
    sample = FinetuneDataset(cases, [(0, 0)], SliceCache(bench / "cache", 100), 64, "bilinear", max_boxes=1).sample(0, 0, 0)
    image, box, masks = sample["image"][None], sample["boxes"] * 8, sample["masks"]
    optimizer = AdamW(model.parameters(), lr=3e-4)
    for _ in range(25):
        logits, iou = decode_disc(model, image, box)
        found = nn.functional.interpolate(logits, (64, 64), mode="bilinear")[:, 0] > 0
        dsc = 2 * (found & (masks > 0)).sum() / (found.sum() + masks.sum())
        if dsc > 0.95:
            break
        optimizer.zero_grad()
        finetune_loss(logits, iou, masks).backward()
        clip_grad_norm(list(model.parameters()), 0.5)
        optimizer.step()
    assert dsc > 0.95
