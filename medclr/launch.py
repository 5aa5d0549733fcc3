"""What a bundle does first: let medclr's errors come last, refuse settings that no configuration knows, know its own.

MONAI adds whatever key the command line names, so that ``--max_epoch 3`` would train for the default number of epochs.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire.parser
import monai.bundle
import torch
from monai.bundle import ConfigParser

from medclr.errors import ConfigError, show_errors_last


def begin() -> None:
    """To be the first of a bundle's ``initialize``.

    Raises:
        ConfigError: the command line of ``python -m monai.bundle run`` sets a key that no configuration has.
    """
    show_errors_last()
    program = Path(sys.argv[0]).parts[-3:]
    if program == ("monai", "bundle", "__main__.py") and sys.argv[1:2] == ["run"]:
        refuse_unknown_keys(sys.argv[2:])


def configuration() -> dict[str, Any]:
    """The configuration of the bundle that is running, to be called in one of its expressions.

    MONAI hands an expression no access to its configuration, so the parser is looked for among the callers.

    Returns:
        All keys but the metadata, as plain values: what the files say with what the command line sets. A top-level
        expression that has given a number, a text or a list of them is replaced by it.

    Raises:
        ConfigError: it was not called by a configuration.

    Example:
        In a bundle: ``$@resumable.prepare(medclr.launch.configuration())``
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), ConfigParser):
        frame = frame.f_back
    if frame is None:
        raise ConfigError(
            "There is no configuration to look at.",
            got="a call from outside of a bundle",
            wanted="a call in an expression of a bundle",
            fix="Write $medclr.launch.configuration() into the configuration, or give a dictionary of your own.",
        )
    parser: ConfigParser = frame.f_locals["self"]
    resolved = parser.ref_resolver.resolved_content
    return {
        str(key): _plain(resolved[key] if isinstance(value, str) and key in resolved else value, value)
        for key, value in parser.config.items()
        if key != ConfigParser.meta_key
    }


def _plain(value: Any, text: Any) -> Any:
    """``value`` if JSON has a form for it, else ``text``, which stood for it in the configuration."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value) if isinstance(value, torch.device) else json.loads(json.dumps(text, default=str))


def refuse_unknown_keys(arguments: Sequence[str]) -> None:
    """Compare what a command line sets with the configurations that it names.

    A nested key (``a::b::c``) may be new as long as what it is added to (``a::b``) is there.

    Args:
        arguments: what follows ``python -m monai.bundle run``.

    Raises:
        ConfigError: naming the key, and those that it resembles.

    Example:
        >>> refuse_unknown_keys(["--config_file", "train.yaml", "--max_epochs", "3"])  # doctest: +SKIP
    """
    options = _options(arguments)
    files = options.get("config_file")
    if "args_file" in options:
        given = ConfigParser.load_config_file(options["args_file"])
        files = files or given.get("config_file")
        options = {**given, **options}
    if not files:
        return
    content = ConfigParser.load_config_files(files)
    known = set(inspect.signature(monai.bundle.run).parameters)
    for name in options:
        if name in known or _is_there(name.replace("#", "::").split("::"), content):
            continue
        close = difflib.get_close_matches(name, [str(key) for key in content], n=3, cutoff=0.7)
        raise ConfigError(
            f"No configuration has the key {name!r}.",
            got=f"--{name}",
            wanted="a key of " + (", ".join(map(str, files)) if isinstance(files, list | tuple) else str(files)),
            fix=f"Did you mean {' or '.join(close)}?" if close else "Look at the first block of the configuration.",
        )


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """Names and values of ``--name value`` and ``--name=value``, read as MONAI's command line reads them."""
    options: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        if not re.match(r"--?[A-Za-z]", argument):
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        if not equals:
            value = arguments[place + 1] if place + 1 < len(arguments) else ""
        options[name.replace("-", "_")] = fire.parser.DefaultParseValue(value)
    return options


def _is_there(path: Sequence[str], content: Any) -> bool:
    """Whether the key is there, or what it would be added to."""
    for depth, step in enumerate(path):
        if isinstance(content, Mapping) and step in content:
            content = content[step]
        elif isinstance(content, list) and step.isdigit() and int(step) < len(content):
            content = content[int(step)]
        else:
            return 0 < depth == len(path) - 1 and isinstance(content, Mapping)
    return True
