"""The training loop on a tiny model: resume, signals, processes, workers, full disks."""
import argparse
import csv
import errno
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from medficient_mini.training import trainer as training  # noqa: E402
from medficient_mini.inference.checkpoint import read_torch  # noqa: E402
from medficient_mini.training.samples import TrainCase  # noqa: E402
from medficient_mini.training.options import add_common_arguments, draw_slices, make_sampler, run_script, start  # noqa: E402
from medficient_mini.training.trainer import Log, Trainer  # noqa: E402

WHOLE = ["--epochs", "4", "--average", "0.9"]     # 4 epochs of 11 samples, batches of 4, 4, 3, with averaged weights


class Points(torch.utils.data.Dataset):
    """Eleven images whose sample depends on (epoch, position) as an augmented one does; items of unequal number."""

    def __getitem__(self, key):
        epoch, position, index = key
        image = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1000 * epoch + 10 * position + index))
        return {"image": image, "target": image.mean((1, 2)) * 2 + 1, "known": torch.tensor(index % 3 != 0)}

    def __len__(self):
        return 11


class Broken(Points):
    def __getitem__(self, key):
        raise ValueError("a.npz: gts: expected labels")


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing of the trainer catches it."""


def tiny_run(options, norm=True, hook=lambda step: None, dataset=Points()):
    """A Trainer on Points: convolution, batch norm, mean squared error over the known targets; every other epoch's
    validation is a bad one. `hook` is called before each update."""
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, out=Path("unset"), lr=0.05, weight_decay=0.01, batch_size=4, schedule="cosine",
                         schedules=("cosine", "plateau", "halve"), boxes=5)
    arguments = parser.parse_args(["--workers", "0", "--log-steps", "1", "--device", "cpu", "--amp", "off", *options])
    world = start(arguments)
    torch.set_num_threads(1)
    layers = [nn.Conv2d(3, 6, 3, bias=not norm), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.GELU(), nn.Conv2d(6, 3, 2)]
    model = nn.Sequential(*layers)

    def losses(batch):
        hook(trainer.state["step"])
        error = ((model(batch["image"]).flatten(1) - batch["target"]) ** 2).mean(1)
        known = batch["known"]
        return {"error": (error * known).sum() / known.sum().clamp(min=1)}

    def validate():
        return {"val_error": sum(float(p.detach().abs().sum()) for p in model.parameters()) + 100 * (trainer.state["epoch"] % 2)}

    slices = [(0, z) for z in range(11)]
    trainer = Trainer(arguments, world, network="tiny", model=model, dataset=dataset,
                      sampler=make_sampler(arguments, world, None, slices), terms={"error": 1.0},
                      count=lambda batch: {"error": int(batch["known"].sum())}, losses=losses,
                      validate=validate, criterion=("val_error", "min"))
    return trainer


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [(row["epoch"], row["step"], row["lr"], row.get("loss"), row.get("val_error")) for row in csv.DictReader(file)]


def weights_of(folder, name="last.pt"):
    return read_torch(folder / name)["model"]


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[key].double(), b[key].double(), rtol=0, atol=tolerance) for key in a)


def run_as_script(options, **env):
    """The tiny run in a process (and process group) of its own, see the end of this file."""
    return subprocess.Popen([sys.executable, __file__, *options], env=dict(os.environ, **env), stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Function: schedule -> folder of a whole run that nothing disturbed."""
    folders = {}

    def folder(schedule="cosine"):
        if schedule not in folders:
            folders[schedule] = tmp_path_factory.mktemp(schedule)
            assert tiny_run([*WHOLE, "--schedule", schedule, "--out", str(folders[schedule])]).fit() == 0
        return folders[schedule]

    return folder


def assert_same_run(a, b):
    assert log_of(a) == log_of(b) and len(log_of(a)) == 12
    assert same(weights_of(a), weights_of(b)) and same(weights_of(a, "best.pt"), weights_of(b, "best.pt"))


@pytest.mark.parametrize("schedule", ["cosine", "plateau", "halve"])
@pytest.mark.parametrize("save_minutes", ["1000", "0"])
def test_killed_and_resumed_equals_undisturbed(tmp_path, undisturbed, schedule, save_minutes):
    """Ended in the second epoch; the last checkpoint is one or more steps old, the log may be ahead of it."""
    def hook(step):
        if step == 5:
            raise Killed

    options = [*WHOLE, "--schedule", schedule, "--out", str(tmp_path), "--save-minutes", save_minutes]
    with pytest.raises(Killed):
        tiny_run(options, hook=hook).fit()
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == (5 if save_minutes == "0" else 3)
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed(schedule))
    assert len({lr for _, _, lr, _, _ in log_of(tmp_path)}) > 1
    assert (tmp_path / "curves.png").is_file()


def test_sigkill_then_resume(tmp_path, undisturbed):
    options = [*WHOLE, "--out", str(tmp_path), "--save-minutes", "0"]
    run = run_as_script(options, SIGNAL="SIGKILL", STEP="5")
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed())


def test_signal_to_all_processes_still_saves(tmp_path, undisturbed):
    """Ctrl-C and `timeout` reach the workers too: the trainer needs them to finish its step."""
    options = [*WHOLE, "--out", str(tmp_path)]
    run = run_as_script([*options, "--workers", "1"], SIGNAL="SIGTERM", STEP="4")
    _, err = run.communicate()
    assert run.returncode == 130 and "Traceback" not in err and "--resume" in err
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == 5
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed())


def test_a_worker_changes_nothing_over_the_epochs(tmp_path, undisturbed):
    assert tiny_run([*WHOLE, "--out", str(tmp_path), "--workers", "1"]).fit() == 0
    assert_same_run(tmp_path, undisturbed())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_sample_is_one_line_and_status_1(tmp_path, capsys, workers):
    run = tiny_run(["--out", str(tmp_path), "--workers", workers], dataset=Broken())
    with pytest.raises(SystemExit) as end:
        run_script(run.fit)
    assert end.value.code == 1 and capsys.readouterr().err == "a.npz: gts: expected labels\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_goes_on(tmp_path, undisturbed, capsys, number):
    options = [*WHOLE, "--out", str(tmp_path)]
    run = tiny_run(options, hook=lambda step: os.kill(os.getpid(), number) if step == 6 else None)
    assert run.fit() == 130
    assert "--resume" in capsys.readouterr().err
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == 7
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed())


def test_minutes_stop_cleanly_and_epoch_end_is_not_lost(tmp_path, undisturbed):
    options = [*WHOLE, "--out", str(tmp_path)]
    assert tiny_run([*options, "--minutes", "1e-9"]).fit() == 0
    for _ in range(20):                    # one step for each start: the stop also falls on ends of epochs
        if tiny_run([*options, "--minutes", "1e-9", "--resume"]).fit() == 0 and len(log_of(tmp_path)) == 12:
            break
    assert_same_run(tmp_path, undisturbed())


def test_two_processes_equal_one(tmp_path):
    """Same global batch, items unevenly spread over the processes, batch norm over both."""
    options = ["--epochs", "2", "--samples-per-epoch", "10", "--out"]
    assert tiny_run([*options, str(tmp_path / "one"), "--bs", "4"]).fit() == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    runs = [run_as_script([*options, str(tmp_path / "two"), "--bs", "2"], RANK=rank, WORLD_SIZE="2", MASTER_PORT=port,
                          MASTER_ADDR="localhost") for rank in "01"]           # what torchrun sets
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
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
    with pytest.raises(ValueError, match=r"step 5: loss nan.*step 3 is intact.*--weights .*last.pt, another --out.*--lr"):
        run.fit()
    saved = read_torch(tmp_path / "last.pt")
    assert saved["state"]["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_torch(*_):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")


@pytest.mark.parametrize("full", [no_space, no_space_torch])
def test_full_disk_keeps_the_checkpoint(tmp_path, undisturbed, monkeypatch, full):
    options = [*WHOLE, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        run = tiny_run(options, hook=lambda step: step == 4 and patch.setattr(training, "atomic_torch_save", full))
        with pytest.raises(ValueError, match="last.pt: could not be written.*intact") as caught:
            run.fit()
    assert "\n" not in str(caught.value) and read_torch(tmp_path / "last.pt")["state"]["step"] == 3
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed())


def test_full_disk_keeps_the_log(tmp_path, monkeypatch):
    log = Log(tmp_path, 0)
    log.write({"step": 1, "loss": 0.5})
    before = log.csv.read_text()
    monkeypatch.setattr(csv.DictWriter, "writerows", no_space)
    with pytest.raises(ValueError, match="log.csv: could not be written .No space left.*--resume"):
        log.write({"step": 2, "loss": 0.25})
    assert log.csv.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["log.csv"]


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
    (["--boxes", "0"], "--boxes: expected at least 1"),
    (["--box-shift", "-1"], "--box-shift: expected at least 0"),
    (["--box-jitter", "0.5"], "--box-jitter: expected at least 0 and below 0.5"),
    (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, found gpu"),
    (["--device", "cuda:99"], "--device"),
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


if __name__ == "__main__":                 # the tiny run as a script of its own, for the tests that need processes
    def hook(step):
        if step == int(os.environ.get("STEP", -1)):
            os.killpg(0, signal.Signals[os.environ["SIGNAL"]])

    run_script(tiny_run(sys.argv[1:], hook=hook).fit)
