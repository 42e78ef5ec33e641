"""DICOM series, NRRD and MetaImage: geometry in and out, series to choose, gaps, real files, nobody's identity."""
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_user_files import dice, exact_volumes, run                    # fixtures  # noqa: F401

from medficient_mini.show.draw import colours
from medficient_mini.userfiles import convert
from medficient_mini.userfiles.volumes import list_images, load_labels, load_volume, parts_of, save_labels

sitk = pytest.importorskip("SimpleITK", reason="DICOM, NRRD and MetaImage are read by SimpleITK")
pytest.importorskip("nibabel", reason="slices are turned by nibabel")
pydicom = pytest.importorskip("pydicom", reason="the series are written by pydicom")
REAL = Path(pydicom.__file__).parent / "data" / "test_files"
PERSON = {"PatientName": "Mustermann^Erika", "PatientID": "PID-4711", "PatientBirthDate": "19640812",
          "InstitutionName": "Charite", "ReferringPhysicianName": "Sauerbruch^Ferdinand"}
TILTED = np.array([[0.96, 0.28, 0], [-0.28 * 0.8, 0.96 * 0.8, -0.6]])    # rows and columns of an oblique scan


def data_of(depth=6, high=900):
    """A bright box in a dark volume (D, H, W), in Hounsfield units."""
    data = np.full((depth, 20, 24), -800, np.int16)
    data[2:depth - 1, 5:13, 8:20] = high
    return data


def write_series(folder, data, directions=((1, 0, 0), (0, 1, 0)), step=2.5, uid="1.2.3", positions=None, **tags):
    """Write slices (D, H, W) as a CT series; slice k lies at positions[k] steps along the normal, or at the vector."""
    folder.mkdir(parents=True, exist_ok=True)
    directions = np.array(directions, float)
    normal = np.cross(*directions)
    for k, pixels in enumerate(data):
        slice_ = pydicom.dcmread(REAL / "CT_small.dcm")
        place = (k if positions is None else positions[k]) * step * normal if np.ndim(step) == 0 else k * np.array(step)
        slice_.Rows, slice_.Columns = pixels.shape
        slice_.RescaleIntercept, slice_.RescaleSlope = -1000, 2
        slice_.PixelData = ((pixels.astype(int) + 1000) // 2).astype(np.int16).tobytes()
        slice_.PixelSpacing, slice_.SliceThickness = [0.8, 0.7], 3
        slice_.ImageOrientationPatient = np.round(directions, 9).ravel().tolist()
        slice_.ImagePositionPatient = np.round(np.array([-30, 12, 7.5]) + place, 9).tolist()
        slice_.SeriesInstanceUID, slice_.SOPInstanceUID = uid, f"{uid}.{k + 1}"
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        slice_.SeriesDescription = "Axial 2.5"
        for name, value in {**PERSON, **tags}.items():
            setattr(slice_, name, value)
        slice_.save_as(folder / f"{uid}_{(7 * k) % len(data):03}")                 # in another order than in the patient
    return folder


def write_itk(path, data, shear=0.0):
    image = sitk.GetImageFromArray(data)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-30, 12, 7.5))
    third = np.cross(*TILTED) + shear * TILTED[1]
    image.SetDirection(np.stack([*TILTED, third / np.linalg.norm(third)], 1).ravel())
    sitk.WriteImage(image, str(path), True)
    return path


def geometry(image):
    return np.array([*image.GetSize(), *image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()])


def fails(words, function, *arguments):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line.startswith(f"{Path(arguments[0]).name}: ") and "\n" not in line and words in line, line
    return line


@pytest.mark.parametrize("directions, step", [(((1, 0, 0), (0, 1, 0)), 2.5), (TILTED, 2.5),
                                              (((1, 0, 0), (0, 0, -1)), 4), (((1, 0, 0), (0, 1, 0)), (0, 0.9, 2.5))],
                         ids=["straight", "oblique", "coronal", "gantry"])
def test_a_series_is_read_and_its_mask_lies_on_it(tmp_path, run, exact_volumes, directions, step):      # noqa: F811
    data = data_of()
    folder = write_series(tmp_path / "ct", data, directions, step)
    (folder / "notes.txt").write_text("not an image")
    out, err = run("-i", folder, "-o", tmp_path / "out", "--box", 6, 3, 1, 21, 15, 5, "--window", 50, 1700)
    assert "1 segmented" in out and not err
    mask = sitk.ReadImage(str(tmp_path / "out/ct_mask.nrrd"))
    assert (sitk.GetArrayFromImage(mask) == (data == 900)).all()
    third = np.cross(*np.array(directions)) * step if np.ndim(step) == 0 else np.array(step)
    affine = np.reshape(mask.GetDirection(), (3, 3)) * mask.GetSpacing()
    assert np.allclose(affine, np.stack([np.array(directions[0]) * 0.7, np.array(directions[1]) * 0.8, third], 1), atol=1e-4)
    assert np.allclose(mask.GetOrigin(), (-30, 12, 7.5), atol=1e-4)
    with np.load(tmp_path / "out/ct.npz") as file:
        assert np.allclose(np.sort(file["spacing"]), np.sort([np.linalg.norm(third), 0.8, 0.7]))
    if np.ndim(step) == 0:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        image = reader.Execute()
        assert np.allclose(geometry(mask), geometry(image), atol=1e-4)
        there = sitk.GetArrayFromImage(sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor))
        assert dice(there == 1, sitk.GetArrayFromImage(image) == 900) == 1
    assert "1 skipped" in run("-i", folder, "-o", tmp_path / "out", "--box", 6, 3, 1, 21, 15, 5, "--window", 50, 1700)[0]


@pytest.mark.parametrize("ending, result", [("nrrd", "nrrd"), ("mha", "mha"), ("mhd", "mha")])
@pytest.mark.parametrize("shear", [0, 0.2])
def test_other_formats_come_back_as_theirs(tmp_path, run, exact_volumes, ending, result, shear):        # noqa: F811
    data = data_of().astype(np.float32)
    path = write_itk(tmp_path / f"v.{ending}", data, shear)
    (tmp_path / "v.notes").mkdir()                            # a folder is no part of a volume
    words = "-i", path, "-o", tmp_path / "out", "--axis", "coronal", "--box", 6, 3, 1, 21, 15, 5, "--window", 50, 1700
    out, err = run(*words)
    assert "1 segmented" in out and not err
    mask, image = (sitk.ReadImage(str(p)) for p in (tmp_path / f"out/v_mask.{result}", path))
    assert np.allclose(geometry(mask), geometry(image), atol=1e-4) and mask.GetPixelID() == sitk.sitkUInt8
    assert (sitk.GetArrayFromImage(mask) == (data == 900)).all()
    if ending == "mhd":                                       # the numbers lie in another file
        write_itk(path, data_of(high=890).astype(np.float32), shear)
        assert "done again: other input" in run(*words)[0]


def test_labels_have_slicers_names_and_colours(tmp_path):
    volume, grid, _ = load_volume(write_itk(tmp_path / "v.nrrd", data_of()), "sagittal")
    labels = (np.arange(volume.size).reshape(volume.shape) % 301).astype(np.uint16)
    save_labels(tmp_path / "m.nrrd", labels, grid)
    mask = sitk.ReadImage(str(tmp_path / "m.nrrd"))
    assert mask.GetPixelID() == sitk.sitkUInt16 and (load_labels(tmp_path / "m.nrrd", grid) == labels).all()
    for k, colour in enumerate(colours(301)[1:]):
        assert mask.GetMetaData(f"Segment{k}_Name") == f"object {k + 1}"
        assert mask.GetMetaData(f"Segment{k}_LabelValue") == str(k + 1)
        assert np.allclose([float(part) for part in mask.GetMetaData(f"Segment{k}_Color").split()], colour / 255)


def test_hounsfield_units_and_a_negative(tmp_path):
    folder = write_series(tmp_path / "ct", data_of())
    volume, _, text = load_volume(folder, window=(50, 1700))
    assert set(np.unique(volume)) == {0, 255} and text == "window level 50 width 1700"
    assert "-800 to 900" in load_volume(folder)[2]
    turned, _, _ = load_volume(write_series(tmp_path / "negative", data_of(), PhotometricInterpretation="MONOCHROME1"))
    assert (load_volume(folder)[0] > 99).any() and ((turned > 99) == (load_volume(folder)[0] < 99)).all()


def test_each_slice_has_its_own_slope(tmp_path):
    """PET series: the same stored number means another activity in each slice."""
    folder = write_series(tmp_path / "pet", np.full((3, 20, 24), 1000))
    for k, path in enumerate(sorted(folder.iterdir())):
        slice_ = pydicom.dcmread(path)
        slice_.RescaleIntercept, slice_.RescaleSlope = 0, 0.25 * (slice_.ImagePositionPatient[2] > 8) + 0.25
        slice_.save_as(path)
    volume, _, _ = load_volume(folder, window=(250, 500))
    assert [int(v) for v in volume[:, 0, 0]] == [128, 255, 255]


@pytest.mark.parametrize("positions", [(0, 1, 2, 4, 5, 6), (0, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5.4), (0, 1, 2, 2, 3, 4),
                                       (0, 0, 1, 1, 2, 2), (0,) * 6], ids=str)
def test_gaps_are_one_line(tmp_path, positions):
    fails("series: expected slices at even distances, found", load_volume,
          write_series(tmp_path / "ct", data_of(), TILTED, positions=positions))


def test_small_unevenness_is_rounding(tmp_path):
    folder = write_series(tmp_path / "ct", data_of(), step=0.625, positions=np.round(np.arange(6) * 0.625, 1) / 0.625)
    assert load_volume(folder)[1].spacing[0] == pytest.approx(3.1 / 5)


def test_several_series_are_listed_and_one_is_picked(tmp_path, run, exact_volumes):                      # noqa: F811
    write_series(tmp_path / "ct", data_of())
    write_series(tmp_path / "ct", data_of(8), uid="1.2.4", step=1.5, SeriesDescription="Lunge, dünn")
    words = "-i", tmp_path / "ct", "-o", tmp_path / "out", "--box", 6, 3, 1, 21, 15, 7
    out, err = run(*words, code=1)
    assert err == ["ct: series: expected --series with the number of one, found 1: Axial 2.5, 6 slices; "
                   "2: Lunge, d\\udcfcnn, 8 slices"] or "2: Lunge, dünn, 8 slices" in err[0]
    for number in (0, 3, -1):
        assert "found 1: Axial" in run(*words, "--series", number, code=1)[1][0]
    assert "1 segmented" in run(*words, "--series", 2)[0]
    assert sitk.ReadImage(str(tmp_path / "out/ct_mask.nrrd")).GetSize() == (24, 20, 8)
    assert "done again: other series" in run(*words, "--series", 1)[0]
    fails("found 1: Axial", load_volume, write_series(tmp_path / "one", data_of()), "axial", None, 0)


def test_slices_that_do_not_fit_together_are_one_line(tmp_path):
    write_series(tmp_path / "ct", data_of())
    write_series(tmp_path / "ct", data_of()[:, :, 1:])
    write_series(tmp_path / "turned", data_of(3), uid="1.2.4")
    write_series(tmp_path / "turned", data_of(3)[:1], ((0, 1, 0), (0, 0, -1)), uid="1.2.4")
    for name in ("ct", "turned"):
        if name == "ct":
            for path in sorted((tmp_path / name).iterdir())[:3]:
                slice_ = pydicom.dcmread(path)
                slice_.Columns, slice_.PixelData = 12, slice_.PixelData[:12 * 20 * 2]
                slice_.save_as(path)
        fails("series: expected slices of one size and direction", load_volume, tmp_path / name)


def test_folders_of_patients_are_a_case_each(tmp_path, run, exact_volumes):                              # noqa: F811
    """A table names the folders; pictures beside them are cases of their own, results of an earlier run are none."""
    for name in ("anna", "ben", "sub/carl"):
        write_series(tmp_path / "in" / name, data_of())
    shutil.copy(Path(__file__).parents[2] / "medficient_mini/pictures/cases.jpg", tmp_path / "in")
    assert [path.name for path in list_images(tmp_path / "in")] == ["anna", "ben", "cases.jpg", "carl"]
    table = tmp_path / "boxes.csv"
    table.write_text("anna,6,3,1,21,15,5\nsub/carl,6,3,1,21,15,5\n")
    for done in ("2 segmented", "2 skipped"):
        out, err = run("-i", tmp_path / "in", "-o", tmp_path / "in/out", "--boxes", table)
        assert done in out and not err
    assert {path.name for path in (tmp_path / "in/out").glob("*.nrrd")} == {"anna_mask.nrrd", "carl_mask.nrrd"}
    assert "1 segmented" in run("-i", tmp_path / "in/anna", "-o", tmp_path / "one", "--boxes", table, code=0)[0]
    assert "expected files that end in .npz" in run("-i", tmp_path / "in/anna", "-o", tmp_path / "x", code=1)[1][0]


def test_a_folder_from_within_and_a_file_have_names(tmp_path, run, exact_volumes, monkeypatch):          # noqa: F811
    folder = write_series(tmp_path / "ct", data_of())
    monkeypatch.chdir(folder)
    run("-i", ".", "-o", tmp_path / "out", "--box", 6, 3, 1, 21, 15, 5)
    assert (tmp_path / "out/ct_mask.nrrd").exists()
    shutil.copy(REAL / "CT_small.dcm", tmp_path / "one.dcm")
    run("-i", tmp_path / "one.dcm", "-o", tmp_path / "out", "--box", 6, 3, 0, 21, 15, 0)
    assert sitk.ReadImage(str(tmp_path / "out/one_mask.nrrd")).GetSize() == (128, 128, 1)


def test_series_and_masks_are_converted(tmp_path, capsys):
    write_series(tmp_path / "i/anna", data_of())
    write_itk(tmp_path / "i/ben.mha", data_of())
    for name in ("anna", "ben.mha"):
        volume, grid, _ = load_volume(tmp_path / "i" / name)
        (tmp_path / "g").mkdir(exist_ok=True)
        save_labels(tmp_path / "g" / f"{name[:4].strip('.')}_seg.nrrd", (volume > 99).astype(np.uint8), grid)
    words = ["-i", tmp_path / "i", "-g", tmp_path / "g", "-o", tmp_path / "o", "--modality", "CT"]
    assert not convert.main([*map(str, words)]), capsys.readouterr()
    for name in ("anna", "ben"):
        with np.load(tmp_path / f"o/3D_CT_{name}.npz") as file:
            assert ((file["imgs"] > 99) == file["gts"]).all() and sorted(file["spacing"]) == pytest.approx([0.7, 0.8, 2.5])
    words[1::2] = tmp_path / "i/anna", tmp_path / "g/anna_seg.nrrd", tmp_path / "o2", "CT"
    assert not convert.main([*map(str, words)]) and (tmp_path / "o2/3D_CT_anna.npz").exists()
    capsys.readouterr()


def test_nothing_of_the_patient_is_copied(tmp_path, run, exact_volumes):                                 # noqa: F811
    """Not from DICOM, whose fields name the patient, nor from what other programs copied into NRRD and NIfTI headers."""
    nib = pytest.importorskip("nibabel")
    write_series(tmp_path / "in/ct", data_of())
    write_series(tmp_path / "in/bad", data_of(), positions=(0, 1, 2, 4, 5, 6))
    image = sitk.GetImageFromArray(data_of())
    for name, value in PERSON.items():
        image.SetMetaData(name, value)
    for ending in ("nrrd", "mha"):
        sitk.WriteImage(image, str(tmp_path / f"in/other_{ending}.{ending}"))
    nifti = nib.Nifti1Image(data_of().T, np.eye(4))
    nifti.header["descrip"], nifti.header["db_name"] = PERSON["PatientName"], PERSON["PatientID"]
    nifti.header["aux_file"], nifti.header["intent_name"] = PERSON["PatientBirthDate"], "Charite"
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Mustermann^Erika"))
    nib.save(nifti, tmp_path / "in/scan.nii")
    out, err = run("-i", tmp_path / "in", "-o", tmp_path / "out", "--box", 6, 3, 1, 21, 15, 5, "--separate", code=1)
    assert "4 segmented" in out and len(err) == 1
    said = (out + "".join(err)).encode()
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for path in (tmp_path / "out").glob("*.npz"):
        with np.load(path) as file:
            written += [file[name].tobytes() for name in file.files] + [str(file["made_with"]).encode()]
    written += [sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "raw.nrrd")) or (tmp_path / "raw.nrrd").read_bytes()
                for path in (tmp_path / "out").glob("*.nrrd")]
    written += [nib.load(tmp_path / "out/scan_mask.nii.gz").header.binaryblock]
    assert not nib.load(tmp_path / "out/scan_mask.nii.gz").header.extensions and len(written) > 12
    for word in ("Mustermann", "Erika", "PID-4711", "19640812", "Charite", "Sauerbruch"):
        assert word.encode() not in said and not any(word.encode() in data for data in written), word


# What is no grey image with a header, among the files that pydicom tests itself with; all others are read.
NOT_READ = ("ExplVR", "GDCMJ2K", "JPEG2000-embedded", "MR_truncated", "SC_", "UN_seq", "empty_char", "examples_jpeg2k",
            "examples_palette", "examples_rgb", "examples_ybr", "meta_miss", "nested", "no_meta", "priv", "report", "rt",
            "test", "waveform", "crayons", "README", "zipMR")


def test_real_files(capfd):
    """Each is read or ends in one line, and the decoders say nothing beside it."""
    read, refused = [], []
    for path in sorted(path for path in REAL.iterdir() if path.is_file()):
        try:
            volume, grid, _ = load_volume(path)
            assert 1 in volume.shape and volume.dtype == np.uint8
            read.append(path.name)
        except ValueError as error:
            assert str(error).startswith(f"{path.name}: ") and "\n" not in str(error)
            refused.append(path.name)
    out, err = capfd.readouterr()
    assert not out and not err
    assert all(name.startswith(NOT_READ) for name in refused) and not any(name.startswith(NOT_READ) for name in read)
    assert {"CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "JPEG-lossy.dcm", "693_J2KI.dcm"} <= set(read)
    assert np.array_equal(load_volume(REAL / "MR_small.dcm")[0], load_volume(REAL / "MR_small_jpeg_ls_lossless.dcm")[0])


def test_real_folders(tmp_path, run, exact_volumes):                                                     # noqa: F811
    """What is no series of images: pictures without pixels; reports beside images, and a CD's DICOMDIR, are no obstacle."""
    out, err = run("-i", REAL / "dicomdirtests", "-o", tmp_path / "out", "--box", 1, 1, 0, 9, 9, 0, code=1)
    assert "4 segmented" in out and len(err) == 7 and all(line.count("expected") == 1 for line in err)
    write_series(tmp_path / "ct", data_of())
    for name in ("rtstruct.dcm", "reportsi.dcm", "rtplan.dcm"):
        shutil.copy(REAL / name, tmp_path / "ct")
    assert load_volume(tmp_path / "ct")[0].shape == (6, 20, 24)


def test_what_is_left_out_of_a_series_is_said(tmp_path, capfd):
    folder = write_series(tmp_path / "ct", data_of())
    first = sorted(folder.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-200])
    assert load_volume(folder)[0].shape == (5, 20, 24)
    assert "ct: series: expected slices in grey, found 1 of 6 DICOM files without one" in capfd.readouterr().err


def test_the_numbers_of_a_header_may_bear_another_name(tmp_path):
    data, found = data_of(), []
    for ending, field in (("mhd", "ElementDataFile = {}"), ("nrrd", "data file: {}")):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / "numbers.bin").write_bytes(data.tobytes())
        header = {"mhd": "NDims = 3\nDimSize = 24 20 6\nElementType = MET_SHORT\n",
                  "nrrd": "NRRD0004\ntype: short\ndimension: 3\nsizes: 24 20 6\nendian: little\nencoding: raw\n"
                          "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"}[ending]
        path = folder / f"v.{ending}"
        path.write_text(header + field.format("numbers.bin") + "\n")
        assert parts_of(path) == [path, folder / "numbers.bin"]
        found.append(load_volume(path)[0])
    assert np.array_equal(*found) and np.ptp(found[0]) == 255


def test_255_objects_have_their_names(tmp_path):
    """One more than the largest label is no uint8."""
    path = write_itk(tmp_path / "v.nrrd", data_of())
    _, grid, _ = load_volume(path)
    segs = np.zeros(grid.size, np.uint8)
    segs.flat[:255] = np.arange(1, 256)
    save_labels(tmp_path / "m.nrrd", segs, grid)
    assert sitk.ReadImage(str(tmp_path / "m.nrrd")).GetMetaData("Segment254_Name") == "object 255"


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_damaged_volumes_are_one_line(tmp_path, ending, capfd):                 # fault 31's brother: wrong checksums
    noise = np.random.default_rng(0).integers(0, 999, (20, 21, 22)).astype(np.int16)
    whole = write_itk(tmp_path / f"a.{ending}", noise).read_bytes()
    path = tmp_path / f"b.{ending}"
    zeros = whole[:-300] + bytes(100) + whole[-200:]
    for data in (b"", b"hello", whole[:60], whole[:-300], whole[:-3], zeros, whole.replace(b"22 21 20", b"2200 2100 2000")):
        path.write_bytes(data)
        fails("expected a", load_volume, path)
    for name, image in (("flat", noise[0]), ("series", np.stack([noise] * 2)), ("colour", np.stack([noise] * 3, -1))):
        image = sitk.GetImageFromArray(image, isVector=name == "colour")
        sitk.WriteImage(image, str(path))
        fails("expected a 3D volume", load_volume, path)
    fails("expected", load_volume, tmp_path / f"absent.{ending}")
    assert capfd.readouterr().err == ""


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    paths = write_itk(tmp_path / "v.nrrd", data_of()), write_series(tmp_path / "ct", data_of())
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for path in paths:
        assert fails("", load_volume, path).endswith("pip install SimpleITK")
