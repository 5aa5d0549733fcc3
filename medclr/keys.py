"""Names of the columns of a datalist row and of the entries of a batch.

A datalist row is a plain dictionary, as MONAI's are; these constants are the only place where its keys are spelled.
"""

from __future__ import annotations

from typing import Final

IMAGE: Final = "image"
LABEL: Final = "label"
PATIENT_ID: Final = "patient_id"
STUDY_ID: Final = "study_id"
SERIES_ID: Final = "series_id"
MODALITY: Final = "modality"
SEQUENCE: Final = "sequence"
DAYS: Final = "days"
SITE: Final = "site"
SCANNER: Final = "scanner"
AGE: Final = "age"
SEX: Final = "sex"
CONTENT: Final = "content"
"""Which voxels a scan has: equal ones are one scan, whatever the files are called."""

TRAINING: Final = "training"
VALIDATION: Final = "validation"
TEST: Final = "test"
SECTIONS: Final = (TRAINING, VALIDATION, TEST)

CROP_1: Final = "crop_1"
CROP_2: Final = "crop_2"
META: Final = "meta"
"""Key of a batch's metadata: a dictionary of tensors, so that it moves, gathers and queues like the rest.

Numbers and codes are int64, in which a negative one is a missing value; quantities are floats, in which NaN is.
"""

SAMPLE: Final = "sample"
"""(B,) one number a drawn pair; the two views of one pair share it."""
PATIENT: Final = "patient"
"""(B,) the patient's place in the datalist, never the text of an id."""
SCAN: Final = "scan"
"""(B, 2) the row of each view's scan in the datalist."""
STUDY: Final = "study"
"""(B, 2) the number of each view's study; studies of two patients differ whatever their ids."""
SERIES: Final = "series"
"""(B, 2) the number of each view's series."""

LOSS: Final = "loss"
PLATEAU: Final = "plateau"
"""What a method scores that has learnt nothing: the loss of embeddings that tell nothing apart."""
FEATURES: Final = "features"
PROJECTIONS: Final = "projections"
