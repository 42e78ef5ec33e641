"""Progress on stderr: one redrawn line on a terminal, else a line every ten seconds."""
import sys
import time

REDRAW_SECONDS, LINE_SECONDS = 0.1, 10.0


class ProgressBar:
    """Iterate over `iterable` and report count, rate and time left: `for x in ProgressBar(items, total, "label")`.

    The last state is always reported, also when the loop is left early.

    Args:
        iterable: anything that a for loop takes.
        total: number of items, None where unknown.
        label: what is being done.
    """

    def __init__(self, iterable, total: int | None = None, label: str = ""):
        self.iterable, self.total, self.label, self.suffix = iterable, total, label, ""
        self.done = self.reported = self.width = 0

    def set(self, text: str) -> None:
        """Change the text at the line's end (a loss, a file name); it shows with the next report."""
        self.suffix = text

    def write(self, text: str) -> None:
        """Write a line for the user above the progress line."""
        blank = "\r" + " " * self.width + "\r" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{blank}{text}\n")

    def __iter__(self):
        self.start = self.last = time.monotonic()
        try:
            for item in self.iterable:
                yield item
                self.done += 1
                if time.monotonic() - self.last >= (REDRAW_SECONDS if sys.stderr.isatty() else LINE_SECONDS):
                    self._report("" if sys.stderr.isatty() else "\n")
        finally:
            if self.done > self.reported or self.done and sys.stderr.isatty():
                self._report("\n")

    def _report(self, end: str) -> None:
        self.last = time.monotonic()
        seconds = self.last - self.start
        rate = self.done / max(seconds, 1e-9)
        count, left = str(self.done), ""
        if self.total:
            count += f"/{self.total} ({100 * self.done // self.total}%)"
            left = f", {clock((self.total - self.done) / rate)} left" if self.done < self.total else ""
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        line = f"{self.label} {count}  {clock(seconds)}{left}, {speed}  {self.suffix}".strip()
        # On a terminal blanks wipe what a longer line before left there.
        sys.stderr.write(("\r" + line.ljust(self.width) if sys.stderr.isatty() else line) + end)
        sys.stderr.flush()
        self.width, self.reported = len(line), self.done


progress = ProgressBar               # the name before


def clock(seconds: float) -> str:
    """Write 12.3 seconds as 0:12 and 3723 as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
