"""The two training scripts end to end on tiny cases and tiny networks."""
import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from npz_files import write_2d

import train_distill
import train_finetune
from medficient_mini.inference.checkpoint import load_model, load_state, read_torch
from medficient_mini.nets import efficientvit
from medficient_mini.nets.sam import NETWORKS, build_sam
from medficient_mini.training.losses import dsc, finetune_loss
from medficient_mini.training.optim import AdamW

WEIGHTS = Path(train_distill.__file__).parent / "medficient_mini" / "weights"


def disc_case(folder, name, centre, radius, depth=0):
    """A bright disc on noise, label 1, as a 2D or a 3D case."""
    y, x = np.mgrid[:64, :64]
    mask = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius ** 2).astype(np.uint8)
    noise = np.random.default_rng(radius).integers(0, 40, (64, 64))
    image = (noise + 180 * mask).astype(np.uint8)
    if depth:
        arrays = dict(imgs=np.stack([image] * depth), gts=np.stack([mask] * depth), spacing=np.ones(3))
    else:
        arrays = dict(imgs=np.stack([image] * 3, -1), gts=mask)
    np.savez_compressed(folder / f"{'3D_MR' if depth else '2D_US'}_{name}.npz", **arrays)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """L0 with one attention block and inputs of 64 pixels: the same keys and code, half the weights to compute."""
    monkeypatch.setitem(efficientvit.DEPTHS, "l0", (0, 0, 0, 0, 1))
    monkeypatch.setattr(train_distill, "STATISTICS_SLICES", 1)
    monkeypatch.setitem(NETWORKS, "medficientsam_l0", replace(NETWORKS["medficientsam_l0"], image_size=64))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Three tiny cases of two patients, and a teacher with random weights: whole, and its encoder alone."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "cases").mkdir()
    disc_case(folder / "cases", "P001_slice01", (20, 30), 9)
    disc_case(folder / "cases", "P001_slice02", (29, 30), 12)
    disc_case(folder / "cases", "P002", (32, 32), 15, depth=3)
    disc_case(folder / "cases", "P003", (32, 32), 14, depth=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(efficientvit.DEPTHS, "l0", (0, 0, 0, 0, 1))
        torch.manual_seed(0)
        state = build_sam("medficientsam_l0").state_dict()
    state["prompt_encoder.no_mask_embed.weight"] += 1
    torch.save(state, folder / "teacher.pth")
    torch.save({key: value for key, value in state.items() if key.startswith("image_encoder.")}, folder / "encoder.pth")
    return folder


def common(bench, out, *more):
    options = ["--data", bench / "cases", "--cache", bench / "cache", "--out", out, "--val-fraction", 0.3, "--workers", 0,
               "--threads", 1, "--log-steps", 1, "--val-limit", 1, "--bs", 1, "--device", "cpu", "--amp", "off", "--seed", 1, *more]
    return [str(option) for option in options]


def call(script, *options):
    """Run main() of a script in this process, which gives its exit status."""
    threads = torch.get_num_threads()
    try:
        return script.main([str(option) for option in options])
    finally:
        torch.set_num_threads(threads)


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_defaults_are_the_papers():
    """MedficientSAM, Tables 2 and 3."""
    for script, expected in (
            (train_distill, dict(student="l1", lr=0.075, weight_decay=5e-4, bs=2, epochs=8, clip=0.5, schedule="plateau",
                                 flips=True, augment=False, mask_loss=0, ema=None, photometric=False, in_use=0)),
            (train_finetune, dict(lr=2e-6, bs=8, epochs=8, schedule="cosine", augment="none", freeze="none", boxes=5,
                                  box_shift=5, ema=None, photometric=False, in_use=0))):
        found = vars(script.parse_arguments([]))
        assert {key: found[key] for key in expected} == expected


def test_published_runs_are_files_of_options():
    for file in sorted(WEIGHTS.glob("*.args")):
        script = train_distill if file.name.startswith("distill") else train_finetune
        found = vars(script.parse_arguments([f"@{file}", "--bs", "17"]))
        assert found["schedule"] == "cosine" and found["balance"] == 0.5 and found["ema"] > 0.9 and found["bs"] == 17


def test_distill_then_finetune_then_load(bench, tmp_path, monkeypatch, capsys):
    """Cached teacher with mask loss, resumed; its encoder with the teacher's decoder into stage 2; both files load."""
    teacher = bench / "teacher.pth"
    options = common(bench, tmp_path / "distill", "--student", "l0", "--teacher", teacher, "--embeddings",
                     tmp_path / "embeddings", "--mask-loss", 1, "--decoder-weights", teacher,
                     "--lr", 1e-4, "--schedule", "cosine", "--start-from-statistics", "--average", 0.9, "--balance",
                     "--decay-matrices-only", "--samples-per-epoch", 2)
    assert call(train_distill, *options, "--steps", 1) == 0
    assert "3 patients in 4 cases" in capsys.readouterr().err                              # fault 20
    kept = [*(tmp_path / "embeddings").rglob("*.npy")]
    plain = {path: np.load(path) for path in kept if "-" not in path.stem}                # not flipped
    flipped = {path: path.stat().st_mtime_ns for path in kept if path not in plain}
    for path in plain:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train_distill, "statistics_of", lambda _: pytest.fail("the checkpoint holds the teacher's statistics"))
        assert call(train_distill, *options, "--steps", 2, "--resume") == 0
    again = [path for path in plain if path.exists()]                                     # those of validation at least
    assert again and all(np.array_equal(np.load(path), plain[path]) and np.ptp(plain[path]) > 1 for path in again)
    assert all(path.stat().st_mtime_ns == written for path, written in flipped.items())
    assert read_torch(tmp_path / "distill" / "last.pt")["extra"]["teacher_variance"].shape == (256,)
    rows = log_of(tmp_path / "distill")
    assert [row["step"] for row in rows] == ["1", "2"] and all(0 <= float(row["dsc"]) <= 1 for row in rows)
    name, state = load_state(tmp_path / "distill" / "best.pt")
    assert name == "medficientsam_l0" and all(key.startswith("image_encoder.") for key in state)

    assert call(train_distill, *options, "--augment", "--no-flips", "--resume") == 1
    assert "--no-flips: expected no --augment" in capsys.readouterr().err
    options = common(bench, tmp_path / "tune", "--weights", tmp_path / "distill" / "best.pt", "--steps", 1)
    assert call(train_finetune, *options) == 1 and "--decoder-weights" in capsys.readouterr().err
    assert call(train_finetune, *options, "--decoder-weights", teacher, "--freeze", "prompt", "--freeze-norm",
                "--augment", "full", "--photometric", "--in-use", 0.5, "--limit-samples", 2) == 0
    assert " 2 training slices" in capsys.readouterr().err                        # with --in-use, too
    options = common(bench, tmp_path / "tune", "--student", "l0", "--teacher", teacher, "--steps", 2, "--resume")
    assert call(train_distill, *options) == 1 and "expected a run of this script" in capsys.readouterr().err
    tuned, start_from = load_model(tmp_path / "tune" / "best.pt"), load_state(teacher)[1]
    assert torch.equal(tuned.prompt_encoder.no_mask_embed.weight, start_from["prompt_encoder.no_mask_embed.weight"])
    assert not torch.equal(tuned.mask_decoder.iou_token.weight, start_from["mask_decoder.iou_token.weight"])
    assert torch.equal(tuned.image_encoder.backbone.stages[0].op_list[0].norm.running_mean,
                       state["image_encoder.backbone.stages.0.op_list.0.norm.running_mean"])


def test_distill_with_the_teacher_in_memory(bench, tmp_path):
    assert call(train_distill, *common(bench, tmp_path, "--student", "l0", "--teacher", bench / "encoder.pth", "--lr",
                                       1e-3, "--steps", 1, "--samples-per-epoch", 2, "--limit-samples", 2)) == 0
    row = log_of(tmp_path)[-1]
    assert float(row["loss"]) > 0 and float(row["val_error"]) > 0 and "dsc" not in row


def test_validation_cases_inside_the_data_are_not_trained_on(bench, tmp_path, capsys):     # fault 21
    """The files of --val, and what else there is of their patients; --val equal to --data leaves nothing."""
    (tmp_path / "val").mkdir()
    for path in sorted((bench / "cases").iterdir()):
        (tmp_path / ("val" if "slice02" in path.name else ".") / path.name).symlink_to(path)
    options = common(bench, tmp_path / "out", "--data", tmp_path, "--weights", bench / "teacher.pth", "--bs", 99)
    assert call(train_finetune, *options, "--val", tmp_path / "val") == 1
    err = capsys.readouterr().err
    assert "val: 2 cases of" in err
    assert err.splitlines()[-1].startswith("--bs: expected at most the 5 slices")         # those of P002 and P003
    assert call(train_finetune, *options, "--val", tmp_path) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{tmp_path}: --data: expected cases of patients that --val")


def test_patients_of_validation_elsewhere_are_not_trained_on(bench, tmp_path, capsys):     # fault 21
    """A slice of P001 and a copy of P002's file under another name; a number alone is no patient of another folder."""
    disc_case(tmp_path, "P001_slice77", (20, 20), 7)
    shutil.copy(bench / "cases" / "3D_MR_P002.npz", tmp_path / "3D_MR_copy.npz")
    options = common(bench, tmp_path / "out", "--val", tmp_path, "--weights", bench / "teacher.pth", "--bs", 99)
    assert call(train_finetune, *options) == 1
    err = capsys.readouterr().err
    assert ": 3 cases of" in err and "at most the 2 slices" in err  # those of P003
    for folder, name in (("a", "2D_US_10001-1"), ("a", "2D_US_10001-2"), ("b", "2D_US_10001-3"), ("b", "2D_US_10002-3")):
        write_2d(tmp_path / folder, name, seed=int(name[-1]))
    assert call(train_finetune, *options, "--data", tmp_path / "a", "--val", tmp_path / "b") == 1
    err = capsys.readouterr().err
    assert "of its patients" not in err and "at most the 2 slices" in err


def test_a_damaged_image_costs_distillation_one_line(bench, tmp_path, capsys):             # faults 7 and 8
    for i in range(3):
        write_2d(tmp_path, f"2D_US_{'abc'[i]}", seed=i, gts=None)
    raw = bytearray((tmp_path / "2D_US_b.npz").read_bytes())
    raw[3000:3100] = bytes(100)
    (tmp_path / "2D_US_b.npz").write_bytes(raw)
    options = common(bench, tmp_path / "out", "--data", tmp_path, "--student", "l0", "--teacher", bench / "teacher.pth",
                     "--bs", 99, "--val-fraction", 0.3)
    assert call(train_distill, *options) == 1
    err = capsys.readouterr().err
    assert err.count("2D_US_b.npz: file: expected a whole NPZ archive") == 1 and "slices and the" in err.splitlines()[-1]


def test_a_pattern_names_the_patients(bench, tmp_path, capsys):                            # fault 20
    options = common(bench, tmp_path, "--weights", bench / "teacher.pth", "--bs", 99)
    assert call(train_finetune, *options, "--patient", "_(P00.)$") == 1
    assert "P001_slice01.npz: patient" in capsys.readouterr().err
    assert call(train_finetune, *options, "--patient", "P00[12]|P003") == 1
    assert "3 patients in 4 cases" in capsys.readouterr().err


def test_bad_input_is_one_line_and_status_1(bench, tmp_path, capsys):
    for name in ("none", "one", "blank"):
        (tmp_path / name).mkdir()
    disc_case(tmp_path / "one", "disc", (32, 32), 9)
    np.savez(tmp_path / "blank" / "2D_US_a.npz", imgs=np.zeros((8, 8), np.uint8), gts=np.zeros((8, 8), np.uint8))
    base = common(bench, tmp_path / "out", "--teacher", bench / "teacher.pth", "--student", "l0")
    for options, words in (
            (["--data", tmp_path / "none"], "none"),
            (["--data", tmp_path / "one"], "one: no validation slice in 0 cases, expected --val or more cases"),
            (["--mask-loss", 1], "--mask-loss: expected --decoder-weights"),
            (["--size", 100], "--size: expected 64, or with an EfficientViT network a multiple of 32 from 64, found 100"),
            (["--teacher", tmp_path / "absent.pth"], "absent.pth"),
            (["--init", bench / "encoder.pth", "--student", "l1"], "encoder.pth: weights do not fit: ")):
        assert call(train_distill, *base, *options) == 1
        assert words in capsys.readouterr().err.splitlines()[-1]
    options = common(bench, tmp_path / "out", "--weights", bench / "teacher.pth", "--val", tmp_path / "blank")
    assert call(train_finetune, *options) == 1
    assert "blank: no validation slice with a label in 1 cases" in capsys.readouterr().err


def test_the_teacher_is_asked_once_for_each_answer_that_is_kept(bench, tmp_path):
    torch.manual_seed(3)
    teacher, images = train_distill.read_teacher(bench / "teacher.pth"), torch.rand(2, 3, 64, 64)
    batch = {"teacher_image": images, "embedding_file": [str(tmp_path / "a" / "0.npy"), ""]}
    first = train_distill.teach(teacher, batch)
    expected = teacher.image_encoder(images)
    assert torch.allclose(first, expected, atol=1e-2) and torch.equal(first[0].half().float(), first[0])
    teacher.image_encoder = nn.Identity()                                                  # no answer comes from it now
    batch["teacher_image"] = expected
    again = train_distill.teach(teacher, batch)
    assert torch.equal(again[0], first[0]) and torch.equal(again[1], expected[1])
    assert [path.name for path in tmp_path.rglob("*.npy")] == ["0.npy"]


def test_statistics_of_embeddings():
    embeddings = torch.randn(3, 256, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    found = train_distill.statistics_of(embeddings)
    assert torch.allclose(found["teacher_mean"], embeddings.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(found["teacher_variance"], embeddings.var((0, 2, 3), correction=0), atol=1e-4)


def test_finetuning_learns_a_disc_and_reaches_the_encoder():
    """Random weights, one image: the stage 2 loss trains the encoder, and a decoder alone learns the mask in 30 updates."""
    torch.manual_seed(1)
    model = build_sam("medficientsam_l0")
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    masks = ((x - 30) ** 2 + (y - 26) ** 2 <= 100)[None].to(torch.uint8)
    image, box = 0.1 * torch.rand(1, 3, 64, 64) + 0.8 * masks, torch.tensor([[20.0, 16, 40, 36]])
    embedding = model.image_encoder(image)
    logits, iou = model.decode(embedding, box)
    finetune_loss(logits, masks, iou).backward()
    assert model.image_encoder.backbone.stages[0].op_list[0].conv.weight.grad.abs().max() > 0
    optimizer, embedding = AdamW(model.mask_decoder.parameters(), lr=1e-3), embedding.detach()
    for _ in range(30):
        logits, iou = model.decode(embedding, box)
        if dsc(logits, masks) > 0.9:
            break
        optimizer.zero_grad()
        finetune_loss(logits, masks, iou).backward()
        nn.utils.clip_grad_norm_(model.mask_decoder.parameters(), 0.5)
        optimizer.step()
    assert dsc(logits, masks) > 0.9
