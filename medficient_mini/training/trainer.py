"""The loop both training scripts share: updates, validation, log, checkpoints, resume.

A script brings a model, a data set and three functions: `count(batch)`, how many items each term of the loss averages
over; `losses(batch)`, those averages; `validate()`, the scores after an epoch. Everything else about a run is here.
"""
import csv
import itertools
import math
import platform
import shlex
import signal
import sys
import time
from contextlib import nullcontext

import cv2
import numpy as np
import torch

from ..inference.checkpoint import atomic_torch_save, read_torch
from .samples import make_loader
from ..show.draw import curves
from ..files import whole_file
from .optim import AdamW, Average, CosineAnnealing, HalveEachEpoch, ReduceLROnPlateau, clip_grad_norm
from ..show.progress import progress

# What may differ between a run and its continuation; every other option must stay. Not all of these leave the numbers
# alone: with other --steps or --epochs a cosine ends elsewhere, so that the learning rate jumps; --device and --amp
# round differently; --val-limit makes scores before and after incomparable.
FREE = {"resume", "out", "minutes", "steps", "epochs", "workers", "threads", "save_minutes", "log_steps", "device",
        "amp", "cache", "cache_mb", "val_limit", "strict"}


class Stop(Exception):
    """The user or the clock asked for an end; everything is saved."""


class Trainer:
    """One training run.

    network: name in NETWORKS; model: module whose state dict goes into the checkpoint under "model"; sampler, dataset:
    of the training samples; terms: {name: weight} of the loss; count(batch) -> {name: int}; losses(batch) -> {name:
    mean over those items, a tensor}; validate() -> {score: float}, `criterion` = (name of the deciding score, "min" or
    "max"); frozen: modules that stay in evaluation mode; extra: {name: tensor or number} that the checkpoint also holds
    (`read_last(out)["extra"]` gives it back).
    """

    def __init__(self, arguments, world, *, network, model, dataset, sampler, terms, count, losses, validate,
                 criterion, frozen=(), extra=None):
        self.arguments, self.world, self.network, self.model = arguments, world, network, model
        self.sampler, self.terms, self.count, self.losses = sampler, terms, count, losses
        self.validate, self.criterion, self.frozen, self.extra = validate, criterion, list(frozen), extra or {}
        world.same_start(model)
        pin = world.device.type == "cuda"
        self.loader = make_loader(dataset, sampler, arguments.bs, arguments.workers, pin)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = AdamW(self._groups(), lr=arguments.lr, weight_decay=arguments.weight_decay)
        self.batch = arguments.bs * arguments.accumulate * world.size          # samples of one update
        sampler.set_position(0, 0)
        self.epoch_samples = len(sampler) * world.size
        self.steps = arguments.steps or arguments.epochs * math.ceil(self.epoch_samples / self.batch)
        self.schedule = self._schedule()
        self.average = Average(model, arguments.average) if arguments.average else None
        self.state = dict(epoch=0, position=0, step=0, seconds=0.0, rows=0, best=None, running={})
        self.saved_step = None
        self.asked = None                                                      # name of the signal that asked to stop
        if arguments.resume:
            self._load()
        arguments.out.mkdir(parents=True, exist_ok=True)
        self.log = Log(arguments.out, self.state["rows"]) if world.first else None

    def _groups(self):
        if not self.arguments.decay_matrices_only:
            return [{"params": self.params}]
        return [{"params": [p for p in self.params if p.ndim > 1]},
                {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0}]

    def _schedule(self):
        if self.arguments.schedule == "cosine":
            return CosineAnnealing(self.optimizer, self.steps, warmup=self.arguments.warmup)
        if self.arguments.schedule == "halve":
            return HalveEachEpoch(self.optimizer)
        return ReduceLROnPlateau(self.optimizer, self.criterion[1], factor=0.5, patience=0)

    # ---- running

    def fit(self):
        """Train to the end, or until stopped: exit status 0, or 130 after Ctrl-C. ValueError for a loss not finite."""
        self.begin = self.saved_at = time.monotonic()
        handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        state = self.state
        try:
            while state["step"] < self.steps or state["position"]:             # position: an epoch is not closed yet
                self._epoch()
                self._end_epoch()
        except Stop as stop:
            self.save()
            self.say(f"{stop}: step {state['step']} of {self.steps} is saved in {self.arguments.out / 'last.pt'}; "
                     "the same command with --resume goes on")
            self.world.wait()
            return 130 if self.asked else 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.world.wait()                                                      # leave together: an early end breaks the others' calls
        self.say(f"finished after {state['step']} steps; weights in {self.arguments.out}: best.pt, last.pt")
        return 0

    def _ask(self, number, _):
        if self.asked:                                                         # asked twice: at once
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        self.say(f"{self.asked}: will stop after this step, saved (again: stop at once)")

    def say(self, text):
        if self.world.first:
            print(text, file=sys.stderr, flush=True)

    def _epoch(self):
        """The updates that are left of this epoch. Raises Stop."""
        state, grouped = self.state, self.arguments.accumulate
        self.sampler.set_position(state["epoch"], state["position"])
        left = min(math.ceil(len(self.sampler) / (self.arguments.bs * grouped)), self.steps - state["step"])
        if left <= 0:
            return
        self.model.train()
        for module in self.frozen:
            module.eval()
        batches = iter(self.loader)
        bar = range(left)
        if self.world.first:
            bar = progress(bar, left, f"epoch {state['epoch'] + 1}")
        for k in bar:
            began = time.monotonic()
            group = [self.world.to_device(batch) for batch in itertools.islice(batches, grouped)]
            self._add(waiting=time.monotonic() - began)
            self._update(group)
            self._add(seconds=time.monotonic() - began)
            state["seconds"] += time.monotonic() - began
            if self.world.first:
                bar.set(self._summary())
            self._after_update(last=k + 1 == left)

    def _update(self, group):
        """One optimiser step on a group of batches, weighted by their items so that only their union matters."""
        counts = [self.count(batch) for batch in group]
        totals = self.world.sum({name: sum(count[name] for count in counts) for name in self.terms})
        self.optimizer.zero_grad(set_to_none=True)
        values = dict.fromkeys(self.terms, 0.0)
        for batch, count in zip(group, counts):
            with self.world.autocast():
                means = self.losses(batch)
            shares = {name: means[name] * (count[name] / max(totals[name], 1.0)) for name in self.terms}
            sum(self.terms[name] * share for name, share in shares.items()).backward()
            for name, share in shares.items():
                values[name] += float(share.detach())
        self.world.sum_gradients(self.params)
        norm = float(clip_grad_norm(self.params, self.arguments.clip))
        values = self.world.sum(values)
        loss = sum(self.terms[name] * value for name, value in values.items())
        self.lr = self.optimizer.param_groups[0]["lr"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            last = self.arguments.out / "last.pt"
            way_out = "no checkpoint had been written yet; start again with a lower --lr or a --warmup"
            if self.saved_step is not None:                                    # --resume would refuse another --lr
                option = "--init" if "init" in self.arguments else "--weights"
                way_out = (f"the checkpoint of step {self.saved_step} is intact; start from it with {option} {last}, "
                           "another --out and a lower --lr or a --warmup")
            raise ValueError(f"step {self.state['step'] + 1}: loss {loss}, gradient norm {norm}: training diverged at "
                             f"learning rate {self.lr:.3g}; {way_out}")
        self.optimizer.step()
        if self.arguments.schedule == "cosine":
            self.schedule.step()
        if self.average:
            self.average.update(self.model)
        self._add(steps=1, loss=loss, grad_norm=norm, samples=sum(len(b["image"]) for b in group) * self.world.size)
        for name in self.terms:
            if totals[name]:                                                   # no item, no value
                self._add(**{f"{name}_sum": values[name], f"{name}_steps": 1})

    def _add(self, **values):
        running = self.state["running"]                                        # sums since the last row of the log
        for name, value in values.items():
            running[name] = running.get(name, 0) + value

    def _summary(self):
        running, state = self.state["running"], self.state
        minutes = state["seconds"] / max(state["step"], 1) * (self.steps - state["step"]) / 60
        return (f"loss {running['loss'] / running['steps']:.4f}  lr {self.lr:.2e}  "
                f"{running['samples'] / running['seconds']:.2f} samples/s  run: {minutes:.0f} min left")

    def _after_update(self, last):
        """Count the update; log, save or stop when due. All processes decide alike."""
        state = self.state
        state["step"] += 1
        state["position"] = min(state["position"] + self.batch, self.epoch_samples)
        now = time.monotonic()
        due = self.world.sum({"asked": self.asked is not None,
                              "late": bool(self.arguments.minutes) and now - self.begin > self.arguments.minutes * 60,
                              "save": now - self.saved_at > self.arguments.save_minutes * 60})
        if state["step"] % self.arguments.log_steps == 0 and not last:
            self._row({})
        if due["asked"] or due["late"]:
            raise Stop(self.asked or ("stopped elsewhere" if due["asked"] else f"{self.arguments.minutes:g} minutes are over"))
        if due["save"]:
            self.save()

    def _end_epoch(self):
        """Validate, advance the schedule, log, draw, save last and best."""
        state = self.state
        if time.monotonic() - self.saved_at > 60:                              # a run killed in validation repeats only that
            self.save()
        began = time.monotonic()
        self.model.eval()
        with torch.no_grad(), self.world.autocast(), self._averaged():
            scores = self.validate()
        state["seconds"] += time.monotonic() - began
        name, better = self.criterion
        if self.arguments.schedule == "plateau":
            self.schedule.step(scores[name])
        elif self.arguments.schedule == "halve":
            self.schedule.step()
        state["epoch"], state["position"] = state["epoch"] + 1, 0
        self._row(scores)
        self.say(f"epoch {state['epoch']}, step {state['step']}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        best, score = state["best"], scores[name]
        if math.isfinite(score) and (best is None or (score < best if better == "min" else score > best)):
            state["best"] = score
            self.save("best.pt")
        self.save()
        if self.world.first:
            self.log.draw(["loss", *self.terms, "lr", *(key for key in scores if not key.startswith("dsc_"))])

    def _averaged(self):
        return self.average.applied(self.model) if self.average else nullcontext()

    def _row(self, scores):
        """A row of log.csv: means since the last row."""
        state, running = self.state, self.state["running"]
        if self.world.first:
            row = {"epoch": state["epoch"], "step": state["step"], "minutes": state["seconds"] / 60, "lr": self.lr}
            if running.get("steps"):
                row["loss"] = running["loss"] / running["steps"]
                row |= {name: running[f"{name}_sum"] / running[f"{name}_steps"] for name in self.terms
                        if running.get(f"{name}_steps")}
                row |= {"grad_norm": running["grad_norm"] / running["steps"],
                        "samples_per_second": running["samples"] / running["seconds"],
                        "waiting": running["waiting"] / running["seconds"]}
            self.log.write(row | scores)
        state["running"] = {}
        state["rows"] += 1

    # ---- checkpoints

    def save(self, name="last.pt"):
        """last.pt: all that --resume needs; best.pt: the weights alone. Nothing is written where writing fails."""
        own = self.model.state_dict()
        content = {"network": self.network, "model": self.average.weights if self.average else own,
                   "arguments": plain(vars(self.arguments)), "command": shlex.join(sys.argv), "versions": versions(),
                   "state": dict(self.state, running=dict(self.state["running"])), "extra": self.extra}
        if name == "last.pt":
            content |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                        "slices": self.sampler.n, "lr": self.lr, "torch_random": torch.get_rng_state()}
            if self.average:
                content |= {"raw": own, "average_updates": self.average.updates}
        if self.world.first:
            try:
                atomic_torch_save(content, self.arguments.out / name)
            except (OSError, RuntimeError) as error:                           # torch reports a full disk as RuntimeError
                raise ValueError(f"{self.arguments.out / name}: could not be written ({str(error).splitlines()[0]}); "
                                 "the one before is intact") from None
        self.saved_at, self.saved_step = time.monotonic(), self.state["step"]

    def _load(self):
        path, saved = self.arguments.out / "last.pt", read_last(self.arguments.out)
        if saved["network"] != self.network:
            raise ValueError(f"{path}: --resume: holds {saved['network']}, this run trains {self.network}")
        now = plain(vars(self.arguments))
        changed = [key for key, value in saved["arguments"].items() if key not in FREE and now.get(key) != value]
        if changed:
            key = changed[0]
            raise ValueError(f"{path}: --resume: --{key.replace('_', '-')} was {saved['arguments'][key]}, now "
                             f"{now.get(key)}; expected the options of the first start")
        if saved["slices"] != self.sampler.n:
            raise ValueError(f"{path}: --resume: the run has {saved['slices']} training slices, found {self.sampler.n}")
        self.model.load_state_dict(saved["raw"] if self.average else saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.average:
            self.average.load_state_dict({"updates": saved["average_updates"], "weights": saved["model"]})
        torch.set_rng_state(saved["torch_random"])
        self.state, self.lr, self.saved_step = saved["state"], saved["lr"], saved["state"]["step"]
        self.say(f"resuming at step {self.state['step']} of {self.steps}")


def read_last(out):
    """Content of the last.pt in the folder of a run (Path). ValueError for a file without what --resume needs."""
    saved = read_torch(out / "last.pt")
    if not isinstance(saved, dict) or "optimizer" not in saved:
        raise ValueError(f"{out / 'last.pt'}: --resume: expected a checkpoint of this script with its optimiser")
    return saved


class Log:
    """log.csv and curves.png of a run; `rows` rows of an earlier start are kept."""

    def __init__(self, folder, rows):
        self.csv, self.png, self.rows = folder / "log.csv", folder / "curves.png", []
        if rows and self.csv.is_file():
            with open(self.csv, newline="") as file:
                self.rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)][:rows]

    def write(self, row):
        """Append; the file is written whole each time (columns may be new, and a row must never be half there).

        ValueError with one line on a full disk.
        """
        self.rows.append({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        try:
            with whole_file(self.csv) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)
        except OSError as error:
            raise ValueError(f"{self.csv}: could not be written ({error.strerror or error}); make room, then --resume "
                             "goes on from the last checkpoint") from None

    def draw(self, columns):
        xs = [float(row["step"]) for row in self.rows]
        curves({name: [float(row.get(name, "nan")) for row in self.rows] for name in dict.fromkeys(columns)}, xs, self.png)


def plain(values):
    """Arguments as what `torch.load(weights_only=True)` accepts."""
    return {key: value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
            for key, value in values.items()}


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "opencv": cv2.__version__}
