"""The progress line on a terminal and in a log."""
import io
import sys

from medficient_mini.show.progress import ProgressBar


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_log_gets_one_line_at_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    bar = ProgressBar(iter("abc"), 3, "reading")
    for item in bar:
        bar.set(f"last {item}")
    assert sys.stderr.getvalue() == "reading 3/3  0:00:00, 0:00:00 left  last c\n"


def test_log_gets_a_line_every_ten_seconds(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    clock = iter([0, 4, 12, 12, 16, 16])                      # start, after a, after b twice, after c, end
    monkeypatch.setattr("medficient_mini.show.progress.time.monotonic", lambda: next(clock))
    assert list(ProgressBar("abc", 3, "x")) == ["a", "b", "c"]
    assert sys.stderr.getvalue().splitlines() == ["x 2/3  0:00:12, 0:00:06 left", "x 3/3  0:00:16, 0:00:00 left"]


def test_terminal_is_redrawn_and_lines_stand_above(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(True))
    bar = ProgressBar(range(3), 3, "x")
    for i in bar:
        if i == 1:
            bar.write("a line")
    text = sys.stderr.getvalue()
    assert "\r\033[Ka line\n" in text and text.split("\r\033[K")[-1].startswith("x 3/3") and text.count("\n") == 2


def test_items_pass_through_and_leaving_early_reports(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    assert list(ProgressBar([], 0, "none")) == [] and sys.stderr.getvalue() == ""
    for item in ProgressBar([5, 6, 7], 3, "some"):
        if item == 6:
            break
    assert sys.stderr.getvalue().startswith("some 1/3")
