"""The shipped demo cases are those that the script draws."""
from pathlib import Path

import numpy as np

from medficient_mini.demo import make


def test_the_shipped_cases_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "CASES", {name: make.CASES[name] for name in make.CASES if name.startswith("2D_")})
    assert make.main([str(tmp_path)]) == 0
    for path in tmp_path.iterdir():
        shipped, drawn = np.load(Path(make.__file__).with_name(path.name)), np.load(path)
        assert set(shipped.files) == set(drawn.files) and len(make.CASES) == 3
        for key in drawn.files:
            assert np.array_equal(shipped[key], drawn[key]) and shipped[key].dtype == drawn[key].dtype
