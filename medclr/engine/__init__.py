"""MONAI's engine, taught to contrast."""

from medclr.engine.advice import Advice
from medclr.engine.checkpoint import CheckpointFolder
from medclr.engine.collapse import CollapseGuard
from medclr.engine.curves import Curves
from medclr.engine.failures import explain, explained
from medclr.engine.guards import NonFiniteGuard
from medclr.engine.handlers import ContrastLog, Progress, StepSchedule, ValidationLog
from medclr.engine.metrics import EmbeddingMetric, embedding_report
from medclr.engine.optim import LARS, decay_groups
from medclr.engine.precision import autocast, default_precision
from medclr.engine.prepare import PrepareViews
from medclr.engine.record import RunRecord
from medclr.engine.resume import ResumableRun
from medclr.engine.same_run import check_output
from medclr.engine.saving import SaveEncoder
from medclr.engine.signals import STOPPED_EXIT_CODE
from medclr.engine.trainer import ContrastiveTrainer

__all__ = [
    "LARS",
    "STOPPED_EXIT_CODE",
    "Advice",
    "CheckpointFolder",
    "CollapseGuard",
    "ContrastLog",
    "ContrastiveTrainer",
    "Curves",
    "EmbeddingMetric",
    "NonFiniteGuard",
    "PrepareViews",
    "Progress",
    "ResumableRun",
    "RunRecord",
    "SaveEncoder",
    "StepSchedule",
    "ValidationLog",
    "autocast",
    "check_output",
    "decay_groups",
    "default_precision",
    "embedding_report",
    "explain",
    "explained",
]
