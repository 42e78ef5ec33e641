"""The progress line on a terminal and in a log."""
import io
import sys

from medficient_mini.show.progress import ProgressBar, clock


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
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith("reading 3/3 (100%)") and lines[0].endswith("last c")


def test_log_tells_each_state_once(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    monkeypatch.setattr("medficient_mini.show.progress.LINE_SECONDS", 0)
    assert list(ProgressBar("ab", 2)) == ["a", "b"]
    assert [line.split()[0] for line in sys.stderr.getvalue().splitlines()] == ["1/2", "2/2"]


def test_terminal_is_redrawn_and_a_shorter_line_wipes_a_longer(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(True))
    monkeypatch.setattr("medficient_mini.show.progress.REDRAW_SECONDS", 0)
    bar = ProgressBar(range(3), None, "x")
    for i in bar:
        bar.set("long text" if i == 0 else "")
    text = sys.stderr.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    first, second = text.split("\r")[2:4]
    assert "long text" in "".join(text.split("\r")[1:3]) and "x 3" in text.split("\r")[-1]
    assert len(second) >= len(first.rstrip())


def test_items_pass_through_and_leaving_early_reports(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    assert list(ProgressBar([], 0, "none")) == [] and sys.stderr.getvalue() == ""
    for item in ProgressBar([5, 6, 7], 3, "some"):
        if item == 6:
            break
    assert sys.stderr.getvalue().startswith("some 1/3 (33%)")


def test_clock():
    assert [clock(s) for s in (0, 12.9, 61, 3723)] == ["0:00", "0:12", "1:01", "1:02:03"]
