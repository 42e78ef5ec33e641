"""Progress on stderr: one redrawn line on a terminal, else a line every ten seconds."""
import sys
import time
from datetime import timedelta

WIPE = "\r\033[K"                    # back to the start of the terminal's line, and clear it


class ProgressBar:
    """Iterate and report how far the loop is and how long it will take: `for x in ProgressBar(items, total, "label")`.

    The last state is always reported, also when the loop is left early.
    """

    def __init__(self, iterable, total: int, label: str):
        self.iterable, self.total, self.label, self.text = iterable, total, label, ""
        self.terminal = sys.stderr.isatty()

    def set(self, text: str) -> None:
        """Change the text at the line's end (a loss, a file name); it shows with the next report."""
        self.text = text

    def write(self, text: str) -> None:
        """Write a line for the user above the progress line."""
        print(WIPE * self.terminal + text, file=sys.stderr)

    def __iter__(self):
        start = last = time.monotonic()
        done = reported = 0
        try:
            for item in self.iterable:
                yield item
                done += 1
                if time.monotonic() - last >= (0.1 if self.terminal else 10):
                    last, reported = time.monotonic(), done
                    self._report(done, last - start, end="" if self.terminal else "\n")
        finally:
            if self.terminal or done > reported:
                self._report(done, time.monotonic() - start, end="\n")

    def _report(self, done: int, seconds: float, end: str) -> None:
        left = seconds / max(done, 1) * (self.total - done)
        times = f"{timedelta(seconds=int(seconds))}, {timedelta(seconds=int(left))} left"
        line = f"{WIPE * self.terminal}{self.label} {done}/{self.total}  {times}  {self.text}"
        print(line.rstrip(), end=end, file=sys.stderr, flush=True)
