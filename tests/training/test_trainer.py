"""The training loop on a tiny model: resume, signals, processes, workers, full disks."""
import csv
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medficient_mini.inference.checkpoint import read_torch
from medficient_mini.training import trainer as training
from medficient_mini.training.distributed import Distributed
from medficient_mini.training.options import common_parser, run_script, start
from medficient_mini.training.trainer import Trainer, read_last

ROOT = str(Path(__file__).resolve().parents[2])
WHOLE = ["--epochs", "3", "--ema", "0.9"]         # 3 epochs of 11 samples, batches of 4, 4, 3, with averaged weights


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


class Tiny(nn.Module):
    """Convolution, batch norm, mean squared error over the known targets; the second validation is a bad one."""
    network, frozen, weights, criterion, extra, validation = "tiny", (), {"error": 1.0}, ("val_error", -1), {}, ()

    def __init__(self, norm=True, hook=lambda update: None):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.GELU(),
                                   nn.Conv2d(6, 3, 2))
        self.hook, self.updates, self.validations = hook, 0, 0

    def count(self, batch):
        return {"error": int(batch["known"].sum())}

    def loss(self, batch):
        self.hook(self.updates)
        self.updates += 1
        error = ((self.model(batch["image"]).flatten(1) - batch["target"]) ** 2).mean(1)
        known = batch["known"]
        return {"error": (error * known).sum() / known.sum().clamp(min=1)}

    forward = loss

    def validate(self, model):
        self.validations += 1
        return {"val_error": float(sum(p.abs().sum() for p in model.parameters())) + 100 * (self.validations == 2)}


def tiny_arguments(options):
    parser = common_parser("", out="unset", lr=0.05, weight_decay=0.01, bs=4, schedule="cosine", boxes=5)
    return parser.parse_args(["--workers", "0", "--log-steps", "1", "--device", "cpu", "--amp", "off", "--threads", "1",
                              *options])


def tiny_run(options, dataset=Points(), world=None, **task):
    """A Trainer of Tiny on Points; `hook` is called with the number of updates done in this start before each."""
    arguments = tiny_arguments(options)
    run = Trainer(arguments, world or start(arguments), Tiny(**task), dataset)
    run.task.validations = run.state.epoch
    return run


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [(row["epoch"], row["step"], row["lr"], row["loss"], row.get("val_error")) for row in csv.DictReader(file)]


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[key].double(), b[key].double(), rtol=0, atol=tolerance) for key in a)


def weights_of(folder, name="last.pt"):
    return read_torch(folder / name)["model"]


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
    assert log_of(a) == log_of(b) and len(log_of(a)) == 9
    assert same(weights_of(a), weights_of(b)) and same(weights_of(a, "best.pt"), weights_of(b, "best.pt"))


@pytest.mark.parametrize("schedule, save_minutes", [("cosine", "0"), ("plateau", "1000"), ("halve", "0")])
def test_killed_and_resumed_equals_undisturbed(tmp_path, undisturbed, schedule, save_minutes):
    """Ended in the second epoch; the last checkpoint is one or more steps old, the log may be ahead of it."""
    def hook(update):
        if update == 5:
            raise Killed

    options = [*WHOLE, "--schedule", schedule, "--out", str(tmp_path), "--save-minutes", save_minutes]
    with pytest.raises(Killed):
        tiny_run(options, hook=hook).fit()
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == (5 if save_minutes == "0" else 3)
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed(schedule))
    assert len({row[2] for row in log_of(tmp_path)}) > 1 and (tmp_path / "curves.png").is_file()


def run_as_script(options, **env):
    """The tiny run in a process (and process group) of its own, see the end of this file."""
    return subprocess.Popen([sys.executable, __file__, *options], env=dict(os.environ, PYTHONPATH=ROOT, **env), stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def test_ctrl_c_to_all_processes_saves_and_resume_goes_on(tmp_path, undisturbed):
    """Ctrl-C and `timeout` reach the reading process too: the trainer needs it to finish its step."""
    options = [*WHOLE, "--out", str(tmp_path)]
    run = run_as_script([*options, "--workers", "1"], SIGNAL="SIGINT")
    _, err = run.communicate()
    assert run.returncode == 130 and "Traceback" not in err and "--resume" in err
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == 5
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed())


def test_two_processes_equal_one(tmp_path):
    """Same global batch, items unevenly spread over the processes; before that the first one fails (fault 19)."""
    options = ["--epochs", "2", "--samples-per-epoch", "10", "--out"]
    assert tiny_run([*options, str(tmp_path / "one"), "--bs", "4"], norm=False).fit() == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    odd = ["--samples-per-epoch", "11"]                                        # of which both compute equally many
    runs = [run_as_script([*options, str(tmp_path / "two"), "--bs", "2", *odd], RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                          MASTER_PORT=port, MASTER_ADDR="localhost") for rank in "01"]      # what torchrun sets
    errors = [run.communicate(timeout=100)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert errors[0].startswith("the disk is full") and errors[1].startswith("stopped: the first process failed")
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 6
    assert np.allclose([float(row[3]) for row in one], [float(row[3]) for row in two], rtol=1e-5)
    assert same(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"), 1e-5)


def test_variables_of_another_launcher_are_not_believed(monkeypatch, capsys):     # fault 11
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    world = Distributed("cpu")
    assert (world.rank, world.size, world.first) == (0, 1, True)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "WORLD_SIZE" in line and "LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in line


@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_sample_is_one_line_and_status_1(tmp_path, capsys, workers):
    options = ["--out", str(tmp_path), "--workers", workers]
    status = run_script(lambda arguments, world: tiny_run(options, Broken(), world).fit(), tiny_arguments(options))
    _, *lines = capsys.readouterr().err.splitlines()                           # behind what is trained on
    assert status == 1 and lines == ["a.npz: gts: expected labels"]


def test_signal_saves_and_the_second_one_ends_at_once(tmp_path, undisturbed, capsys):
    options = [*WHOLE, "--out", str(tmp_path)]
    run = tiny_run(options, hook=lambda update: os.kill(os.getpid(), signal.SIGTERM) if update == 4 else None)
    assert run.fit() == 130 and "--resume" in capsys.readouterr().err
    assert read_torch(tmp_path / "last.pt")["state"]["step"] == 5

    def twice(update):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_run([*options, "--resume"], hook=twice).fit()
    assert tiny_run([*options, "--resume"]).fit() == 0
    assert_same_run(tmp_path, undisturbed())


def test_minutes_stop_cleanly_and_epoch_end_is_not_lost(tmp_path, undisturbed):
    options = [*WHOLE, "--out", str(tmp_path), "--minutes", "1e-9"]
    assert tiny_run(options).fit() == 0
    for _ in range(20):                    # one step for each start: the stop also falls on ends of epochs
        if tiny_run([*options, "--resume"]).fit() == 0 and len(log_of(tmp_path)) == 9:
            break
    assert_same_run(tmp_path, undisturbed())


def test_accumulated_batches_equal_one_large(tmp_path):
    for name, extra in (("large", ["--bs", "4"]), ("small", ["--bs", "2", "--accumulate", "2"])):
        assert tiny_run(["--epochs", "2", "--out", str(tmp_path / name), *extra], norm=False).fit() == 0
    assert same(weights_of(tmp_path / "large"), weights_of(tmp_path / "small"), 1e-6)


def test_loss_falls_and_average_is_what_the_checkpoint_shows(tmp_path):
    run = tiny_run(["--epochs", "20", "--out", str(tmp_path), "--average", "0.99"])
    assert run.fit() == 0
    losses = [float(row[3]) for row in log_of(tmp_path)]
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:3])
    saved = read_torch(tmp_path / "last.pt")
    assert same(saved["raw"], run.task.model.state_dict()) and same(saved["model"], run.ema.module.state_dict())
    assert not same(saved["raw"], saved["model"])


def test_diverged_loss_stops_and_keeps_the_checkpoint(tmp_path):
    def hook(update):
        if update == 4:
            run.task.model[0].weight.data.fill_(math.nan)

    run = tiny_run(["--out", str(tmp_path)], hook=hook)
    with pytest.raises(ValueError, match=r"step 5: loss nan.*another --out and a lower --lr"):
        run.fit()
    saved = read_torch(tmp_path / "last.pt")
    assert saved["state"]["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())


def test_a_validation_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "validate", lambda self, model: {"val_error": math.nan})
    with pytest.raises(ValueError, match=r"step 3: the scores of validation are .'val_error': nan.: .*a lower --lr"):
        tiny_run(["--out", str(tmp_path)]).fit()
    assert not (tmp_path / "best.pt").exists()


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_torch(*_):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")


def no_reason(*_):
    raise OSError                                                              # fault 39: an error without a text


@pytest.mark.parametrize("full", [no_space, no_space_torch, no_reason])
def test_full_disk_keeps_the_checkpoint(tmp_path, monkeypatch, full):
    options = [*WHOLE, "--out", str(tmp_path)]
    run = tiny_run(options, hook=lambda update: update == 4 and monkeypatch.setattr(torch, "save", full))
    with pytest.raises(ValueError, match="last.pt: could not be written.*intact") as caught:
        run.fit()
    assert "\n" not in str(caught.value) and read_torch(tmp_path / "last.pt")["state"]["step"] == 3


def test_full_disk_keeps_the_log_and_a_picture_costs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "curves", no_space)
    assert tiny_run(["--out", str(tmp_path), "--epochs", "1"]).fit() == 0
    assert "curves.png: could not be written" in capsys.readouterr().err
    before = log_of(tmp_path)
    monkeypatch.setattr(csv.DictWriter, "writerows", no_space)
    with pytest.raises(ValueError, match="log.csv: could not be written .*No space left.*--resume"):
        tiny_run(["--out", str(tmp_path), "--epochs", "2", "--resume"]).fit()
    assert log_of(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_resume_refuses_other_options_and_other_networks(tmp_path):
    options = ["--out", str(tmp_path), "--epochs", "1"]
    assert tiny_run(options).fit() == 0
    for change, words in ((["--lr", "0.1"], "lr: expected 0.05 as at the first start, found 0.1"),
                          (["--average", "0.9"], "ema: expected None as at the first start, found 0.9")):
        with pytest.raises(ValueError, match=words):
            tiny_run([*options, "--resume", *change])
    with pytest.raises(ValueError, match="earlier run"):
        tiny_run(options)
    saved = read_torch(tmp_path / "last.pt")
    saved["run"]["network"] = "medficientsam_l2"
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="network: expected medficientsam_l2 as at the first start, found tiny"):
        tiny_run([*options, "--resume"])
    (tmp_path / "last.pt").write_bytes(b"")                                    # fault 39, where a checkpoint is read
    with pytest.raises(ValueError, match="last.pt"):
        tiny_run([*options, "--resume"])


@pytest.mark.parametrize("options, words", [
    (["--bs", "12"], "--bs: expected at most the 11 slices"),
    (["--bs", "0"], "--bs: expected at least 1"),
    (["--threads", "-1"], "--threads: expected at least 1"),
    (["--seed", "-3"], "--seed: expected at least 0"),
    (["--clip", "0"], "--clip: expected at least 0.001"),                      # it would train nothing
    (["--warmup", "5", "--schedule", "halve"], "--warmup: expected --schedule cosine .* found halve and 5"),
    (["--average", "1.5"], "--ema: expected 0.001 to 1, found 1.5"),
    (["--resume"], "no such checkpoint"),
    (["--box-shift", "-1"], "--box-shift: expected at least 0"),
    (["--box-jitter", "0.5"], "--box-jitter: expected 0 to 0.499"),
    (["--device", "gpu"], "--device: expected auto, cpu.*, found gpu"),
    (["--device", "cuda:99"], "--device: expected auto, cpu.*, found cuda:99"),
    (["--epochs", "1", "--warmup", "3"], "--warmup: expected .* fewer than the 3 updates, found cosine and 3"),
])
def test_bad_options(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        tiny_run(["--out", str(tmp_path), *options])


def test_a_file_of_options_reads_like_a_shell(tmp_path):
    (tmp_path / "a.args").write_text('--bs 6 --data "my cases"   # the batch\n--ema 0.99\n')
    arguments = tiny_arguments([f"@{tmp_path / 'a.args'}", "--bs", "3", "-o", "runs/b"])
    assert (arguments.bs, arguments.data, arguments.ema, arguments.out) == (3, "my cases", 0.99, "runs/b")


if __name__ == "__main__":                 # the tiny run as a script of its own, for the tests that need processes
    def hook(update):
        if update == 4 and "SIGNAL" in os.environ:
            os.killpg(0, signal.Signals[os.environ["SIGNAL"]])
            time.sleep(0.2)

    def train(arguments, world):
        try:
            with world.first_goes_ahead():
                if world.size > 1:
                    raise ValueError("the disk is full")
        except ValueError as error:
            print(error, file=sys.__stderr__)
        return tiny_run(sys.argv[1:], world=world, hook=hook, norm=world.size == 1).fit()

    sys.exit(run_script(train, tiny_arguments(sys.argv[1:])))


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2]])
def test_resuming_from_another_file_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt: --resume: expected a checkpoint that this script wrote, found another file"):
        read_last(tmp_path)
