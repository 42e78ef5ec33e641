"""A file is written whole or not at all."""
import pytest

from medficient_mini.files import whole_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.name.startswith(".") and temporary.suffix == ".txt"
    with pytest.raises(KeyboardInterrupt):
        with whole_file(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
