"""Runs that survive: they save all that they are, stop when asked, and go on as if nothing had happened."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.engine import Engine, Events

from medclr import distributed
from medclr.draws import stable_seed
from medclr.engine import random_state
from medclr.engine.checkpoint import Checkpoint, CheckpointFolder
from medclr.engine.failures import explained
from medclr.engine.record import RUNNING, RunRecord
from medclr.engine.run_state import RunState, alone, newest_on_all_ranks, of_this_rank, together
from medclr.engine.same_run import MAY_CHANGE, refuse_another_run
from medclr.engine.signals import STOPPED_EXIT_CODE, StopSignals, let_workers_die_quietly
from medclr.engine.timetable import Timetable
from medclr.engine.trainer import place_in_step
from medclr.errors import ConfigError

logger = logging.getLogger(__name__)


class ResumableRun:
    """Runs a trainer so that it can be killed, and goes on from its last checkpoint as if it had not been.

    A checkpoint holds what ``items`` names, the trainer's own state and its precision scaler, the evaluators' best
    metric, and the random generators of all ranks. It is written every few steps or minutes, at a signal, and at the
    end. On as many ranks of the same hardware the run then gives the same weights, bit for bit on a CPU, also from the
    middle of an epoch: for that the sampler has ``start_at(items)`` and the dataset's draws are functions of their
    place, as medclr's are.

    SIGTERM, SIGINT and SIGUSR1 let the step finish, save, and end the process with code 75
    (:data:`~medclr.engine.signals.STOPPED_EXIT_CODE`); an evaluation that is under way is broken off, and repeated when
    the run goes on.

    Args:
        trainer: MONAI's or medclr's.
        items: name to object with ``state_dict`` and ``load_state_dict``: network, optimizer, schedule.
        folder: of the checkpoints.
        record: the run manifest.
        evaluators: whose best metric is part of the run.
        resume: ``auto`` goes on where the folder holds a checkpoint, and refuses another configuration; ``force`` goes
            on whatever has changed; ``never`` starts anew, and removes the checkpoints.
        keep: checkpoints that are kept; two or more leave one where the newest is damaged.
        every_steps: batches between two checkpoints; 0 does not count them.
        every_minutes: minutes between two checkpoints; 0 does not look at the clock.
        may_change: keys of the configuration that may differ, beside ``MAY_CHANGE``.

    Raises:
        ConfigError: for settings that are unusable.

    Example:
        In a bundle's ``initialize``: ``$@resumable.prepare(medclr.launch.configuration())``; in its ``run``:
        ``$@resumable.run()``.
    """

    def __init__(
        self,
        trainer: Any,
        items: Mapping[str, Any],
        folder: str | Path,
        record: RunRecord,
        *,
        evaluators: Sequence[Any] = (),
        resume: Literal["auto", "force", "never"] = "auto",
        keep: int = 2,
        every_steps: int = 0,
        every_minutes: float = 15.0,
        may_change: Sequence[str] = (),
    ) -> None:
        if resume not in ("auto", "force", "never"):
            raise ConfigError(
                "The way to resume is unknown.", got=resume, wanted="auto, force or never", fix="Set resume: auto."
            )
        self.trainer, self.record = trainer, record
        self.state = RunState(trainer, items, evaluators)
        self.folder = CheckpointFolder(folder, keep=keep)
        self.how, self.timetable = resume, Timetable(every_steps, every_minutes)
        self.may_change = (*MAY_CHANGE, *may_change)
        self.configuration: dict[str, Any] = {}
        self.resumed: Checkpoint | None = None
        self.signals = StopSignals()
        self.stopped = False
        self._random: random_state.RandomState | None = None  # as it was after the last step
        self._to_continue: random_state.RandomState | None = None  # as it was in the checkpoint, until it is put back
        self._steps = 0  # batches that are done, with all that follows from them
        self._epochs = 0  # epochs whose end, such as an evaluation, is done
        self._safe = 0  # steps that are in a checkpoint
        self._read_back = False  # whether a checkpoint of this process was found readable
        self._training = False
        self._broken_off = False  # an evaluation, by a signal

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is of a run that has come to its end, and this one asks for no more."""
        about = self.resumed.about if self.resumed is not None else {}
        return bool(about.get("completed")) and about["max_epochs"] >= self.trainer.state.max_epochs

    def prepare(self, configuration: Mapping[str, Any] | None = None) -> bool:
        """Look at the folder, load the newest checkpoint if there is one, and attach to the trainer.

        To be called when all handlers are attached and pretrained weights are loaded, on all ranks.

        Args:
            configuration: of the run, as plain values; compared with the checkpoint's.

        Returns:
            Whether the run goes on with a checkpoint.

        Raises:
            ConfigError: the folder cannot be written to, or holds a run with another configuration or datalist.
            MedclrError: no checkpoint is whole.
        """
        self.configuration = json.loads(json.dumps(dict(configuration or {}), default=str))
        device = self.trainer.state.device
        with together(device):
            if distributed.rank() == 0:
                self.folder.refuse_unusable(self.state.bytes())
        if self.how != "never":
            self.resumed = newest_on_all_ranks(self.folder, device)
        with together(device):
            if self.resumed is not None:
                self._go_on_with(self.resumed)
        loader = self.trainer.data_loader
        if isinstance(loader, torch.utils.data.DataLoader) and loader.generator is None:
            loader.generator = torch.Generator()  # for the seed of its workers, see _epoch_started
        self._attach()
        return self.resumed is not None

    def run(self) -> None:
        """Train to the end.

        Raises:
            SystemExit: with code 75, after a signal, when all is saved.
            MedclrError: what stopped the run, in plain words.
        """
        if self.finished:
            logger.info("the run is complete (%d steps): nothing is left to do", self._steps)
            return
        with alone(self.folder, self.trainer.state.device, clear=self.how == "never"):
            earlier = self.resumed.about["attempts"] if self.resumed is not None else []
            self.record.start(self.configuration, step=self._steps, earlier=earlier)
            self.timetable.begin(self._steps)
            try:
                with self.signals, explained():
                    self._training = True
                    self._train()
            except Exception as error:
                outcome = f"failed: {type(error).__name__}"
                self._save_what_there_is(outcome)
                if not self.stopped:
                    self.record.end(self._steps, outcome)
                    raise
            finally:
                self._training = False
            self.record.end(self._steps, self._reason() if self.stopped else "completed")
        if self.stopped or self.signals.received is not None:  # the latter while the last files were written
            again = f"start it again with the same output_dir to go on (exit code {STOPPED_EXIT_CODE})"
            logger.warning("%s after step %d, and saved: %s", self._reason(), self._steps, again)
            sys.exit(STOPPED_EXIT_CODE)

    def _train(self) -> None:
        state = self.trainer.state
        if state.iteration and state.iteration >= state.max_epochs * state.epoch_length:
            # Killed between the last step and the end: ignite would begin anew.
            self.trainer.fire_event(Events.STARTED)
            if not self.stopped:
                self.trainer.fire_event(Events.COMPLETED)
        else:
            self.trainer.run()

    def _attach(self) -> None:
        for event, handler in (
            (Events.STARTED, self._started),
            (Events.EPOCH_STARTED, self._epoch_started),
            (Events.GET_BATCH_STARTED, self._batch_wanted),
            (Events.ITERATION_COMPLETED, self._step_done),
            (Events.EPOCH_COMPLETED, self._epoch_done),
            (Events.COMPLETED, self._completed),
        ):
            self.trainer.add_event_handler(event, handler)
        for evaluator in self.state.evaluators:
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._break_off)

    def _started(self, engine: Engine) -> None:
        if self.resumed is not None:
            self.state.put_back_scaler(self.resumed)
        if self._epochs < engine.state.epoch:  # stopped between an epoch's last step and its end
            self._continue_random(engine)
            engine.fire_event(Events.EPOCH_COMPLETED)

    def _epoch_started(self, engine: Engine) -> None:
        generator = getattr(engine.data_loader, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(stable_seed("workers", self.record.seed or 0, engine.state.epoch))
        if engine.state.iteration % engine.state.epoch_length == 0:
            self._continue_random(engine)  # before a sampler draws the order of the epoch

    def _batch_wanted(self, engine: Engine) -> None:
        self._continue_random(engine)
        let_workers_die_quietly()

    def _continue_random(self, engine: Engine) -> None:
        if self._to_continue is not None:
            random_state.put_back(self._to_continue)
            self._to_continue = None

    def _step_done(self, engine: Engine) -> None:
        self._random, self._steps = random_state.take(), engine.state.iteration
        stop, due = self._agreed(self.signals.received is not None, self.timetable.due(self._steps))
        if not place_in_step(engine)[1]:  # the gradients of half an optimizer step are in no checkpoint
            return
        if stop:
            self._stop()
        elif due and self._steps % engine.state.epoch_length:  # else at the end of the epoch
            self._save()

    def _epoch_done(self, engine: Engine) -> None:
        stop, due, broken_off = self._agreed(
            self.signals.received is not None, self.timetable.due(self._steps), self._broken_off
        )
        if not broken_off:
            self._epochs, self._random = engine.state.epoch, random_state.take()
        if stop or broken_off:
            self._stop()
        elif due and engine.state.epoch < engine.state.max_epochs:
            self._save()

    def _completed(self, engine: Engine) -> None:
        self._save(outcome="completed")

    def _break_off(self, evaluator: Any) -> None:
        # On several ranks the others would wait for this one's share of the metric.
        if self._training and self.signals.received is not None and not distributed.is_distributed():
            self._broken_off = True
            evaluator.terminate(skip_completed=True)

    def _stop(self) -> None:
        self._save(outcome=self._reason())
        self.stopped = True
        self.trainer.terminate(skip_completed=True)

    def _reason(self) -> str:
        received = self.signals.received
        return f"stopped by {received.name if received is not None else 'a signal to another rank'}"

    def _agreed(self, *flags: bool) -> list[bool]:
        return distributed.any_rank(flags, self.trainer.state.device)

    def _save(self, outcome: str = RUNNING) -> None:
        state = self.trainer.state
        randoms = random_state.of_all_ranks(self._random or random_state.take(), state.device)
        self.timetable.begin(self._steps)
        about = {
            "step": self._steps,
            "epochs_ended": self._epochs,
            "epoch_length": state.epoch_length,
            "max_epochs": state.max_epochs,
            "completed": outcome == "completed",
            "datalist_digest": self.record.datalist_digest,
            "configuration": self.configuration,
            "attempts": self.record.so_far(self._steps, outcome),
        }
        with together(state.device):
            if distributed.rank() == 0:
                try:
                    name = self.folder.write({**self.state.take(), "random": randoms}, about)
                    self._safe = self._steps
                    if not self._read_back:  # what no checkpoint can hold shows now, rather than when it is needed
                        self.folder.read(name)
                        self._read_back = True
                except OSError as error:
                    if outcome != RUNNING:
                        raise
                    reason = f"{error.strerror or error}. The one before stays, and the next will be tried."
                    logger.warning("no checkpoint at step %d: %s Free some space.", self._steps, reason)

    def _save_what_there_is(self, outcome: str) -> None:
        """After an error between two steps, such as a scan that cannot be read, all is as it was after the last one."""
        asked = self.signals.received is not None  # which may have reached the data loader's workers as well
        whole = self.trainer.state.iteration == self._steps and place_in_step(self.trainer)[1]
        if not whole or distributed.is_distributed():
            return
        try:
            if self._steps > self._safe:
                self._save(self._reason() if asked else outcome)
        except Exception as error:  # whatever it is, the one that has stopped the run matters more
            logger.warning("no checkpoint could be written: %s", error)
        else:
            self.stopped = asked

    def _go_on_with(self, checkpoint: Checkpoint) -> None:
        about, trainer = checkpoint.about, self.trainer
        changed = refuse_another_run(
            about,
            {
                "configuration": self.configuration,
                "datalist_digest": self.record.datalist_digest,
                "epoch_length": trainer.state.epoch_length,
                "max_epochs": trainer.state.max_epochs,
            },
            may_change=self.may_change,
            force=self.how == "force",
        )
        self.state.put_back(checkpoint, changed=changed or about["max_epochs"] != trainer.state.max_epochs)
        self._steps = self._safe = about["step"]
        self._epochs = about["epochs_ended"]
        self._random = self._to_continue = of_this_rank(checkpoint.state["random"])
        self.state.leave_out(self._steps % trainer.state.epoch_length)
        total = trainer.state.max_epochs * trainer.state.epoch_length
        logger.info("the run goes on after step %d of %d (%s)", self._steps, total, checkpoint.name)
