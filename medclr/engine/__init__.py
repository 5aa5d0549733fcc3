"""MONAI's engine, taught to contrast."""

from medclr.engine.advice import Advice
from medclr.engine.checkpoint import SaveEncoder
from medclr.engine.guards import CollapseGuard, NonFiniteGuard
from medclr.engine.handlers import ContrastLog, Progress, StepSchedule, ValidationLog
from medclr.engine.metrics import EmbeddingMetric, embedding_report
from medclr.engine.optim import decay_groups
from medclr.engine.precision import autocast, default_precision
from medclr.engine.prepare import PrepareViews
from medclr.engine.trainer import ContrastiveTrainer

__all__ = [
    "Advice",
    "CollapseGuard",
    "ContrastLog",
    "ContrastiveTrainer",
    "EmbeddingMetric",
    "NonFiniteGuard",
    "PrepareViews",
    "Progress",
    "SaveEncoder",
    "StepSchedule",
    "ValidationLog",
    "autocast",
    "decay_groups",
    "default_precision",
    "embedding_report",
]
