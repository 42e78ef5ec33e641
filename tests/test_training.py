"""The training loop on a tiny model; the two scripts end to end on tiny cases."""
import argparse
import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_distill  # noqa: E402
import train_finetune  # noqa: E402
from medficient_mini.checkpoint import load_model, load_state, read_torch  # noqa: E402
from medficient_mini.losses import dice_loss, finetune_loss, focal_loss  # noqa: E402
from medficient_mini.nets import efficientvit  # noqa: E402
from medficient_mini.nets.sam import build_sam  # noqa: E402
from medficient_mini.options import add_common_arguments, draw_slices, make_sampler, start  # noqa: E402
from medficient_mini.data import FinetuneDataset, SliceCache, TrainCase, scan_cases  # noqa: E402
from medficient_mini.optim import AdamW, clip_grad_norm  # noqa: E402
from medficient_mini.training import Trainer  # noqa: E402


# ------------------------------------------------------------------------------------------ a run in miniature

class Points(torch.utils.data.Dataset):
    """Eleven images whose sample depends on (epoch, position) as an augmented one does; items of unequal number."""

    def __getitem__(self, key):
        epoch, position, index = key
        image = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1000 * epoch + 10 * position + index))
        return {"image": image, "target": image.mean((1, 2)) * 2 + 1, "known": torch.tensor(index % 3 != 0)}

    def __len__(self):
        return 11


def tiny_run(options, norm=True, hook=lambda step: None):
    """A Trainer on Points: convolution, batch norm, mean squared error over the known targets."""
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, out=Path("unset"), lr=0.05, weight_decay=0.01, batch_size=4, schedule="cosine",
                         schedules=("cosine", "plateau", "halve"))
    arguments = parser.parse_args([*options, "--workers", "0", "--log-steps", "1", "--device", "cpu", "--amp", "off"])
    world = start(arguments)
    torch.set_num_threads(1)
    layers = [nn.Conv2d(3, 6, 3, bias=not norm), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.GELU(), nn.Conv2d(6, 3, 2)]
    model = nn.Sequential(*layers)

    def losses(batch):
        hook(trainer.state["step"])
        error = ((model(batch["image"]).flatten(1) - batch["target"]) ** 2).mean(1)
        known = batch["known"]
        return {"error": (error * known).sum() / known.sum().clamp(min=1)}

    slices = [(0, z) for z in range(11)]
    trainer = Trainer(arguments, world, network="tiny", model=model, dataset=Points(),
                      sampler=make_sampler(arguments, world, None, slices), terms={"error": 1.0},
                      count=lambda batch: {"error": int(batch["known"].sum())}, losses=losses,
                      validate=lambda: {"val_error": sum(float(p.detach().abs().sum()) for p in model.parameters())},
                      criterion=("val_error", "min"))
    return trainer


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [(row["epoch"], row["step"], row["lr"], row.get("loss"), row.get("val_error")) for row in csv.DictReader(file)]


def weights_of(folder, name="last.pt"):
    return read_torch(folder / name)["model"]


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[key].double(), b[key].double(), rtol=0, atol=tolerance) for key in a)


def run_as_script(options, **env):
    return subprocess.run([sys.executable, __file__, *options], env=dict(os.environ, **env), capture_output=True, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """4 epochs of 11 samples, batches of 4, 4, 3, with averaged weights: log rows, weights."""
    out = tmp_path_factory.mktemp("whole")
    assert tiny_run(["--out", str(out / "run"), "--epochs", "4", "--average", "0.9"]).fit() == 0
    return out / "run"


@pytest.mark.parametrize("save_minutes", ["1000", "0"])
def test_killed_and_resumed_equals_undisturbed(tmp_path, undisturbed, save_minutes):
    """SIGKILL in the second epoch; the last checkpoint is one or more steps old, the log may be ahead of it."""
    options = ["--out", str(tmp_path), "--epochs", "4", "--average", "0.9", "--save-minutes", save_minutes]
    assert run_as_script(options, KILL_AT="5").returncode == -signal.SIGKILL
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == (5 if save_minutes == "0" else 3)
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert log_of(tmp_path) == log_of(undisturbed) and len(log_of(tmp_path)) == 12
    assert same(weights_of(tmp_path), weights_of(undisturbed))
    assert same(weights_of(tmp_path, "best.pt"), weights_of(undisturbed, "best.pt"))
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_signal_saves_and_resume_goes_on(tmp_path, undisturbed, capsys, number, status):
    options = ["--out", str(tmp_path), "--epochs", "4", "--average", "0.9"]
    run = tiny_run(options, hook=lambda step: os.kill(os.getpid(), number) if step == 6 else None)
    assert run.fit() == status
    assert "--resume" in capsys.readouterr().err
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == 7
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert log_of(tmp_path) == log_of(undisturbed) and same(weights_of(tmp_path), weights_of(undisturbed))


def test_minutes_stop_cleanly_and_epoch_end_is_not_lost(tmp_path, undisturbed):
    options = ["--out", str(tmp_path), "--epochs", "4", "--average", "0.9"]
    assert tiny_run([*options, "--minutes", "1e-9"]).fit() == 0
    for _ in range(20):                    # one step for each start: the stop also falls on ends of epochs
        if tiny_run([*options, "--minutes", "1e-9", "--resume"]).fit() == 0 and len(log_of(tmp_path)) == 12:
            break
    assert log_of(tmp_path) == log_of(undisturbed) and same(weights_of(tmp_path), weights_of(undisturbed))


def test_two_processes_equal_one(tmp_path):
    """Same global batch, items unevenly spread over the processes, batch norm over both."""
    options = ["--epochs", "2", "--samples-per-epoch", "10", "--out"]
    assert tiny_run([*options, str(tmp_path / "one"), "--bs", "4"]).fit() == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
                           *options, str(tmp_path / "two"), "--bs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 6
    assert np.allclose([float(row[3]) for row in one], [float(row[3]) for row in two], rtol=1e-5)
    assert same(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"), 1e-5)


def test_accumulated_batches_equal_one_large(tmp_path):
    for name, extra in (("large", ["--bs", "4"]), ("small", ["--bs", "2", "--accumulate", "2"])):
        assert tiny_run(["--epochs", "2", "--out", str(tmp_path / name), *extra], norm=False).fit() == 0
    assert same(weights_of(tmp_path / "large"), weights_of(tmp_path / "small"), 1e-6)


def test_loss_falls_and_average_is_what_the_checkpoint_shows(tmp_path):
    run = tiny_run(["--epochs", "30", "--out", str(tmp_path), "--average", "0.99"])
    assert run.fit() == 0
    losses = [float(row[3]) for row in log_of(tmp_path)]
    assert np.mean(losses[-6:]) < 0.3 * np.mean(losses[:3])
    saved = read_torch(tmp_path / "last.pt")
    assert same(saved["raw"], run.model.state_dict()) and same(saved["model"], run.average.weights)
    assert not same(saved["raw"], saved["model"])


def test_diverged_loss_stops_and_keeps_the_checkpoint(tmp_path):
    run = tiny_run(["--epochs", "4", "--out", str(tmp_path)])
    whole, original = run.losses, run.losses

    def broken(batch):
        means = whole(batch)
        return {"error": means["error"] * (math.nan if run.state["step"] == 4 else 1)}

    run.losses = broken
    with pytest.raises(ValueError, match=r"step 5: loss nan.*step 3.*intact.*--lr"):
        run.fit()
    saved = read_torch(tmp_path / "last.pt")
    assert saved["state"]["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())


@pytest.mark.parametrize("change, words", [
    (["--lr", "0.1"], "--lr was 0.05, now 0.1"),
    (["--average", "0.9"], "--average was None, now 0.9"),
])
def test_resume_refuses_other_options(tmp_path, change, words):
    options = ["--out", str(tmp_path), "--epochs", "1"]
    assert tiny_run(options).fit() == 0
    with pytest.raises(ValueError, match=words):
        tiny_run([*options, "--resume", *change])
    with pytest.raises(ValueError, match="earlier run"):
        tiny_run(options)


def test_resume_refuses_another_network(tmp_path):
    options = ["--out", str(tmp_path), "--epochs", "1"]
    assert tiny_run(options).fit() == 0
    saved = read_torch(tmp_path / "last.pt")
    torch.save(saved | {"network": "medficientsam_l2"}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="holds medficientsam_l2, this run trains tiny"):
        tiny_run([*options, "--resume"])


@pytest.mark.parametrize("options, words", [
    (["--bs", "12"], "an update takes 12 samples, more than the 11 slices"),
    (["--bs", "0"], "--bs: expected at least 1"),
    (["--warmup", "5", "--schedule", "halve"], "--warmup: needs --schedule cosine"),
    (["--average", "1.5"], "--average: expected a decay between 0 and 1"),
    (["--resume"], "no such checkpoint"),
    (["--epochs", "1", "--warmup", "3"], "warm-up of 3"),
])
def test_bad_options(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        tiny_run(["--out", str(tmp_path), *options])


def test_drawn_slices_are_different_and_balanced():
    cases = [TrainCase(Path(f"{k}.npz"), str(k), "CT" if k < 90 else "US", (8, 8), False, True) for k in range(100)]
    slices = [(k, 0) for k in range(100)]
    drawn = draw_slices(cases, slices, 30, seed=1, power=0.0)
    assert len(set(drawn)) == 30 and drawn == draw_slices(cases, slices, 30, seed=1, power=0.0)
    assert sum(index >= 90 for index, _ in drawn) >= 7          # 3 without balance
    assert draw_slices(cases, slices, None, seed=1) != slices and len(draw_slices(cases, slices, None, seed=1)) == 100


# ------------------------------------------------------------------------------------------ the scripts

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
    """Four tiny cases and a teacher with random weights."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "cases").mkdir()
    for k in range(3):
        disc_case(folder / "cases", f"disc_{k}", (20 + 9 * k, 30), 9 + 3 * k)
    disc_case(folder / "cases", "disc_9", (32, 32), 15, depth=2)
    torch.manual_seed(0)
    torch.save(build_sam("lite_medsam").state_dict(), folder / "teacher.pth")
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


def test_distill_then_finetune_then_load(shallow, bench, tmp_path, monkeypatch):
    """Cached teacher with mask loss, resumed; its encoder with the teacher's decoder into stage 2; both files load."""
    teacher = bench / "teacher.pth"
    options = [*common(bench, tmp_path / "distill"), "--student", "l0", "--teacher", teacher, "--embeddings",
               tmp_path / "embeddings", "--embeddings-limit", 2, "--mask-loss", 1, "--decoder-weights", teacher, "--lr", 1e-4,
               "--schedule", "cosine", "--start-from-statistics", "--average", 0.9, "--balance", "--decay-matrices-only",
               "--samples-per-epoch", 2]
    assert call(monkeypatch, train_distill, *options, "--steps", 1) == 0
    assert call(monkeypatch, train_distill, *options, "--steps", 2, "--resume") == 0
    assert len(list((tmp_path / "embeddings").rglob("*.npy"))) in (3, 4)      # two to train on, the validation's one or two
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
    assert call(monkeypatch, train_distill, *common(bench, tmp_path), "--student", "l0", "--teacher", bench / "teacher.pth",
                "--lr", 1e-3, "--steps", 1, "--samples-per-epoch", 2, "--limit-samples", 2, "--val-limit", 1) == 0
    row = list(csv.DictReader(open(tmp_path / "log.csv")))[-1]
    assert float(row["loss"]) > 0 and float(row["val_error"]) > 0 and "dsc" not in row


def test_bad_input_of_the_scripts(bench, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    base = [*common(bench, tmp_path / "out"), "--teacher", bench / "teacher.pth", "--student", "l0"]
    for options, words in (
            (["--data", tmp_path / "none"], "none"),
            (["--mask-loss", 1], "--mask-loss: needs --decoder-weights"),
            (["--size", 100], "--size: expected a multiple of 32"),
            (["--teacher", tmp_path / "absent.pth"], "absent.pth"),
            (["--init", bench / "teacher.pth"], "holds lite_medsam, expected medficientsam_l0")):
        with pytest.raises(ValueError, match=words):
            call(monkeypatch, train_distill, *base, *options)
    np.savez(tmp_path / "none" / "2D_CT_a.npz", imgs=np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="none"):
        call(monkeypatch, train_finetune, *common(bench, tmp_path / "out"), "--size", 256, "--weights", bench / "teacher.pth",
             "--data", tmp_path / "none")
    train_distill.claim_folder(tmp_path / "emb", bench / "teacher.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(b"another teacher")
    with pytest.raises(ValueError, match="one folder per teacher"):
        train_distill.claim_folder(tmp_path / "emb", other)


def test_bad_input_is_one_line_and_status_1(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train_finetune.py", "--data", tmp_path, "--weights", tmp_path / "no.pt"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0 and "no.pt" in done.stderr


def test_statistics_of_embeddings():
    embeddings = torch.randn(3, 256, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    mean, variance = train_distill.statistics_of(embeddings)
    assert torch.allclose(mean, embeddings.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, embeddings.var((0, 2, 3), correction=0), atol=1e-4)


# ------------------------------------------------------------------------------------------ gradients, overfitting

def decode_disc(model, image, box):
    logits, iou = model.decode(model.image_encoder(image), box)
    return logits, iou


def test_mask_terms_reach_the_encoder_and_in_the_published_form_do_not():
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


if __name__ == "__main__":                 # the tiny run as a script of its own, for the tests that need processes
    kill_at = int(os.environ.get("KILL_AT", -1))
    sys.exit(tiny_run(sys.argv[1:], hook=lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == kill_at else None).fit())
