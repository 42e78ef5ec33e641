"""Masks without a network."""
import numpy as np

from medficient_mini.evaluation.baselines import fill, main


def ellipse_in(*shape):
    """The mask of one ellipse in the box that fills an array."""
    return fill(shape, np.array([[0] * len(shape) + [n - 1 for n in shape[::-1]]]), ellipse=True)


def test_the_ellipse_touches_its_box_and_has_its_area():
    for shape in ((40, 60), (30, 40, 50)):
        mask = ellipse_in(*shape)
        for axis in range(mask.ndim):
            lines = mask.any(tuple(a for a in range(mask.ndim) if a != axis))
            assert lines.all() and (mask == np.flip(mask, axis)).all()
        assert abs(mask.mean() - (np.pi / 4 if len(shape) == 2 else np.pi / 6)) < 0.01
    assert ellipse_in(3, 3).all()                                            # its corners are at sqrt(8) / 3
    assert ellipse_in(5, 5).sum() == 21                                      # and here at sqrt(32) / 5
    assert ellipse_in(1, 1).all()


def test_fill_by_hand():
    segs = fill((5, 6), np.array([[1, 1, 3, 2], [3, 2, 5, 4]]), ellipse=False)
    expected = np.zeros((5, 6), int)
    expected[1:3, 1:4] = 1
    expected[2:5, 3:6] = 2
    assert (segs == expected).all()
    volume = fill((4, 5, 6), np.array([[2, 1, 1, 4, 3, 2]]), ellipse=False)
    assert volume.sum() == 2 * 3 * 3 and volume[1:3, 1:4, 2:5].all()
    ball = fill((9, 9, 9), np.array([[0, 0, 0, 8, 8, 8]]), ellipse=True)
    centre = np.arange(9) - 4
    assert (ball == (sum(np.square(c) for c in np.ix_(centre, centre, centre)) <= 4.5 ** 2)).all()


def test_script(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/2D_US_a.npz", imgs=np.zeros((20, 30, 3), np.uint8), boxes=np.array([[2, 3, 11, 12]]))
    np.savez(tmp_path / "in/3D_CT_b.npz", imgs=np.zeros((6, 20, 30), np.uint8), boxes=np.array([[2, 3, 1, 11, 12, 4]]),
             spacing=np.ones(3))
    (tmp_path / "in/2D_US_bad.npz").write_bytes(b"nothing")
    assert main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--shape", "box"]) == 1
    assert "2D_US_bad.npz" in capsys.readouterr().err
    segs = np.load(tmp_path / "out/2D_US_a.npz")["segs"]
    assert segs.sum() == 100 and segs.dtype == np.uint8
    assert np.load(tmp_path / "out/3D_CT_b.npz")["segs"].sum() == 400
    assert main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "in")]) == 1
    assert "another folder" in capsys.readouterr().err
    assert "imgs" in np.load(tmp_path / "in/2D_US_a.npz").files               # the case is still there
    for _ in range(2):                                                         # results below the input are no cases
        assert main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "in/deeper")]) == 1
        assert "expected" in capsys.readouterr().err and len(list((tmp_path / "in/deeper").iterdir())) == 2
    (tmp_path / "in/again").mkdir()
    (tmp_path / "in/2D_US_a.npz").rename(tmp_path / "in/again/3D_CT_b.npz")
    main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "twice")])
    assert "3D_CT_b.npz: name: expected one of its own" in capsys.readouterr().err
