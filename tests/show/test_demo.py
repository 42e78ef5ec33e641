"""The shipped demo cases are those that the script draws."""
from pathlib import Path

import numpy as np

from medficient_mini.demo import make


def test_the_shipped_cases_are_drawn_again():
    for name in ("2D_US_demo", "2D_Microscopy_demo"):
        shipped, drawn = np.load(Path(make.__file__).with_name(f"{name}.npz")), make.draw(name)
        assert set(shipped.files) == set(drawn)
        assert all(np.array_equal(shipped[key], drawn[key]) and shipped[key].dtype == drawn[key].dtype for key in drawn)
