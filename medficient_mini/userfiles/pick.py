"""Draw boxes with the mouse, see the masks at once: the window behind `infer.py --pick`.

A press, a drag and a release make a box; its mask follows in the time of one decode, as the embedding of the image, or
of each slice of a volume that is drawn on, is computed once. In a volume a box spans the slices between its first and
last one (keys f and l); the slice it was drawn on counts as the object's largest. The volume is segmented when it is saved.
"""
import os
import subprocess
import sys

import cv2
import numpy as np

from ..inference.npz import Case
from ..show.draw import panel, write
from ..inference.predictor import Predictor, label_dtype
from ..inference.volume import segment_volume

WINDOW = "medficient_mini"
LONGEST, SHORTEST = 900, 512         # the longest side of a picture on the screen
STRIP = 44                           # height of the two lines under the picture
KEPT = 64                            # embeddings of slices, 4 MB each
ESCAPE = 27
HELP = "drag: box   u undo   s save   q quit"
HELP_3D = "drag: box   u undo   n p next, previous slice   f l box's first, last slice   s save   q quit"


class Picker:
    """The state behind the window: `mouse` and `key` change it, `render` shows it. It never touches the screen.

    boxes: x0 y0 x1 y1 in pixels of the image; slices: (first, drawn on, last) of each; masks: bool (H, W) of the
    slice it was drawn on. done: None while it goes on, then "save" or "quit".
    """

    def __init__(self, model, case: Case):
        self.model, self.case = model, case
        self.slices_of_image = case.volume if case.is_3d else case.image[None]              # (D, H, W[, 3])
        self.z = len(self.slices_of_image) // 2
        self.height, self.width = case.shape[-2:]
        longest = max(self.height, self.width)
        self.scale = min(max(longest, SHORTEST), LONGEST) / longest
        self.boxes: list[list[float]] = []
        self.slices: list[tuple[int, int, int]] = []
        self.masks: list[np.ndarray] = []
        self.pressed = self.dragged = None                      # corners in image pixels while the button is down
        self.predictors: dict[int, Predictor] = {}
        self.done = None

    def predictor(self) -> Predictor:
        """A Predictor that holds the embedding of the present slice."""
        if self.z not in self.predictors:
            if len(self.predictors) >= KEPT:
                del self.predictors[next(iter(self.predictors))]
            self.predictors[self.z] = Predictor(self.model)
            self.predictors[self.z].set_image(self.slices_of_image[self.z])
        return self.predictors[self.z]

    def mouse(self, event: int, x: int, y: int, *_) -> None:
        """OpenCV's mouse callback; x, y are pixels of the window."""
        limits = self.width - 1, self.height - 1
        place = [min(max(v / self.scale - 0.5, 0), limit) for v, limit in zip((x, y), limits)]
        if event == cv2.EVENT_LBUTTONDOWN:
            self.pressed = self.dragged = place
        elif self.pressed and event == cv2.EVENT_MOUSEMOVE:
            self.dragged = place
        elif self.pressed and event == cv2.EVENT_LBUTTONUP:
            box = np.sort([self.pressed, place], axis=0).ravel().tolist()
            self.pressed = self.dragged = None
            if box[2] - box[0] >= 2 / self.scale and box[3] - box[1] >= 2 / self.scale:     # a click is no box
                self.add(box)

    def add(self, box: list[float]) -> None:
        mask = self.predictor().predict(box=box)[0][0]
        self.boxes.append(box)
        self.slices.append((self.z, self.z, self.z))
        self.masks.append(mask)

    def key(self, code: int) -> None:
        """A pressed key; those without a meaning change nothing."""
        letter = chr(code & 0xFF) if code >= 0 else ""            # small letters: the arrow keys come as Q, R, S, T
        if letter == "u" and self.boxes:
            for kept in (self.boxes, self.slices, self.masks):
                kept.pop()
        elif letter == "n":
            self.z = min(self.z + 1, len(self.slices_of_image) - 1)
        elif letter == "p":
            self.z = max(self.z - 1, 0)
        elif letter == "f" and self.slices:
            _, drawn, last = self.slices[-1]
            self.slices[-1] = min(self.z, drawn), drawn, last
        elif letter == "l" and self.slices:
            first, drawn, _ = self.slices[-1]
            self.slices[-1] = first, drawn, max(self.z, drawn)
        elif letter == "s":
            self.done = "save"
        elif letter == "q" or code & 0xFF == ESCAPE:
            self.done = "quit"

    def render(self) -> np.ndarray:
        """What the window shows: RGB uint8, the picture in its scale and two lines of text below."""
        segs, boxes = np.zeros((self.height, self.width), np.uint16), []
        for k, (box, (first, drawn, last), mask) in enumerate(zip(self.boxes, self.slices, self.masks), 1):
            boxes.append(box if first <= self.z <= last else [np.nan] * 4)
            if drawn == self.z:
                segs[mask] = k
        if self.pressed:
            boxes.append(np.sort([self.pressed, self.dragged], axis=0).ravel().tolist())
        picture = panel(self.slices_of_image[self.z], segs, np.array(boxes).reshape(-1, 4), self.scale, fill=0.35)
        strip = np.zeros((STRIP, max(picture.shape[1], SHORTEST), 3), np.uint8)
        state = f"{len(self.boxes)} box" + "es" * (len(self.boxes) != 1)
        if self.case.is_3d:
            state = f"slice {self.z} of 0-{len(self.slices_of_image) - 1}   {state}"
            if self.slices:
                state += ", the last on slices {}-{}".format(self.slices[-1][0], self.slices[-1][2])
        write(strip, state, 6, 17, 0.45, outline=None)
        write(strip, HELP_3D if self.case.is_3d else HELP, 6, 36, 0.38 if self.case.is_3d else 0.45, outline=None)
        canvas = np.zeros((picture.shape[0] + STRIP, strip.shape[1], 3), np.uint8)
        canvas[:picture.shape[0], :picture.shape[1]] = picture
        canvas[picture.shape[0]:] = strip
        return canvas

    def finish(self, **options) -> np.ndarray:
        """Labels (H, W) or (D, H, W); the boxes drawn go into the case. options: of `segment_volume`."""
        boxes, slices = np.array(self.boxes, np.float64).reshape(-1, 4), np.array(self.slices, int).reshape(-1, 3)
        if self.case.is_3d:
            self.case.boxes = np.hstack([boxes[:, :2], slices[:, :1], boxes[:, 2:], slices[:, 2:]])
            self.case.start = slices[:, 1]
            return segment_volume(self.model, self.case.volume, self.case.boxes, self.case.start, **options)
        self.case.boxes = boxes
        segs = np.zeros((self.height, self.width), label_dtype(len(boxes)))
        for label, mask in enumerate(self.masks, 1):
            segs[mask] = label
        return segs


def require_display() -> None:
    """ValueError with one line where no window can be opened.

    Tried in a process of its own, as Qt ends the whole program where the display does not answer.
    """
    linux = sys.platform.startswith("linux")
    reason = "found no display (DISPLAY is not set)"
    if not linux or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        probe = [sys.executable, "-c", "import cv2; cv2.namedWindow('probe')"]
        if not subprocess.run(probe, capture_output=True).returncode:
            return
        reason = "OpenCV could open none (no display answers, or opencv-python-headless is installed)"
    raise ValueError(f"--pick: expected a screen for its window, {reason}")


def pick(model, case: Case, **options) -> np.ndarray | None:
    """Show a case and let the user draw boxes until "save" or "quit".

    Returns labels (H, W) or (D, H, W) and leaves the boxes in case.boxes; None where the user quit. Call
    `require_display` first.
    """
    picker = Picker(model, case)
    if not case.is_3d:
        picker.predictor()                                       # encoded before the first box, not after it
    cv2.namedWindow(WINDOW, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
    cv2.setWindowTitle(WINDOW, f"{case.name} - {WINDOW}")
    cv2.setMouseCallback(WINDOW, picker.mouse)
    try:
        while picker.done is None:
            cv2.imshow(WINDOW, picker.render()[..., ::-1])
            picker.key(cv2.waitKey(20))
            if cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1:
                picker.done = picker.done or "quit"              # closed with the window's own button
    finally:
        cv2.destroyAllWindows()
        cv2.waitKey(1)
    return picker.finish(**options) if picker.done == "save" else None
