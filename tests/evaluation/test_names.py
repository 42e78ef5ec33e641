"""The guess of the patient from a file name."""
import pytest

from medficient_mini.inference.names import patient_of


@pytest.mark.parametrize("patient, names", [                                  # fault 20, and fault 4 in the tables
    ("CURVAS_10001", ["2D_CT_CURVAS_10001-458.npz", "2D_CT_CURVAS_10001-509"]),
    ("STS_001", ["3D_CT_STS_001.npz", "3D_PET_STS_001.npz", "folder/3D_MR_STS_001.npz"]),
    ("DukeDME_S08", ["2D_OCT_DukeDME_S08-f01", "2D_OCT_DukeDME_S08-f02"]),
    ("P001", ["P001_slice01", "P001_slice02.npz", "2D_CT_P001_slice_03", "P001-z04", "P001_T1_slice05"]),
    ("case001", ["case001_z045", "2DBox_MR_case001_z046", "case001_12"]),
    ("10001", ["10001_458", "10001_509", "2D_CT_10001-1"]),
    ("patient1", ["patient1-slice_01", "patient1-slice_02", "patient1/slice_03.npz"]),
    ("patient_1", ["patient_1_07", "patient_1_frame_8"]),
    ("LIDC-IDRI-0001", ["LIDC-IDRI-0001_slice012", "LIDC-IDRI-0001_13", "LIDC-IDRI-0001-14"]),
    ("TCGA_CS_4941", ["TCGA_CS_4941_19960909_12", "TCGA_CS_4941_19960909_13"]),
    ("UWMGI_case118", ["2D_MR_UWMGI_case118-day14-slice-0097", "2D_MR_UWMGI_case118-day20-slice-0050"]),
    ("eyes_017", ["eyes_017_L", "eyes_017_right", "eyes_017_od"]),
    ("p1", ["p1/000.npz", "p1/image001.npz", "p1/2D_CT_001.npz", "p1/2D_CT_img_02.npz", "x/p1/frame3"]),
    ("anna", ["anna/01.npz", "2D_MR_anna-img_0001", "2D_MR_anna-image12", "2D_MR_anna-frame3"]),
    ("patientA", ["patientA_12", "2D_MR_patientA-13"]), ("video3", ["video3-22", "2D_Endoscopy_video3_23"]),
    ("case_007", ["case_007_axial_120", "case_007_axial_121"]), ("P1", ["2D_CT_P1_sagittal-12", "P1_coronal-12"]),
    ("sub-01", ["sub-01_T1w_s045", "sub-01_ses-02_T2w_046"]), ("case001", ["case001 (1)", "case001 (2)"]),
    ("mdb_CALC_P_00005", ["mdb_CALC_P_00005_LEFT_CC", "mdb_CALC_P_00005_RIGHT_MLO"]),
    ("p10", ["p10_s50_img1", "p10_s51_img2"]), ("P10", ["2D_XRay_P10_1001", "2D_XRay_P10_1002"]),
    ("Case 7", ["Case 7 image 3", "Case 7 image 4"]),
])
def test_slices_of_one_patient_share_a_key(patient, names):
    assert {patient_of(name) for name in names} == {patient}


@pytest.mark.parametrize("names", [
    ["2D_CT_IRCAD_Tr-001", "2D_CT_IRCAD_Tr-002"], ["2D_US_HC18_427", "2D_US_HC18_735"], ["HC18_427", "HC18_735"],
    ["2D_Microscopy_DSB2018_091944f1", "2D_Microscopy_DSB2018_14cc1424"], ["3D_MR_BraTS20_Training_001",
                                                                          "3D_MR_BraTS20_Training_002"],
    ["ISIC_2017_0001", "ISIC_2017_0002"], ["COVID-19_001", "COVID-19_002"], ["slice_01", "slice_02"], ["a", "b"],
    ["2D_CT_IRCAD_10006-46", "2D_CT_IRCAD_10010-39"], ["2D_MR_T1_001", "2D_MR_T1_002"], ["001", "002"],
    ["p1/000", "p2/000"], ["p1/2D_CT_001", "p2/2D_CT_001"], ["2D_MR_D2020_001", "2D_MR_D2020_002"],
    ["2D_US_BUSI_benign (1)", "2D_US_BUSI_benign (2)"], ["2D_CT_img12_3", "2D_CT_img13_3"],
    ["cases_12", "cases_13"], ["2D_US_case-1", "2D_US_case-2"]])
def test_patients_with_alike_names_stay_apart(names):
    assert len({patient_of(name) for name in names}) == len(names)


def test_a_pattern_of_the_user_decides():
    assert patient_of("a/x7-y9.npz", r"y(\d)") == "9" and patient_of("x7-y9", r"x\d") == "x7"
    with pytest.raises(ValueError, match="z.npz: patient: expected a name that"):
        patient_of("z.npz", r"y(\d)")
    with pytest.raises(ValueError, match="expected a regular expression"):
        patient_of("z", "(")
