"""One run of a bundle as a user would start it: a command line of its own, with its output in a log file."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from medclr.errors import MedclrError
from medclr.shipped import find_bundle


def run_bundle(console: Console, bundle: str, configs: Sequence[str], log: Path, **settings: Any) -> None:
    """Run a bundle through ``python -m monai.bundle run``; progress bars stay on the screen, the log goes to a file.

    Args:
        console: where the command is shown, as it could be typed.
        bundle: name of a bundle that comes with medclr.
        configs: names of its configurations, such as ``["train", "evaluate"]``.
        log: the file for what the run says.
        settings: keys of the configuration.

    Raises:
        MedclrError: the run failed.
    """
    folder = find_bundle(bundle).folder
    files = [str(folder / "configs" / f"{name}.yaml") for name in configs]
    options = {
        "config_file": files[0] if len(files) == 1 else str(files),
        "meta_file": folder / "configs" / "metadata.json",
        "logging_file": folder / "configs" / "logging.conf",
        "bundle_root": folder,
        **settings,
    }
    arguments = [
        "-m",
        "monai.bundle",
        "run",
        *[part for name, value in options.items() for part in _option(name, value)],
    ]
    console.print(f"[dim]{shlex.join(['python', *arguments])}[/dim]", soft_wrap=True, highlight=False)
    log.parent.mkdir(parents=True, exist_ok=True)
    # MONAI warns at length of what a bundle may do; the bundle is our own.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, check=False, env=environment)
    if done.returncode:
        raise MedclrError(
            f"The run of {bundle} failed.",
            got=f"exit code {done.returncode}; its last lines are above",
            wanted="a run that ends",
            fix=f"Follow the advice above; what went before is in {log}.",
        )


def _option(name: str, value: Any) -> tuple[str, str]:
    return f"--{name}", str(list(value)) if isinstance(value, list | tuple) else str(value)
