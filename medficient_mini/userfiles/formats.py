"""Re-export until the importers name pictures.py and nifti.py themselves."""
from .nifti import AXES, Grid, grid_of, load_label_nifti, load_nifti, save_label_nifti  # noqa: F401
from .labels import load_label_picture  # noqa: F401
from .pictures import (PICTURES, VOLUMES, WINDOWS, is_nifti, list_files, load_picture,  # noqa: F401
                        parse_window, save_label_picture, stem_of)
