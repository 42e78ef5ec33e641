"""Makes a folder of odd NPZ files, right and wrong ones, so that every script can be tried on all of them.

    python tests/odd_inputs.py FOLDER          # make them and print which are right

Each file is a whole case (`imgs`, `boxes`, `gts`, and `spacing` of a volume) but for its one oddity.
"""
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

H, W = 40, 48
PIXELS = np.random.default_rng(0).integers(0, 200, (H, W), dtype=np.uint8)
TERABYTES = (2**20, 2**10, 2**10)


def image(**changes):
    """The arrays of a grey image with two objects, some of them changed, or left out where the change is None."""
    labels = np.zeros((H, W), np.uint8)
    labels[8:20, 6:30], labels[24:36, 12:40] = 1, 2
    boxes = np.array([[6, 8, 29, 19], [12, 24, 39, 35]])
    arrays = {"imgs": PIXELS + 50 * labels.clip(max=1), "boxes": boxes, "gts": labels, **changes}
    return {name: array for name, array in arrays.items() if array is not None}


def volume(**changes):
    """The same for a volume of three slices."""
    flat = image()
    boxes = np.array([[6, 8, 0, 29, 19, 2], [12, 24, 0, 39, 35, 2]])
    return image(**{"imgs": np.stack([flat["imgs"]] * 3), "gts": np.stack([flat["gts"]] * 3), "boxes": boxes,
                    "spacing": np.array([2.0, 1, 1]), **changes})


def packed(**arrays) -> bytes:
    """The bytes of an NPZ file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def announced(shape, descr="|u1", body=b"") -> bytes:
    """The bytes of an .npy file whose header says whatever one likes of the body."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def forged(**members) -> bytes:
    """The bytes of an NPZ file of whole image but for these members, given as the bytes of .npy files."""
    stream = io.BytesIO(packed(**image(**dict.fromkeys(members))))
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def lying_directory() -> bytes:
    """An NPZ file whose zip directory promises 4 GB too, for a member of a few bytes."""
    header = announced((60000, 60000))
    data = bytearray(forged(imgs=header))
    at = data.rindex(len(header).to_bytes(4, "little"))
    data[at:at + 4] = (2**32 - 2).to_bytes(4, "little")
    return bytes(data)


def flipped() -> bytes:
    """An NPZ file, not compressed, with one wrong bit among the numbers of `imgs`: only the checksum tells."""
    stream = io.BytesIO()
    np.savez(stream, **volume())
    data = bytearray(stream.getvalue())
    data[data.index(volume()["imgs"].tobytes()) + 99] ^= 1
    return bytes(data)


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


def right_cases():
    """{file name: arrays} of what every script accepts."""
    grey, boxes, gts = image()["imgs"], image()["boxes"], image()["gts"]
    colour = np.stack([grey, grey // 2, 255 - grey], -1)
    return {
        "2D_CT_grey.npz": image(),
        "2D_CT_last-axis-one.npz": image(imgs=grey[..., None], gts=gts[..., None]),
        "2DBox_MR_colour.npz": image(imgs=colour),
        "2D_US_alpha.npz": image(imgs=np.dstack([colour, np.full_like(grey, 255)])),
        "unprefixed.npz": image(),
        "unprefixed-four-channels.npz": image(imgs=np.ones((5, 9, 4), np.uint8), boxes=np.array([[1, 1, 3, 3]]),
                                              gts=np.eye(5, 9, dtype=np.uint8)),
        "unprefixed-narrow-volume.npz": volume(imgs=np.ones((5, 9, 4), np.uint8), gts=np.ones((5, 9, 4), np.uint8),
                                               boxes=np.array([[0, 1, 1, 3, 7, 3]])),
        "2D_CT_uint16.npz": image(imgs=grey.astype(np.uint16)),
        "2D_CT_float.npz": image(imgs=grey + 0.25),
        "2D_CT_fractions.npz": image(imgs=grey / np.float32(255)),
        "2D_CT_fortran.npz": image(imgs=np.asfortranarray(grey.astype(">i4")), gts=np.asfortranarray(gts)),
        "2D_CT_label-300.npz": image(gts=np.where(gts == 2, np.uint16(300), gts)),
        "2D_CT_bool-gts.npz": image(gts=gts > 0, boxes=boxes[:1]),
        "2D_CT_no-box.npz": image(boxes=np.zeros(0), gts=0 * gts),
        "2D_CT_one-box.npz": image(boxes=boxes[0], gts=gts % 2),
        "2D_CT_over-the-border.npz": image(boxes=boxes + [-9, 0, 99, 0]),
        "2D_CT_one-row.npz": image(imgs=grey[9:10], gts=gts[9:10], boxes=np.array([[6, 0, 29, 0]])),
        "2D_CT_objects-beside.npz": image(notes=np.array([{"by": "hand"}], object)),
        "2D_CT_UPPER.NPZ": image(),
        "2D_CT_a \"quoted\", 'odd' name.npz": image(),
        "2D_CT_Größe-腎.npz": image(),
        f"2D_CT_{'long' * 59}.npz": image(),
        "3D_CT_volume.npz": volume(),
        "3DBox_MR_colour.npz": volume(imgs=np.stack([colour] * 3)),
        "3D_CT_one-slice.npz": volume(imgs=grey[None], gts=gts[None], boxes=volume()["boxes"] * [1, 1, 0, 1, 1, 0]),
    }


def wrong_headers():
    """{file name: arrays or bytes} of what is refused by the headers alone; the name says which field is wrong."""
    grey, gts = image()["imgs"], image()["gts"]
    objects = np.array([[1, None], ["x", {}]], object)
    return {
        "2D_CT_imgs-bool.npz": image(imgs=grey > 99),
        "2D_CT_imgs-complex.npz": image(imgs=grey * 1j),
        "2D_CT_imgs-objects.npz": image(imgs=objects),
        "2D_CT_imgs-two-channels.npz": image(imgs=np.dstack([grey, grey])),
        "2D_CT_imgs-volume.npz": image(imgs=np.stack([grey] * 3)),
        "2D_CT_imgs-empty.npz": image(imgs=grey[:0], gts=gts[:0]),
        "2D_CT_imgs-scalar.npz": image(imgs=np.array(7)),
        "3D_CT_imgs-flat.npz": volume(imgs=grey),
        "imgs-four-axes.npz": volume(imgs=np.zeros((2, 3, H, W), np.uint8)),
        "2D_CT_imgs-missing.npz": image(imgs=None),
        "2D_CT_imgs-terabytes.npz": forged(imgs=announced((2**20, 2**20))),
        "3D_CT_imgs-terabytes.npz": forged(imgs=announced(TERABYTES), gts=announced(TERABYTES)),
        "2D_CT_imgs-lying-directory.npz": lying_directory(),
        "2D_CT_imgs-negative.npz": forged(imgs=announced((-1, W))),
        "2D_CT_imgs-cut.npz": forged(imgs=announced((H, W), body=grey.tobytes()[:99])),
        "2D_CT_imgs-no-array.npz": forged(imgs=b"not an array"),
        "2D_CT_imgs-no-header.npz": forged(imgs=announced((2, 2)).replace(b"(2, 2)", b"import")),
        "2D_CT_boxes-columns.npz": image(boxes=np.zeros((2, 5))),
        "2D_CT_boxes-text.npz": image(boxes=np.array([["a"] * 4])),
        "2D_CT_boxes-missing.npz": image(boxes=None),
        "2D_CT_boxes-objects.npz": image(boxes=objects),
        "2D_CT_gts-leading-axis.npz": image(gts=gts[None]),
        "2D_CT_gts-size.npz": image(gts=gts[:, 1:]),
        "2D_CT_gts-float.npz": image(gts=gts.astype(float)),
        "2D_CT_gts-empty.npz": image(gts=np.zeros(0, np.uint8)),
        "2D_CT_gts-missing.npz": image(gts=None),
        "3D_CT_gts-terabytes.npz": forged(gts=announced(TERABYTES, "<i8")),
        "2D_CT_file-empty.npz": b"",
        "2D_CT_file-text.npz": b"imgs,boxes\n1,2\n",
        "2D_CT_file-page.npz": b"<!DOCTYPE html><html><body>404</body></html>",
        "2D_CT_file-pointer.npz": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "2D_CT_file-cut.npz": packed(**image())[:-300],
        "2D_CT_file-one-array.npz": announced((H, W), body=grey.tobytes()),
    }


def wrong_numbers():
    """{file name: arrays or bytes} of what is refused once the numbers are read; the name says which field it is."""
    grey, boxes, gts = image()["imgs"], image()["boxes"], image()["gts"]
    return {
        "2D_CT_imgs-nan.npz": image(imgs=changed(grey.astype(np.float32), (3, 4), np.nan)),
        "2D_CT_imgs-infinite.npz": image(imgs=changed(grey.astype(np.float32), (3, 4), np.inf)),
        "2D_CT_imgs-above-255.npz": image(imgs=grey.astype(np.uint16) * 20),
        "2D_CT_imgs-below-0.npz": image(imgs=grey.astype(np.int16) - 100),
        "3D_CT_imgs-wrong-bit.npz": flipped(),
        "2D_CT_boxes-nan.npz": image(boxes=changed(boxes.astype(float), (1, 2), np.nan)),
        "2D_CT_boxes-reversed.npz": image(boxes=boxes[:, [2, 3, 0, 1]]),
        "2D_CT_boxes-outside.npz": image(boxes=boxes + 100),
        "3D_CT_boxes-reversed.npz": volume(boxes=volume()["boxes"][:, [0, 1, 5, 3, 4, 2]]),
        "2D_CT_gts-below-0.npz": image(gts=gts.astype(np.int16) - 1),
        "2D_CT_gts-above-65535.npz": image(gts=gts.astype(np.int64) * 70000),
        "3D_CT_spacing-zero.npz": volume(spacing=np.array([1.0, 0, 1])),
        "3D_CT_spacing-short.npz": volume(spacing=np.array([1.0, 1])),
        "3D_CT_spacing-missing.npz": volume(spacing=None),
    }


def fault_of(name: str) -> str:
    """The field that is wrong in a file of this corpus: imgs, boxes, gts, spacing or file; "" where nothing is.

    A script that does not need the field accepts the file: only inference reads boxes, only evaluation spacing. Yet
    Python objects and forged headers are refused by all, in whichever field, and evaluation does without imgs.
    """
    return "" if name in right_cases() else next(word for word in name.replace("_", "-").split("-")
                                                 if word in ("imgs", "boxes", "gts", "spacing", "file"))


def make(folder) -> dict[str, str]:
    """Write the corpus into a folder and return {file name: "ok" or "bad"}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {**right_cases(), **wrong_headers(), **wrong_numbers()}
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else packed(**content))
    return {name: "bad" if fault_of(name) else "ok" for name in files}


if __name__ == "__main__":
    print("\n".join(f"{kind:3} {name}" for name, kind in make(sys.argv[1]).items()))
