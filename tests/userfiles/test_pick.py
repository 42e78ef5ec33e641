"""The window behind --pick: its logic without a screen, and the whole of it on a virtual one with a scripted mouse."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import BrightSam, squares

from medficient_mini.inference.npz import Case
from medficient_mini.userfiles.pick import Picker, pick

ROOT = Path(__file__).resolve().parents[2]


def image_case():
    return Case(Path("a.png"), (128, 200), pixels=np.repeat(squares((128, 200), [(40, 80, 60, 120)])[..., None], 3, 2))


def picker_of(case):
    return Picker(BrightSam(), case, "inside")


def drag(picker, x0, y0, x1, y1):
    """From one image pixel to another, through the window's scale."""
    def at(v):
        return round((v + 0.5) * picker.scale)
    picker.mouse(cv2.EVENT_LBUTTONDOWN, at(x0), at(y0), 0, None)
    picker.mouse(cv2.EVENT_MOUSEMOVE, at(x1), at(y1), 0, None)
    picker.mouse(cv2.EVENT_LBUTTONUP, at(x1), at(y1), 0, None)


def press(picker, keys):
    for key in keys:
        picker.key(ord(key))


def test_a_drag_makes_a_box_and_its_mask_at_once():
    picker = picker_of(image_case())
    drag(picker, 125, 85, 55, 35)                                # from the lower right corner too
    assert np.allclose(picker.objects[0].box, [55, 35, 125, 85], atol=0.5)
    assert abs((picker.labels() == 1).sum() - 40 * 60) < 150
    drag(picker, 70, 45, 300, 300)                               # beyond the border
    assert picker.objects[1].box[2:].tolist() == [199, 127] and picker.model.encoded == 1
    drag(picker, 80, 50, 110, 70)
    labels = picker.labels()                                     # the object inside the others is on top
    assert labels[60, 100] == 3 and labels[60, 64] == 1
    picker.finish()
    assert picker.case.boxes.shape == (3, 4) and (picker.case.boxes[1] == picker.objects[1].box).all()


def test_a_click_is_no_box_and_undo_takes_the_last():
    picker = picker_of(image_case())
    drag(picker, 50, 50, 50, 50)
    picker.mouse(cv2.EVENT_MOUSEMOVE, 10, 10, 0, None)
    assert not picker.objects and picker.start is None
    drag(picker, 55, 35, 125, 85)
    drag(picker, 10, 10, 50, 50)
    press(picker, "u")
    assert len(picker.objects) == 1
    press(picker, "uux")
    assert not picker.objects and picker.done is None
    press(picker, "s")
    picker.finish()
    assert picker.done == "save" and picker.case.boxes.shape == (0, 4)


@pytest.mark.parametrize("code", [ord("q"), 27])
def test_quitting(code):
    picker = picker_of(image_case())
    for code_without_meaning in (-1, 81, 83):                               # none; the left and right arrow keys
        picker.key(code_without_meaning)
    assert picker.done is None
    picker.key(code)
    assert picker.done == "quit"


def test_it_is_drawn_only_when_something_changed(monkeypatch):  # fault 17
    """Fault 17: every idle tick drew the picture anew."""
    shown, keys = [], iter([-1] * 5 + [ord("n")] + [-1] * 5 + [ord("s"), -1])
    for name in ("namedWindow", "setMouseCallback", "destroyAllWindows"):
        monkeypatch.setattr(cv2, name, lambda *_: None)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1)
    monkeypatch.setattr(cv2, "imshow", lambda window, picture: shown.append(window))
    monkeypatch.setattr(cv2, "waitKey", lambda _: next(keys))
    assert pick(BrightSam(), Case(Path("v.nii"), (5, 64, 64), pixels=np.zeros((5, 64, 64), np.uint8)), "inside")
    assert shown == ["v.nii - medficient_mini"] * 2


@pytest.mark.parametrize("shape, longest", [((128, 200), 512), ((40, 20), 512), ((700, 300), 700), ((3000, 4000), 900)])
def test_the_picture_fits_a_screen(shape, longest):
    shown = picker_of(Case(Path("a.png"), shape, pixels=np.zeros((*shape, 3), np.uint8))).render()
    assert shown.dtype == np.uint8 and shown.shape[2] == 3 and max(shown.shape[0] - 44, shown.shape[1]) == longest


def test_what_is_shown_follows_the_drawing():
    picker = picker_of(image_case())
    empty = picker.render()
    picker.mouse(cv2.EVENT_LBUTTONDOWN, 100, 80, 0, None)
    picker.mouse(cv2.EVENT_MOUSEMOVE, 340, 240, 0, None)
    dragging = picker.render()
    assert (dragging != empty)[80:240].any() and not picker.objects
    picker.mouse(cv2.EVENT_LBUTTONUP, 340, 240, 0, None)
    changed = (picker.render() != dragging).any(2)
    assert changed[110:200, 160:300].mean() > 0.9                # the tint of the mask


def test_slices_of_a_volume():
    volume = np.stack([squares((64, 64), [(20, 44, 10 + 2 * z, 34 + 2 * z)]) for z in range(9)])
    picker = picker_of(Case(Path("v.nii"), volume.shape, pixels=volume))
    assert picker.z == 4
    press(picker, "fl")                                          # no box yet
    press(picker, "pp")
    drag(picker, 10, 15, 43, 50)
    press(picker, "pppp")
    assert picker.z == 0
    press(picker, "nfn" + "n" * 20)
    assert picker.z == 8
    press(picker, "ppl")
    drawn = picker.objects[0]
    assert (drawn.first, drawn.z, drawn.last) == (1, 2, 6)
    press(picker, "f")                                           # first stays at or before the slice drawn on
    assert drawn.first == 2
    press(picker, "pppppfnnnnn")
    assert not picker.labels().any()                             # the mask is shown where it was drawn
    assert picker.render().shape[0] == 512 + 44
    picker.finish()
    assert np.allclose(picker.case.boxes, [[10, 15, 1, 43, 50, 6]], atol=0.5)
    assert picker.case.drawn_slice.tolist() == [2]


@pytest.fixture
def screen():
    """The environment of a virtual display."""
    for tool in ("Xvfb", "xdotool"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    number = next(n for n in range(90, 200) if not Path(f"/tmp/.X11-unix/X{n}").exists())
    server = subprocess.Popen(["Xvfb", f":{number}", "-screen", "0", "1200x1000x24"], stderr=subprocess.DEVNULL)
    environment = {**os.environ, "DISPLAY": f":{number}"}
    environment.pop("WAYLAND_DISPLAY", None)
    deadline = time.time() + 10
    while not Path(f"/tmp/.X11-unix/X{number}").exists():
        assert time.time() < deadline, "Xvfb did not start"
        time.sleep(0.05)
    yield environment
    server.terminate()
    server.wait()


SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, "tests")
sys.path.insert(0, "tests/userfiles")
from fakes import BrightSam
from test_pick import image_case
from medficient_mini.userfiles.pick import pick, require_display
require_display()
case = image_case()
saved = pick(BrightSam(), case, "inside")
np.savez(sys.argv[1], boxes=case.boxes, saved=saved)
"""


def test_on_a_virtual_screen_with_a_scripted_mouse(screen, tmp_path):
    def xdotool(*words):
        words = ["xdotool", *map(str, words)]
        return subprocess.run(words, env=screen, capture_output=True, text=True, timeout=20).stdout

    program = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "picked.npz"], cwd=ROOT, env=screen,
                               stderr=subprocess.PIPE, text=True)
    try:
        deadline, window = time.time() + 30, ""
        while not window and program.poll() is None and time.time() < deadline:
            time.sleep(0.1)
            window = xdotool("search", "--name", "a.png - medficient_mini").strip()
        assert window, program.stderr.read() if program.poll() is not None else "the window did not open"
        time.sleep(0.5)
        for box in ((20, 20, 60, 60), (140, 90, 318, 216)):      # window pixels, scale 2.56
            xdotool("mousemove", "--window", window, *box[:2], "mousedown", 1)
            for step in (0.3, 0.7, 1):
                xdotool("mousemove", "--window", window, *(round(a + step * (b - a)) for a, b in zip(box[:2], box[2:])))
                time.sleep(0.05)
            xdotool("mouseup", 1)
            time.sleep(0.3)
            if box[0] == 20:
                xdotool("key", "--window", window, "u")
                time.sleep(0.2)
        if os.environ.get("PICK_SCREENSHOT"):
            subprocess.run(["import", "-window", "root", os.environ["PICK_SCREENSHOT"]], env=screen)
        xdotool("key", "--window", window, "s")
        assert program.wait(20) == 0, program.stderr.read()
    finally:
        program.kill()
    with np.load(tmp_path / "picked.npz") as picked:
        expected = np.array([[140, 90, 318, 216]]) / (512 / 200) - 0.5
        assert picked["saved"] and np.allclose(picked["boxes"], expected, atol=0.8)
