"""Names of files: which patient they tell, and in which form they are compared."""
import re
import unicodedata
from pathlib import Path

PREFIX = re.compile(r"^[23]D(Box)?_[^_.]+_")                 # dimension and modality, as in 3D_CT_STS_001
SLICE = re.compile(r"(?<![a-z])(slice|slc|sl|frame|layer|z)[-_ ]*\d+.*|-(image|img)[-_ ]*\d+$", re.IGNORECASE)
BARE = re.compile(r"(image|img|im)?[-_ ]*\d+", re.IGNORECASE)
# The shortest beginning that ends with a word for a patient and its number or letter, whatever follows, or with a
# field that counts patients before fields that count slices or name one side of a pair. Numbers behind a data set's
# name must not be a year or the end of a word (ISIC_2017_0001, D2020_001, COVID-19_001).
NUMBERED = re.compile(r"""
    ( .*? (?: (?<![^-_ ]) (?: pt|pat|patient|case|sub|subj|subject|p ) (?: [-_ ]?\d+ | (?-i: [A-Z] ) ) (?= [-_ ] )
        | (?: (?<![^-_]) (?: id|vol|volume|img|image|scan|study|video|vid|seq ) [-_]? \d+
            | (?<![^-_]) [a-z] (?! (?:19|20)\d\d[-_] ) \d{2,}
            | ^ \d+
            | (?<=_) (?! (?:19|20)\d\d[-_] ) \d+
            | (?<=-) (?! (?:19|20)\d\d[-_] ) \d{3,} )
          (?= (?: [-_] (?: [a-z]*\d+ | l | r | left | right | od | os ) )+ $ ) ) )""", re.IGNORECASE | re.VERBOSE)


def composed(name: str) -> str:
    """Return a file name with each accented letter as one character (Unicode's form NFC): macOS writes two."""
    return unicodedata.normalize("NFC", name)


def patient_of(name: str, pattern: str | None = None) -> str:
    """Guess the key that all files of one patient share, from a file name or path: training splits by patient.

    2D_CT_CURVAS_10001-458 and 2D_CT_CURVAS_10001-509 are slices of CURVAS_10001; 3D_CT_STS_001 and 3D_PET_STS_001 are
    STS_001; P001_slice01 is P001. A name that may as well count patients, as COVID-01, is a patient of its own; a file
    named after its slice alone belongs to its folder. A `pattern` finds the patient instead: a regular expression's
    first group, or all that it matches. ValueError if it is no regular expression, or does not match.
    """
    path = Path(name)
    stem = path.name.removesuffix(".npz")
    if pattern is not None:
        try:
            found = re.search(pattern, stem)
        except re.error as error:
            raise ValueError(f"patient pattern: expected a regular expression, found {pattern!r} ({error})") from None
        patient = found and found[found.re.groups > 0]
        if not patient:
            raise ValueError(f"{path.name}: patient: expected a name that {pattern!r} matches")
        return patient
    rest = PREFIX.sub("", stem)
    named = "" if BARE.fullmatch(rest) else SLICE.sub("", rest).rstrip("-_ ")
    rest = named or path.parent.name or rest
    numbered = NUMBERED.match(rest)
    return numbered[1] if numbered else rest
