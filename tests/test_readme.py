"""The README's Python runs as it stands there."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_embed_it(one_thread, monkeypatch):
    monkeypatch.chdir(ROOT)
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(block, names)
    assert names["masks"].shape == (2, 1, 256, 320) and names["masks"].any((1, 2, 3)).all()
    assert names["segs"].shape == (20, 128, 160) and set(names["segs"].ravel()) == {0, 1, 2, 3}
