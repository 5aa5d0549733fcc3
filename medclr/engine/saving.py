"""What a run leaves behind: the encoder's weights with their manifest."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from ignite.engine import Engine, Events

from medclr import distributed, keys
from medclr.engine.record import RunRecord
from medclr.errors import ConfigError
from medclr.models import Encoder
from medclr.weights import Manifest, save_encoder
from medclr.weights.io import checked_path
from medclr.weights.patients import joined

logger = logging.getLogger(__name__)


class SaveEncoder:
    """Save the encoder every few epochs and at the end, in place of the one before, on rank 0.

    Args:
        path: a name that ends in ``.safetensors``.
        encoder: whose weights.
        manifest: what travels with them; optimizer steps and whole epochs done are filled in.
        interval: epochs between two saves; 0 saves at the end alone.
        record: the run manifest, whose configuration, command, hardware, time and patients (as digests) go into the
            weights' manifest.

    Raises:
        ConfigError: for a negative interval, or another suffix.
    """

    def __init__(
        self,
        path: str | Path,
        encoder: Encoder,
        manifest: Manifest,
        *,
        interval: int = 0,
        record: RunRecord | None = None,
    ) -> None:
        if interval < 0:
            raise ConfigError(
                "The save interval is unusable.", got=interval, wanted=">= 0 epochs", fix="Set save_interval: 10."
            )
        self.path = checked_path(path)  # here, rather than at the end of a run
        self.encoder, self.manifest, self.interval, self.record = encoder, manifest, interval, record

    def attach(self, engine: Engine) -> None:
        """Follow the trainer."""
        if distributed.rank() == 0:
            if self.interval:
                engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save_meanwhile)
            engine.add_event_handler(Events.COMPLETED, self.save)

    def save_meanwhile(self, engine: Engine) -> None:
        """Write the file; a disk that fails ends no run."""
        try:
            self.save(engine)
        except OSError as error:
            logger.warning("the encoder cannot be saved: %s; the run goes on", error.strerror or error)

    def save(self, engine: Engine) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written; the one before is as it was.
        """
        epochs, rest = divmod(engine.state.iteration, engine.state.epoch_length)
        batches = getattr(engine, "accumulation_steps", 1)  # of one optimizer step; the last of an epoch may have fewer
        steps = epochs * -(-engine.state.epoch_length // batches) + rest // batches
        done = dataclasses.replace(self.manifest, steps=steps, epochs=epochs)
        if self.record is not None:
            seen = self.record.seen_patients() or {}
            done = dataclasses.replace(
                done,
                settings=self.record.settings(),
                run=self.record.for_weights(),
                patient_digests=joined(done.patient_digests, seen.get(keys.TRAINING)),
                validation_digests=joined(done.validation_digests, seen.get(keys.VALIDATION)),
            )
        save_encoder(self.path, self.encoder, done)
