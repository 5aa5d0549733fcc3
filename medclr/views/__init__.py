"""3D augmentation, batched and on the device: one recipe that is drawn twice."""

from medclr.views.blur import GaussianBlur
from medclr.views.cutout import CutOut
from medclr.views.intensity import ContrastBrightness, Gamma, GaussianNoise, HistogramShift, Requantise
from medclr.views.spatial import RandomSpatial
from medclr.views.two_views import TwoViews

__all__ = [
    "ContrastBrightness",
    "CutOut",
    "Gamma",
    "GaussianBlur",
    "GaussianNoise",
    "HistogramShift",
    "RandomSpatial",
    "Requantise",
    "TwoViews",
]
