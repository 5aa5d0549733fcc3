"""Is the embedding space healthy, and does it know a patient again?

Functions of a table of embeddings, and the ignite metric that collects such a table over a validation run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ignite.metrics import Metric
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances
from torch import Tensor
from torch.nn.functional import normalize

from medclr.draws import stable_seed
from medclr.errors import DatalistError, MedclrError


def alignment(z_1: Tensor, z_2: Tensor) -> float:
    """Mean squared distance of positive pairs on the unit sphere, 0 to 4, lower is closer (arXiv:2005.10242).

    Args:
        z_1: (N, D), normalised here.
        z_2: (N, D), row i the partner of row i of ``z_1``.
    """
    return float((normalize(z_1.float(), dim=1) - normalize(z_2.float(), dim=1)).square().sum(dim=1).mean())


def uniformity(z: Tensor, t: float = 2.0) -> float:
    """Logarithm of the mean Gaussian potential of all pairs on the unit sphere, 0 if collapsed, lower is more spread.

    arXiv:2005.10242, with its t = 2.

    Args:
        z: (N, D), N >= 2, normalised here.
        t: width of the potential.
    """
    return float(torch.pdist(normalize(z.float(), dim=1)).square().mul(-t).exp().mean().log())


def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values, 1 to min(N, D) (RankMe, arXiv:2210.02885).

    The mean embedding is removed first, so that a common offset does not count as a direction.

    Args:
        z: (N, D), normalised here; NaN is given back for embeddings that are not finite.
    """
    unit = normalize(z.float(), dim=1)
    if not bool(unit.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(unit - unit.mean(dim=0))
    # Collapsed embeddings differ by rounding, which points everywhere and must not pass for many directions.
    if float(values.norm()) <= 1e-5 * len(z) ** 0.5:
        return 1.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def dimension_std(z: Tensor) -> float:
    """Mean standard deviation of a dimension on the unit sphere, times sqrt(D): 1 if spread evenly, 0 if collapsed.

    arXiv:2011.10566, section 4.1.

    Args:
        z: (N, D), normalised here.
    """
    return float(normalize(z.float(), dim=1).std(dim=0, unbiased=False).mean() * z.shape[1] ** 0.5)


def pair_recall(
    embeddings: NDArray[np.floating[Any]], patients: NDArray[Any], metric: str = "cosine"
) -> NDArray[np.float64]:
    """For each scan of a patient with another scan: is its nearest neighbour another scan of that patient?

    Args:
        embeddings: (N, F).
        patients: (N,) one value a scan.
        metric: what near means, a name of scikit-learn's ``pairwise_distances``.

    Returns:
        (P,) one number a patient with two or more scans: the share of its scans that find it.
    """
    distances = pairwise_distances(np.asarray(embeddings, dtype=np.float64), metric=metric)
    np.fill_diagonal(distances, np.inf)
    found = patients[distances.argmin(axis=1)] == patients
    names, inverse, counts = np.unique(patients, return_inverse=True, return_counts=True)
    return np.array([found[inverse == place].mean() for place in range(len(names)) if counts[place] >= 2])


def bootstrap_interval(
    values: NDArray[np.float64], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent ``values`` (one a patient)."""
    random = np.random.default_rng(stable_seed("bootstrap", seed))
    means = values[random.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def embedding_report(embeddings: Tensor, patients: Tensor) -> dict[str, float]:
    """All metrics of a table of scans.

    Args:
        embeddings: (N, F), one row a scan.
        patients: (N,) one number a scan's patient.

    Returns:
        ``effective_rank``, ``dimension_std``, ``uniformity``; and where patients have two scans or more ``alignment``
        of their first two, ``pair_recall`` with ``pair_recall_low`` and ``_high`` (95%, bootstrap over patients), and
        ``pair_recall_chance``, what a random neighbour would give.
    """
    report = {
        "effective_rank": effective_rank(embeddings),
        "dimension_std": dimension_std(embeddings),
        "uniformity": uniformity(embeddings),
    }
    table, names = embeddings.float().cpu().numpy(), patients.cpu().numpy()
    places = [np.flatnonzero(names == name) for name in np.unique(names)]
    several = [place for place in places if len(place) >= 2]
    if several:
        first, second = (torch.from_numpy(table[[place[turn] for place in several]]) for turn in (0, 1))
        recall = pair_recall(table, names)
        low, high = bootstrap_interval(recall)
        chance = float(np.mean([(len(place) - 1) / (len(names) - 1) for place in several]))
        report |= {
            "alignment": alignment(first, second),
            "pair_recall": float(recall.mean()),
            "pair_recall_low": low,
            "pair_recall_high": high,
            "pair_recall_chance": chance,
        }
    return report


class EmbeddingMetric(Metric):
    """Collect the embeddings of a validation run; the value is ``embedding_report``'s ``key``, the rest go beside it.

    Args:
        key: the number that decides which checkpoint is best.
        output_transform: engine output to (embeddings (B, F), patients (B,)).
        device: where ignite keeps its state.

    Raises:
        DatalistError: where nothing was collected, or ``key`` needs patients with two scans and there are none.
        MedclrError: for embeddings that are not finite.
    """

    def __init__(
        self,
        key: str = "pair_recall",
        output_transform: Callable[[Any], Any] = lambda output: (output["pred"], output["label"]),
        device: str | torch.device = "cpu",
    ) -> None:
        self.key = key
        self.report: dict[str, float] = {}
        super().__init__(output_transform, device=device)

    def reset(self) -> None:
        """Forget what was collected."""
        self._embeddings: list[Tensor] = []
        self._patients: list[Tensor] = []

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        """Collect one batch: embeddings (B, F) and patients (B,); a row whose patient is below 0 stands for no scan."""
        patients = output[1].detach().cpu().flatten()
        self._embeddings.append(output[0].detach().float().cpu()[patients >= 0])
        self._patients.append(patients[patients >= 0])

    def compute(self) -> float:
        """The number named ``key``; ``report`` holds all of them."""
        if len(self._embeddings) == 0 or sum(map(len, self._embeddings)) < 2:
            raise DatalistError(
                "Nothing to measure.",
                got="fewer than two embedded scans",
                wanted="two or more",
                fix="Give the validation section more scans, or set val_interval: 0.",
            )
        embeddings = torch.cat(self._embeddings)
        if not bool(embeddings.isfinite().all()):
            raise MedclrError(
                "The embeddings are no numbers.",
                got=f"NaN or infinity in {int((~embeddings.isfinite()).any(dim=1).sum())} of {len(embeddings)} scans",
                wanted="finite features",
                fix="Lower the learning rate, clip the gradient, or set precision: fp32.",
            )
        self.report = embedding_report(embeddings, torch.cat(self._patients))
        if self.key not in self.report:
            raise DatalistError(
                f"{self.key} cannot be measured.",
                got="validation patients with one scan each",
                wanted="at least one patient with two scans",
                fix="Set val_metric: effective_rank, or split again with more patients in validation.",
            )
        return self.report[self.key]
