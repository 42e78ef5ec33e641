"""Draw boxes with the mouse and see the masks at once: the window behind `infer.py --pick`.

Each slice is embedded once, so that a mask follows its box in the time of one decode. In a volume a box spans the
slices from its first to its last one (keys f and l). When saved, it is segmented like any other case.
"""
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from ..inference.compose import Composition, compose
from ..inference.geometry import boxes_to_network
from ..inference.npz import Case
from ..inference.predictor import decode_boxes, encode
from ..show.draw import panel, write

LONGEST, SHORTEST = 900, 512         # the longest side of a picture on the screen
STRIP = 44                           # height of the two lines under the picture
KEPT = 64                            # embeddings of slices, 4 MB each
HELP = "drag: box   u undo   s save   q quit"
HELP_3D = "n p: next, previous   f l: newest box's ends"


@dataclass
class Drawn:
    """One object: its box x0 y0 x1 y1 in pixels, drawn on slice `z`, for the slices `first` to `last`; its logits."""
    box: np.ndarray                  # (4,)
    z: int
    first: int
    last: int
    logits: Tensor                   # (1, 256, 256)


class Picker:
    """The state behind the window, which never touches the screen; `done` is None, then "save" or "quit"."""

    def __init__(self, model, case: Case, overlap: str):
        self.model, self.case, self.overlap = model, case, overlap
        self.slices = case.pixels if case.is_3d else case.pixels[None]                      # (D, H, W[, 3])
        self.z = len(self.slices) // 2
        self.size = case.shape[-2:]                             # (H, W)
        self.scale = np.clip(max(self.size), SHORTEST, LONGEST) / max(self.size)
        self.objects = []                                       # each is a Drawn
        self.start, self.dragged = None, []                     # x y and the box, in pixels, while the button is down
        self.embedding = lru_cache(KEPT)(lambda z: encode(model, self.slices[z]))           # (1, 256, 64, 64)
        self.changed, self.done = True, None

    def mouse(self, event: int, x: int, y: int, *_) -> None:
        """Follow the mouse: OpenCV's callback, where x, y are pixels of the window."""
        place = np.clip(np.divide([x, y], self.scale) - 0.5, 0, np.subtract(self.size[::-1], 1))
        if event == cv2.EVENT_LBUTTONDOWN:
            self.start = place
        if self.start is None:
            return
        box = np.sort([self.start, place], axis=0).ravel()
        self.dragged, self.changed = [box], True
        if event == cv2.EVENT_LBUTTONUP:
            self.start, self.dragged = None, []
            if (box[2:] - box[:2]).min() * self.scale >= 2:                                 # a click is no box
                prompt = boxes_to_network(box[None], *self.size, self.model.image_size)
                logits = decode_boxes(self.model, self.embedding(self.z), prompt)
                self.objects.append(Drawn(box, self.z, self.z, self.z, logits))

    def key(self, code: int) -> None:
        """Obey a pressed key; those without a meaning change nothing."""
        if code < 0:
            return
        letter = chr(code & 0xFF)                                 # small letters: the arrow keys come as Q, R, S, T
        self.done = {"s": "save", "q": "quit", "\x1b": "quit"}.get(letter)                  # the last is Esc
        self.z = min(max(self.z + {"n": 1, "p": -1}.get(letter, 0), 0), len(self.slices) - 1)
        for newest in self.objects[-1:]:
            if letter == "u":
                self.objects.pop()
            elif letter == "f":
                newest.first = min(self.z, newest.z)
            elif letter == "l":
                newest.last = max(self.z, newest.z)
        self.changed = True

    def labels(self) -> np.ndarray:
        """Return the labels (H, W) of what was drawn on the present slice: k + 1 for object k."""
        found = Composition(self.size, len(self.objects), self.overlap)
        numbers = np.flatnonzero([drawn.z == self.z for drawn in self.objects])
        if len(numbers):
            here = [self.objects[k] for k in numbers]
            logits, boxes = torch.cat([drawn.logits for drawn in here]), np.array([drawn.box for drawn in here])
            compose(found, numbers, logits, boxes, self.model.image_size)
        return found.labels

    def render(self) -> np.ndarray:
        """Return what the window shows: RGB uint8, the picture in its scale and two lines of text below."""
        hidden = np.full(4, np.nan)
        boxes = [drawn.box if drawn.first <= self.z <= drawn.last else hidden for drawn in self.objects]
        picture = panel(self.slices[self.z], self.labels(), boxes + self.dragged, self.scale, fill=0.35)
        canvas = cv2.copyMakeBorder(picture, 0, STRIP, 0, max(SHORTEST - picture.shape[1], 0), cv2.BORDER_CONSTANT)
        write(canvas, HELP, 6, len(picture) + 17, 0.4)
        if self.case.is_3d:
            ends = "".join(f" {drawn.first}-{drawn.last}" for drawn in self.objects[-1:])
            write(canvas, f"slice {self.z} of 0-{len(self.slices) - 1}   {HELP_3D}{ends}", 6, len(picture) + 36, 0.4)
        return canvas

    def finish(self) -> None:
        """Put the boxes into the case, and the slices they were drawn on."""
        boxes = np.reshape([[*drawn.box, drawn.first, drawn.last] for drawn in self.objects], (-1, 6))
        self.case.boxes = boxes[:, [0, 1, 4, 2, 3, 5]] if self.case.is_3d else boxes[:, :4]
        self.case.drawn_slice = np.array([drawn.z for drawn in self.objects], int)


def require_display() -> None:
    """Raise ValueError, one line, where no window can be opened.

    Tried in a process of its own, as Qt ends the whole program where the display does not answer.
    """
    probe = [sys.executable, "-c", "import cv2; cv2.namedWindow('probe')"]
    if subprocess.run(probe, capture_output=True).returncode:
        raise ValueError("--pick: expected a screen for its window, found none (DISPLAY is not set or does not answer, "
                         "or opencv-python-headless is installed)")


def pick(model, case: Case, overlap: str) -> bool:
    """Let the user draw boxes into a case (after `require_display`); return False where the user quit."""
    picker, window = Picker(model, case, overlap), f"{case.name} - medficient_mini"
    picker.embedding(picker.z)                                   # encoded before the first box, not after it
    cv2.namedWindow(window, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
    cv2.setMouseCallback(window, picker.mouse)
    try:
        while picker.done is None:
            if picker.changed:
                picker.changed = False
                cv2.imshow(window, picker.render()[..., ::-1])
            picker.key(cv2.waitKey(20))
            if cv2.getWindowProperty(window, cv2.WND_PROP_VISIBLE) < 1:
                picker.done = picker.done or "quit"              # closed with the window's own button
    finally:
        cv2.destroyAllWindows()
        cv2.waitKey(1)
    picker.finish()
    return picker.done == "save"
