"""The scores and times that MedficientSAM's paper reports, for the columns beside one's own.

Table 4: percent on the challenge's public validation set, DSC and NSD of each network, as the README of the team that
reproduced it copies them (github.com/RicoLeehdu/medficientsam-reproduce; "-R" seems to be their run), since the paper's
text was in no source at hand. The nine rows give the averages within 0.01; those of L1 are in the paper's abstract.

Table 5: mean seconds of a 2D and a 3D case on an Intel Core i9-10900K; L1 from the abstract, LiteMedSAM from the copy.
"""

NETWORKS = ("LiteMedSAM", "Distillation", "Distillation-R", "No Augmentation", "No Augmentation-R",
            "MedficientSAM-L1", "MedficientSAM-L1-R")
TABLE_4 = """
CT                       92.26 94.90  91.13 93.75  92.15 94.74  92.24 94.71  92.69 95.50  92.15 94.80  93.19 95.78
MR                       89.63 93.37  85.73 89.75  87.87 91.40  87.25 90.88  88.54 92.21  86.98 90.77  89.51 92.99
PET                      51.58 25.17  70.49 54.52  68.30 50.17  72.05 56.26  61.06 49.13  73.00 58.03  66.97 52.52
US                       94.77 96.81  84.43 89.29  84.52 89.37  81.99 86.74  82.41 87.16  82.50 87.24  81.39 86.09
XRay                     75.83 80.39  78.92 84.64  75.40 80.38  79.88 85.73  78.04 83.10  80.47 86.23  75.78 80.88
Dermoscopy               92.47 93.85  92.84 94.16  92.54 93.88  94.24 95.62  93.71 95.19  94.16 95.54  93.17 94.62
Endoscopy                96.04 98.11  96.88 98.81  95.92 98.16  96.05 98.33  95.58 98.07  96.10 98.37  94.62 97.26
Fundus                   94.81 96.41  94.10 95.83  93.85 95.54  94.16 95.89  94.27 96.00  94.32 96.05  94.16 95.90
Microscopy               61.63 65.38  75.63 82.15  75.90 82.45  78.76 85.22  78.09 84.48  78.09 84.47  77.67 84.11
average over modalities  83.23 82.71  85.57 86.99  85.16 86.23  86.29 87.71  84.93 86.76  86.42 87.95  85.16 86.68
"""
SECONDS = {"published: LiteMedSAM": {"2D": 5.1, "3D": 42.6},
           "published: MedficientSAM-L1": {"2D": 1.0083, "3D": 8.9585}}


def published_scores() -> dict[tuple[str, str], dict[str, float]]:
    """Return the columns of Table 4: ("published: " network, "dsc" or "nsd") -> {modality or average: percent}."""
    lines = [line.rsplit(maxsplit=2 * len(NETWORKS)) for line in TABLE_4.strip().splitlines()]
    targets, *columns = zip(*lines)
    keys = [(f"published: {network}", key) for network in NETWORKS for key in ("dsc", "nsd")]
    return {key: dict(zip(targets, map(float, column))) for key, column in zip(keys, columns)}
