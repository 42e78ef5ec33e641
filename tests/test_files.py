"""A file is written whole or not at all; files are found in every folder, linked ones too."""
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from medficient_mini.files import exit_status, first_line, list_files, whole_file


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


# Fault 15.
@pytest.mark.parametrize("name", ["x" * 251 + ".npz", "ä" * 125 + ".npz", "a." + "x" * 253])
def test_the_longest_names_can_be_written(tmp_path, name):  # fault 15
    with whole_file(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert (tmp_path / name).read_text() == "new" and len(list(tmp_path.iterdir())) == 1


# Fault 15.
def test_threads_that_write_one_path_do_not_share_the_temporary_file(tmp_path):  # fault 15
    with whole_file(tmp_path / "a") as one, whole_file(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"                    # the outer block ended last

    def write(number):
        with whole_file(tmp_path / "a") as temporary:
            temporary.write_text(str(number) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100, 200)))
    text = (tmp_path / "a").read_text()
    assert text == text[:3] * 1000 and [p.name for p in tmp_path.iterdir()] == ["a"]


# Fault 33.
def test_list_files(tmp_path, capsys):  # fault 33
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for name in ("b.npz", "sub/a.npz", "a.NPZ", ".tmp-x.npz", "c.txt", "sub/d.npz.part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    elsewhere.mkdir()
    (elsewhere / "e.npz").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)                      # a circle
    (folder / "broken.npz").symlink_to(tmp_path / "absent")
    os.mkfifo(folder / "pipe.npz")                                  # whoever opened it would wait for ever
    found = [folder / name for name in ("a.NPZ", "b.npz", "broken.npz", "linked/e.npz", "sub/a.npz")]
    assert list_files(folder, (".npz",)) == found
    assert list_files(str(folder / "b.npz"), (".npz", ".txt")) == [folder / "b.npz"] and not capsys.readouterr().err
    for bad, words in (("c.txt", "another file"), ("absent", "nothing of that name")):
        with pytest.raises(ValueError, match=f"{bad}: expected .*npz, found {words}"):
            list_files(folder / bad, (".npz",))
    with pytest.raises(ValueError, match="another file"):
        list_files(folder / "pipe.npz", (".npz",))
    with pytest.raises(ValueError, match="found none"):
        list_files(folder, (".nii", ".nii.gz"))


def test_first_line():
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(MemoryError()) == "MemoryError"


def test_exit_status(capsys):
    def fail(error):
        raise error

    for error, status, line in ((ValueError("a.npz: bad\nmore"), 1, "a.npz: bad"), (MemoryError(), 1, "MemoryError"),
                                (KeyError("dsc"), 1, "KeyError: 'dsc'"), (KeyboardInterrupt(), 130, "stopped")):
        assert exit_status(lambda: fail(error)) == status and capsys.readouterr().err == line + "\n"
    assert [exit_status(lambda: failed) for failed in (0, 3, None, False)] == [0, 1, 0, 0]
