"""How a pair of embeddings counts: positive with a weight, negative, or ignored."""

from medclr.affinity.kernels import Gaussian, Kernel, Same
from medclr.affinity.meta import VIEW, Meta, Pairs, of_views
from medclr.affinity.related import Counts, Related
from medclr.affinity.weighing import Affinity

__all__ = ["VIEW", "Affinity", "Counts", "Gaussian", "Kernel", "Meta", "Pairs", "Related", "Same", "of_views"]
