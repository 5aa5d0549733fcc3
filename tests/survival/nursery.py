"""A process that has imported all that a bundle needs, and runs one in children that may be killed.

A bundle costs seconds of imports; a child that is forked from here costs none. The child tells its parent of each event
of the trainer through a pipe, and the parent kills it by SIGKILL when it has seen enough of them.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ignite.engine import Events
from monai.bundle import ConfigWorkflow

import medclr.evaluate
import medclr.transfer  # noqa: F401  # the children shall find all of it imported

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
EVENTS = (
    Events.STARTED,
    Events.EPOCH_STARTED,
    Events.GET_BATCH_STARTED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.EPOCH_COMPLETED,
    Events.COMPLETED,
)


def workflow(bundle: str, settings: dict[str, Any]) -> ConfigWorkflow:
    """A bundle's training, initialised."""
    configs = BUNDLES / bundle / "configs"
    run = ConfigWorkflow(
        config_file=str(configs / "train.yaml"),
        meta_file=str(configs / "metadata.json"),
        logging_file=str(configs / "logging.conf"),
        workflow_type="train",
        bundle_root=str(BUNDLES / bundle),
        **settings,
    )
    run.initialize()
    return run


def child(bundle: str, settings: dict[str, Any], pipe: int) -> None:
    """Run a bundle, and write a byte at each event, with the step at the end of each."""
    run = workflow(bundle, settings)
    trainer = run.parser.get_parsed_content("train::trainer")
    for event in EVENTS:
        trainer.add_event_handler(event, lambda: os.write(pipe, b"."))
    run.run()


def attempt(bundle: str, settings: dict[str, Any], kill_after: int | None, delay: float) -> int:
    """Run a bundle in a child, and kill it ``delay`` seconds after so many events; its exit code, -9 if killed."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(reading)
            child(bundle, settings, writing)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    seen = 0
    while os.read(reading, 1):
        seen += 1
        if seen == kill_after:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            break
    os.close(reading)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def main(bundle: str, settings: dict[str, Any], kills: int, most_events: int, seed: int) -> dict[str, Any]:
    """Kill so many children at random moments, each going on where the one before was, and let the last one end."""
    dice = random.Random(seed)
    codes: list[int] = []
    while codes.count(-signal.SIGKILL) < kills:
        codes.append(attempt(bundle, settings, dice.randint(1, most_events), dice.random() * 0.02))
        if codes[-1] != -signal.SIGKILL:
            break  # it ended before the moment had come
    codes.append(attempt(bundle, settings, None, 0.0))
    return {"codes": codes, "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    print(json.dumps(main(**order)), flush=True)
