"""Progress on stderr: `for x in progress(items, total, "label")`. One redrawn line on a terminal, else a line every 10 s."""
import sys
import time

REDRAW_SECONDS, LINE_SECONDS = 0.1, 10.0


class progress:
    """Iterate over `iterable` and report count, rate and time left.

    total: number of items, None where unknown. label: what is being done. `set(text)` changes the text at the line's
    end (a loss, a file name); it shows with the next report. The last state is always reported, also when the loop is
    left early.
    """

    def __init__(self, iterable, total: int | None = None, label: str = ""):
        self.iterable, self.total, self.label, self.suffix = iterable, total, label, ""
        self.done, self.reported, self.width = 0, None, 0

    def write(self, text: str) -> None:
        """A line for the user above the progress line."""
        blank = "\r" + " " * self.width + "\r" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{blank}{text}\n")

    def set(self, text: str) -> None:
        self.suffix = text

    def __iter__(self):
        self.start = self.last = time.monotonic()
        try:
            for item in self.iterable:
                yield item
                self.done += 1
                terminal = sys.stderr.isatty()
                if time.monotonic() - self.last >= (REDRAW_SECONDS if terminal else LINE_SECONDS):
                    self._report(terminal, end="" if terminal else "\n")
        finally:
            if self.done and (self.reported != self.done or sys.stderr.isatty()):
                self._report(sys.stderr.isatty(), end="\n")

    def _report(self, terminal: bool, end: str) -> None:
        self.last = time.monotonic()
        line = self._line(self.last - self.start)
        # Blanks wipe what a longer line before left on the terminal.
        sys.stderr.write(("\r" + line.ljust(self.width) if terminal else line) + end)
        sys.stderr.flush()
        self.width, self.reported = len(line), self.done

    def _line(self, seconds: float) -> str:
        rate = self.done / seconds if seconds > 0 else 0.0
        speed = f"{rate:.1f}/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s each"
        count, left = str(self.done), ""
        if self.total:
            count += f"/{self.total} ({100 * self.done // self.total}%)"
            if rate and self.done < self.total:
                left = f", {clock((self.total - self.done) / rate)} left"
        return f"{self.label} {count}  {clock(seconds)}{left}, {speed}  {self.suffix}".strip()


def clock(seconds: float) -> str:
    """12.3 -> "0:12", 3723 -> "1:02:03"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
