"""Re-export until the importers name pictures.py and nifti.py themselves."""
from .nifti import Grid, grid_of, load_label_nifti, load_nifti, save_label_nifti  # noqa: F401
from .pictures import (AXES, PICTURES, VOLUMES, WINDOWS, intensity_range, is_nifti, is_picture, list_files,  # noqa: F401
                       load_label_picture, load_picture, parse_window, read_pixels, save_label_picture, stem_of, to_uint8)
