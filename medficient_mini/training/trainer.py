"""The loop that both training scripts share: updates, validation, log, checkpoints, resuming.

`Trainer.update` is one step of training, from the forward pass to the optimiser. What is trained is the script's: a
task, that is a small torch module with

    model                  the module that learns; its state dict goes into the checkpoint
    network                name of the network in NETWORKS
    frozen                 modules of the model that stay in evaluation mode
    weights                {term of the loss: its weight}
    count(batch)           {term: number of items of the batch over which the term is a mean}
    loss(batch)            {term: that mean}, also the module's forward pass, since DistributedDataParallel collects
                           the gradients of what goes through one
    validate(model)        {score: number} for the model or a moving average of it
    criterion              (name of the score that decides, "min" or "max")
    extra                  {name: tensor} that last.pt and best.pt also hold
"""
import csv
import itertools
import math
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ..files import first_line
from ..inference.checkpoint import read_torch
from ..show.draw import curves
from ..show.progress import ProgressBar
from .optim import AdamW, moving_average, schedule_of
from .samples import make_loader, writing

# Every other option must stay. Not all of these leave the numbers alone: with other --steps or --epochs a cosine ends
# elsewhere, so that the learning rate jumps; --device and --amp round differently; --val-limit makes scores before
# and after incomparable.
MAY_CHANGE_ON_RESUME = {"resume", "out", "minutes", "steps", "epochs", "workers", "threads", "save_minutes",
                        "log_steps", "device", "amp", "cache", "cache_mb", "val_limit", "strict"}


class Trainer:
    """One run: `task` (see above) learns from the samples of `dataset` in the order of `sampler`.

    Raises:
        ValueError: with --resume, a checkpoint that does not belong to this run.
    """

    def __init__(self, arguments, world, task, dataset, sampler):
        self.arguments, self.world, self.task, self.sampler = arguments, world, task, sampler
        self.loader = make_loader(dataset, sampler, arguments.bs, arguments.workers, world.device.type == "cuda")
        # Not every parameter has a gradient each time: a prompt encoder without points, a batch without masks.
        self.loss = DistributedDataParallel(task, find_unused_parameters=True) if world.size > 1 else task
        self.params = [p for p in task.model.parameters() if p.requires_grad]
        matrices, others = ({"params": [p for p in self.params if (p.ndim > 1) == wanted]} for wanted in (True, False))
        if arguments.decay_matrices_only:
            others["weight_decay"] = 0.0
        self.optimizer = AdamW([matrices, others], lr=arguments.lr, weight_decay=arguments.weight_decay)
        self.batch = arguments.bs * arguments.accumulate * world.size          # samples of one update
        self.epoch_samples = sampler.total
        self.steps = arguments.steps or arguments.epochs * math.ceil(self.epoch_samples / self.batch)
        self.schedule = schedule_of(arguments, self.optimizer, self.steps, task.criterion[1])
        self.ema = moving_average(task.model, arguments.ema) if arguments.ema else None
        # `rows` are those of log.csv, `updates` what the next row is the mean of.
        self.state = dict(epoch=0, position=0, step=0, seconds=0.0, best=None, rows=[], updates=[])
        self.folder = Path(arguments.out)
        self.run = vars(arguments) | {"network": task.network, "slices": sampler.n}     # what a resumed run must share
        self.stop_signal = self.stop_reason = None
        if arguments.resume:
            self._load()

    # ------------------------------------------------------------------------------------------------- the loop

    def fit(self):
        """Train to the end, or until stopped: exit status 0, or 130 after Ctrl-C. ValueError for a loss not finite."""
        self.begin = self.saved_at = time.monotonic()
        handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        state = self.state
        try:
            while not self.stop_reason and (state["step"] < self.steps or state["position"]):
                self._epoch()
                if not self.stop_reason:
                    self._end_epoch()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stop_reason:
            self.save()
            say(f"{self.stop_reason}: step {state['step']} of {self.steps} is saved in {self.folder / 'last.pt'}; the "
                "same command with --resume goes on")
        else:
            say(f"finished after {state['step']} steps; weights in {self.folder}: best.pt, last.pt")
        self.world.wait()                                                      # an early end breaks the others' calls
        return 130 if self.stop_signal else 0

    def on_signal(self, number, _):
        """Ask for an end after the present step; the second time, end at once."""
        if self.stop_signal:
            raise KeyboardInterrupt
        self.stop_signal = signal.Signals(number).name
        say(f"{self.stop_signal}: will stop after this step, saved (again: stop at once)")

    def _epoch(self):
        """Do the updates that are left of this epoch, or some of them if there is a reason to stop."""
        state, arguments = self.state, self.arguments
        self.sampler.set_position(state["epoch"], state["position"])
        left = min(math.ceil((self.epoch_samples - state["position"]) / self.batch), self.steps - state["step"])
        if left <= 0:                                                          # stopped just before the validation
            return
        self.task.model.train()
        for module in self.task.frozen:
            module.eval()
        batches = iter(self.loader)
        bar = ProgressBar(range(left), left, f"epoch {state['epoch'] + 1}")
        for k in bar:
            began = time.monotonic()
            group = [self.world.to_device(batch) for batch in itertools.islice(batches, arguments.accumulate)]
            waited = time.monotonic() - began
            result = self.update(group)
            seconds = time.monotonic() - began
            samples = min(self.batch, self.epoch_samples - state["position"])
            speed = {"samples_per_second": samples / seconds, "waiting": waited / seconds}
            state["updates"].append(result | speed)
            state["step"] += 1
            state["position"] += samples
            state["seconds"] += seconds
            minutes = state["seconds"] / state["step"] * (self.steps - state["step"]) / 60
            bar.set(f"loss {result['loss']:.4f}  lr {result['lr']:.2e}  {samples / seconds:.2f} samples/s  "
                    f"run: {minutes:.0f} min left")
            if state["step"] % arguments.log_steps == 0 and k + 1 < left:
                self._log({})
            self._save_or_stop()
            if self.stop_reason:
                return

    def update(self, group):
        """Update the weights once, on a group of batches weighted by their items so that their union alone matters."""
        task, world = self.task, self.world
        counts = [task.count(batch) for batch in group]
        totals = world.sum({term: sum(count[term] for count in counts) for term in task.weights})
        values = dict.fromkeys(task.weights, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for batch, count in zip(group, counts):
            waits = world.size > 1 and batch is not group[-1]                  # gradients travel with the last batch
            with self.loss.no_sync() if waits else nullcontext():
                with world.autocast():
                    means = self.loss(batch)
                shares = {term: means[term] * (count[term] / max(totals[term], 1.0)) for term in values}
                loss = sum(task.weights[term] * share for term, share in shares.items())
                (loss * world.size).backward()                                 # processes' gradients are averaged
            values = {term: values[term] + float(share.detach()) for term, share in shares.items()}
        norm = float(clip_grad_norm_(self.params, self.arguments.clip))
        values = world.sum(values)
        loss = sum(task.weights[term] * value for term, value in values.items())
        lr = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss + norm):
            raise ValueError(f"step {self.state['step'] + 1}: loss {loss}, gradient norm {norm} at learning rate "
                             f"{lr:.3g}: training diverged; start again with another --out and a lower --lr or a "
                             "--warmup, from the beginning or from the last.pt of this run")
        self.optimizer.step()
        self.schedule.after_update()
        if self.ema:
            self.ema.update_parameters(task.model)
        values = {term: value for term, value in values.items() if totals[term]}          # no item, no value
        return {"lr": lr, "loss": loss, **values, "grad_norm": norm}

    def _save_or_stop(self):
        """Find, in all processes alike, whether there is a reason to stop; save when it is time to."""
        now, minutes = time.monotonic(), self.arguments.minutes
        due = self.world.sum({"signal": self.stop_signal is not None,
                              "late": minutes is not None and now - self.begin > minutes * 60,
                              "save": now - self.saved_at > self.arguments.save_minutes * 60})
        if due["signal"]:
            self.stop_reason = self.stop_signal or "stopped elsewhere"
        elif due["late"]:
            self.stop_reason = f"{minutes:g} minutes are over"
        elif due["save"]:
            self.save()

    def _end_epoch(self):
        """Validate, advance the schedule, log, save last and best, draw."""
        state, task = self.state, self.task
        if time.monotonic() - self.saved_at > 60:                              # a run killed in validation repeats that
            self.save()
        began = time.monotonic()
        model = self.ema.module if self.ema else task.model
        with torch.no_grad(), self.world.autocast():
            scores = task.validate(model.eval())
        state["seconds"] += time.monotonic() - began
        name, better = task.criterion
        score, best = scores[name], state["best"]
        self.schedule.after_epoch(score)
        state["epoch"], state["position"] = state["epoch"] + 1, 0
        self._log(scores)
        say(f"epoch {state['epoch']}, step {state['step']}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        if best is None or (score < best if better == "min" else score > best):
            state["best"] = score
            self.save("best.pt")
        self.save()
        if self.world.first:
            self._draw()

    # ---------------------------------------------------------------------------------------- log and checkpoints

    def _log(self, scores):
        """Add a row to log.csv: the means of the updates since the last row, and scores."""
        state = self.state
        columns = dict.fromkeys(key for update in state["updates"] for key in update)
        means = {key: float(np.mean([update[key] for update in state["updates"] if key in update])) for key in columns}
        row = {"epoch": state["epoch"], "step": state["step"], "minutes": state["seconds"] / 60} | means | scores
        state["rows"].append({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        state["updates"] = []
        if self.world.first:
            with writing(self.folder / "log.csv") as temporary, open(temporary, "w", newline="") as file:
                # Written whole each time: columns may be new, and a killed run leaves no half row.
                writer = csv.DictWriter(file, dict.fromkeys(key for row in state["rows"] for key in row))
                writer.writeheader()
                writer.writerows(state["rows"])

    def _draw(self):
        """Draw the columns of log.csv over the steps; a picture that cannot be written costs a line, not the run."""
        rows, path = self.state["rows"], self.folder / "curves.png"
        columns = {key: [float(row.get(key, "nan")) for row in rows] for key in rows[-1]
                   if not key.startswith(("epoch", "step", "minutes", "dsc_"))}
        try:
            curves(columns, [row["step"] for row in rows], path)
        except OSError as error:
            say(f"{path}: could not be written ({first_line(error)})")

    def save(self, name="last.pt"):
        """Write last.pt, with all that --resume needs, or best.pt, the weights alone."""
        model = self.task.model
        content = {"network": self.task.network, "model": (self.ema.module if self.ema else model).state_dict(),
                   "run": self.run, "state": self.state, "extra": self.task.extra}
        if name == "last.pt":
            content |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                        "torch_random": torch.get_rng_state()}
            if self.ema:
                content |= {"raw": model.state_dict(), "ema": self.ema.state_dict()}
        if self.world.first:
            with writing(self.folder / name) as temporary:
                torch.save(content, temporary)
        self.saved_at = time.monotonic()

    def _load(self):
        path, saved = self.folder / "last.pt", read_last(self.folder)
        for key, value in saved["run"].items():
            if key not in MAY_CHANGE_ON_RESUME and self.run.get(key) != value:
                raise ValueError(f"{path}: --resume: {key.replace('_', '-')}: expected {value} as at the first start, "
                                 f"found {self.run.get(key)}")
        self.task.model.load_state_dict(saved["raw"] if self.ema else saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.ema:
            self.ema.load_state_dict(saved["ema"])
        torch.set_rng_state(saved["torch_random"])
        self.state = saved["state"]
        say(f"resuming at step {self.state['step']} of {self.steps}")


def read_last(folder):
    """Read last.pt of a run's folder. ValueError, one line, for a file that --resume cannot use."""
    path = Path(folder, "last.pt")
    saved = read_torch(path)
    if not isinstance(saved, dict) or not {"run", "optimizer", "extra"} <= set(saved):
        raise ValueError(f"{path}: --resume: expected a checkpoint that this script wrote, found another file")
    return saved


def say(text):
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)
