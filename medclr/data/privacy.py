"""What keeps patients private: keyed pseudonyms, days instead of dates, references instead of paths that hold names.

Everything here is the same for DICOM, NIfTI and BIDS. The secret is one key file in :func:`private_home`; with it, and
with the map of references beside it, whoever holds them can find the way back, and nobody else can.
"""

from medclr.data.privacy_dates import OLDEST, capped_age, days_since_first, parse_date
from medclr.data.privacy_key import HOME_VARIABLE, Pseudonyms, private_home
from medclr.data.privacy_map import References, has_reference, locate
from medclr.data.privacy_nifti import export_nifti
from medclr.data.privacy_text import described, is_private_column

__all__ = [
    "HOME_VARIABLE",
    "OLDEST",
    "Pseudonyms",
    "References",
    "capped_age",
    "days_since_first",
    "described",
    "export_nifti",
    "has_reference",
    "is_private_column",
    "locate",
    "parse_date",
    "private_home",
]
