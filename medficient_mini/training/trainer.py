"""The loop that both training scripts share: updates, validation, log, checkpoints, resuming.

What is trained is the script's: a task, that is a small torch module with

    model, network     the module that learns, whose state dict the checkpoint holds, and its name in NETWORKS
    frozen             modules of the model that stay in evaluation mode
    weights            {term of the loss: its weight}
    count(batch)       {term: number of items of the batch over which the term is a mean}
    loss(batch)        {term: that mean}, left out where there is no item; also the forward pass
    validation         its data set
    validate(model)    {score: number} for the model or a moving average of it
    criterion          name of the score that decides, and 1 if higher is better, else -1
    extra              {name: tensor} that the checkpoints also hold
"""
import csv
import math
import signal
import sys
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ..files import first_line, whole_file
from ..inference.checkpoint import read_torch
from ..show.draw import curves
from ..show.progress import ProgressBar
from .cases import balance_weights
from .optim import AdamW, learning_rate, moving_average
from .samples import epoch_keys, make_loader

# All other options stay.
MAY_CHANGE_ON_RESUME = ("resume out minutes steps epochs workers threads save_minutes log_steps device amp cache "
                        "cache_mb val_limit").split()
DIVERGED = "training diverged; start again with another --out and a lower --lr or a --warmup"


class Trainer:
    """One run: a task (above) learns from a SliceDataset. ValueError for options or a checkpoint that do not fit."""

    def __init__(self, arguments, world, task, dataset):
        self.arguments, self.world, self.task, count = arguments, world, task, len(dataset)
        power = arguments.balance
        self.weights = None if power is None else balance_weights(dataset.slices, power)
        self.epoch_samples = (arguments.samples_per_epoch or count) // world.size * world.size
        self.batch = arguments.bs * arguments.accumulate * world.size          # samples of one update
        if self.batch > min(count, self.epoch_samples):
            raise ValueError(f"--bs: expected at most the {count} slices and the {self.epoch_samples} samples of an "
                             f"epoch, found {self.batch} samples in an update")
        self.steps = arguments.steps or arguments.epochs * math.ceil(self.epoch_samples / self.batch)
        if arguments.warmup and (arguments.schedule != "cosine" or arguments.warmup >= self.steps):
            raise ValueError(f"--warmup: expected --schedule cosine and fewer than the {self.steps} updates, found "
                             f"{arguments.schedule} and {arguments.warmup}")
        self.keys = []                                   # of this epoch's samples, filled anew at the start of each
        self.loader = make_loader(dataset, self.keys, arguments.bs, arguments.workers, world.device.type == "cuda")
        # Not every parameter has a gradient each time: a prompt encoder without points, a batch without masks.
        self.loss = DistributedDataParallel(task, find_unused_parameters=True) if world.size > 1 else task
        matrices = {"params": [p for p in task.model.parameters() if p.ndim > 1]}
        others = {"params": [p for p in task.model.parameters() if p.ndim < 2],
                  "weight_decay": 0.0 if arguments.decay_matrices_only else arguments.weight_decay}
        self.optimizer = AdamW([matrices, others], weight_decay=arguments.weight_decay)
        self.ema = moving_average(task.model, arguments.ema) if arguments.ema else None
        self.result = self.ema.module if self.ema else task.model              # what is validated and written
        # `scores` are those that decide, of each epoch, higher being better; `rows` and `updates` are log.csv's.
        self.state = SimpleNamespace(epoch=0, position=0, step=0, seconds=0.0, scores=[], rows=[], updates={})
        self.folder, self.stop_signal = Path(arguments.out), None
        self.run = vars(arguments) | {"network": task.network, "slices": count}         # what a resumed run must share
        say(f"{task.network}: {self.steps} updates of {self.batch} samples; {count} training slices, "
            f"{len(task.validation)} validation slices")
        if arguments.resume:
            self._load()

    def fit(self):
        """Train to the end, or until stopped: exit status 0, or 130 after Ctrl-C. ValueError for a loss not finite."""
        self.begin = self.saved_at = time.monotonic()
        handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        state, reason = self.state, None
        try:
            while not reason and (state.step < self.steps or state.position):
                reason = self._epoch()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if reason:
            self.save()
            say(f"{reason}: step {state.step} of {self.steps} is saved in {self.folder / 'last.pt'}; the same command "
                "with --resume goes on")
        else:
            say(f"finished after {state.step} steps; weights in {self.folder}: best.pt, last.pt")
        self.world.sum({})                                                     # an early end breaks the others' calls
        return 130 if self.stop_signal else 0

    def on_signal(self, number, _):
        """Ask for an end after the present step; the second time, end at once."""
        if self.stop_signal:
            raise KeyboardInterrupt
        self.stop_signal = signal.Signals(number).name
        say(f"{self.stop_signal}: will stop after this step, saved (again: stop at once)")

    def _epoch(self):
        """Do the updates that are left of this epoch, then validate; or return a reason to stop before that."""
        state, arguments, world = self.state, self.arguments, self.world
        keys = epoch_keys(len(self.loader.dataset), arguments.seed, state.epoch, self.epoch_samples, self.weights)
        self.keys[:] = keys[state.position + world.rank::world.size]           # batches of all are those of one process
        left = min(math.ceil((self.epoch_samples - state.position) / self.batch), self.steps - state.step)
        self.task.model.train()
        for module in self.task.frozen:
            module.eval()
        batches, bar = iter(self.loader), ProgressBar(range(left), left, f"epoch {state.epoch + 1}")
        for k in bar:
            began = time.monotonic()
            group = [world.to_device(batch) for batch in islice(batches, arguments.accumulate)]
            waited = time.monotonic() - began
            values = self.update(group)
            seconds = time.monotonic() - began
            samples = min(self.batch, self.epoch_samples - state.position)
            for name, value in {**values, "samples_per_second": samples / seconds, "waiting": waited / seconds}.items():
                state.updates.setdefault(name, []).append(value)
            state.step += 1
            state.position += samples
            state.seconds += seconds
            bar.set(f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {samples / seconds:.2f} samples/s  "
                    f"update {state.step} of {self.steps}")
            if state.step % arguments.log_steps == 0 and k + 1 < left:
                self._log({})
            if reason := self._reason_to_stop():
                return reason
            if time.monotonic() - self.saved_at > arguments.save_minutes * 60:
                self.save()
        self._end_epoch()

    def update(self, group):
        """Update the weights once, on a group of batches weighted by their items so that their union alone matters."""
        task, world, state = self.task, self.world, self.state
        counts = [task.count(batch) for batch in group]
        totals = world.sum({term: sum(count[term] for count in counts) for term in task.weights})
        values = dict.fromkeys(task.weights, 0.0)
        self.optimizer.zero_grad()
        for batch, count in zip(group, counts):
            with world.autocast():
                means = self.loss(batch)
            loss = 0.0
            for term, mean in means.items():
                share = mean * (count[term] / max(totals[term], 1.0))
                loss += task.weights[term] * share
                values[term] += share.item()
            (loss * world.size).backward()                                     # processes' gradients are averaged
        norm = clip_grad_norm_(task.model.parameters(), self.arguments.clip).item()
        values = world.sum(values)
        loss = sum(task.weights[term] * value for term, value in values.items())
        lr = learning_rate(self.arguments, state.step, self.steps, state.scores)
        if not math.isfinite(loss + norm):
            raise ValueError(f"step {state.step + 1}: loss {loss}, gradient norm {norm} at learning rate {lr:.3g}: "
                             + DIVERGED)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.step()
        if self.ema:
            self.ema.update_parameters(task.model)
        values = {term: value for term, value in values.items() if totals[term]}          # no item, no value
        return {"lr": lr, "loss": loss, **values, "grad_norm": norm}

    def _reason_to_stop(self):
        """A signal or the time; in all processes where one of them has a reason, else None."""
        reason, minutes = self.stop_signal, self.arguments.minutes
        if not reason and time.monotonic() - self.begin > minutes * 60:
            reason = f"{minutes:g} minutes are over"
        if self.world.sum({"stop": bool(reason)})["stop"]:
            return reason or "stopped elsewhere"

    def _end_epoch(self):
        """Validate, log, save last and best."""
        state, (name, sign) = self.state, self.task.criterion
        began = time.monotonic()
        with torch.no_grad(), self.world.autocast():
            scores = self.task.validate(self.result.eval())
        state.seconds += time.monotonic() - began
        if not all(map(math.isfinite, scores.values())):         # batch norm's statistics may hide it from the loss
            raise ValueError(f"step {state.step}: the scores of validation are {scores}: {DIVERGED}")
        is_best = all(sign * scores[name] > other for other in state.scores)
        state.scores.append(sign * scores[name])
        state.epoch, state.position = state.epoch + 1, 0
        self._log(scores)
        say(f"epoch {state.epoch}, step {state.step}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        if is_best:
            self.save("best.pt")
        self.save()

    def _log(self, scores):
        """Add a row to log.csv: the means of the updates since the last row, and an epoch's scores; then also draw."""
        state = self.state
        row = {"epoch": state.epoch, "step": state.step, "minutes": state.seconds / 60}
        row |= {name: fmean(values) for name, values in state.updates.items()} | scores
        state.rows.append({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        state.updates = {}
        if not self.world.first:
            return
        # Written whole each time: columns may be new, and a killed run leaves no half row.
        with writing(self.folder / "log.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in state.rows for key in row))
            writer.writeheader()
            writer.writerows(state.rows)
        columns = {key: [float(row.get(key, "nan")) for row in state.rows] for key in list(row)[3:]
                   if not key.startswith("dsc_")}
        try:
            if scores:
                curves(columns, [row["step"] for row in state.rows], self.folder / "curves.png")
        except OSError as error:                         # a picture that cannot be written costs a line, not the run
            say(f"{self.folder / 'curves.png'}: could not be written ({first_line(error)})")

    def save(self, name="last.pt"):
        """Write last.pt, with all that --resume needs, or best.pt, the weights alone."""
        content = {"network": self.task.network, "model": self.result.state_dict(), "run": self.run,
                   "state": vars(self.state), "extra": self.task.extra}
        if name == "last.pt":
            content |= {"raw": self.task.model.state_dict(), "ema": self.ema.state_dict() if self.ema else {},
                        "optimizer": self.optimizer.state_dict()}
        if self.world.first:
            with writing(self.folder / name) as temporary:
                torch.save(content, temporary)
        self.saved_at = time.monotonic()

    def _load(self):
        saved = read_last(self.folder)
        for key, value in saved["run"].items():
            if key not in MAY_CHANGE_ON_RESUME and self.run.get(key, value) != value:      # or an option is gone
                raise ValueError(f"{self.folder / 'last.pt'}: --resume: {key.replace('_', '-')}: expected {value} as "
                                 f"at the first start, found {self.run[key]}")
        self.task.model.load_state_dict(saved["raw"])
        if self.ema:
            self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        vars(self.state).update(saved["state"])
        say(f"resuming at step {self.state.step} of {self.steps}")


@contextmanager
def writing(path):
    """Do as `whole_file` and turn its failure into one line, a ValueError, that names the file and the way on."""
    try:
        with whole_file(path) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:                                   # torch's word for a full disk
        raise ValueError(f"{path}: could not be written ({first_line(error)}); the one before is intact. Make room, "
                         "then the same command goes on, a run that has trained with --resume") from None


def read_last(folder):
    """Read last.pt of a run's folder. ValueError for a file that --resume cannot use."""
    path = Path(folder, "last.pt")
    saved = read_torch(path)
    if not isinstance(saved, dict) or not {"run", "optimizer", "raw"} <= set(saved):
        raise ValueError(f"{path}: --resume: expected a checkpoint that this script wrote, found another file")
    return saved


def say(text):
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)
