"""Errors keep their words and their kind wherever they are raised, and come last on the screen."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader, Dataset

from medclr.errors import ConfigError, DatalistError, MedclrError, ScanError, WeightsError, find_cause, show_errors_last

KINDS = (ConfigError, DatalistError, ScanError, WeightsError)
LAYOUT = "The temperature is unusable.\n  got:    0\n  wanted: a number > 0\n  fix:    Set temperature: 0.1."


def temperature_error(kind: type[MedclrError] = ConfigError) -> MedclrError:
    return kind("The temperature is unusable.", got=0, wanted="a number > 0", fix="Set temperature: 0.1.")


def raise_temperature_error(kind: type[MedclrError] = ConfigError) -> None:
    raise temperature_error(kind)


class Refusing:
    """A component of a configuration that refuses its temperature."""

    def __init__(self, temperature: float) -> None:
        raise_temperature_error()


@pytest.mark.parametrize("kind", [MedclrError, *KINDS])
def test_a_message_says_got_wanted_and_fix(kind: type[MedclrError]) -> None:
    error = temperature_error(kind)
    assert str(error) == LAYOUT
    assert (error.problem, error.got, error.wanted) == ("The temperature is unusable.", 0, "a number > 0")
    assert error.fix == "Set temperature: 0.1."


def test_got_wanted_and_fix_cannot_be_left_out_or_mixed_up() -> None:
    with pytest.raises(TypeError):
        ConfigError("The temperature is unusable.", 0, "a number > 0", "Set temperature: 0.1.")
    with pytest.raises(TypeError):
        ConfigError("The temperature is unusable.", got=0, wanted="a number > 0")


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_are_told_apart(kind: type[MedclrError]) -> None:
    with pytest.raises(MedclrError) as caught:
        raise_temperature_error(kind)
    assert [other for other in KINDS if isinstance(caught.value, other)] == [kind]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    # Forked, since a spawned process could not import this test module by name.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_whole_from_another_process(pool: ProcessPoolExecutor, kind: type[MedclrError]) -> None:
    error = pool.submit(raise_temperature_error, kind).exception()
    assert type(error) is kind
    assert str(error) == LAYOUT


class OneBadScan(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 1:
            raise_temperature_error(ScanError)
        return torch.zeros(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_data_loader_ends_in_its_own_words(workers: int) -> None:
    loader = DataLoader(OneBadScan(), num_workers=workers, multiprocessing_context="fork" if workers else None)
    with pytest.raises((ScanError, RuntimeError)) as caught:
        list(loader)
    assert str(caught.value).rstrip().endswith(LAYOUT)


def test_the_cause_is_found_below_monais_own_error() -> None:
    parser = ConfigParser({"loss": {"_target_": "loss_that_refuses", "temperature": 0}})
    parser["loss"]["_target_"] = Refusing
    with pytest.raises(RuntimeError, match="Failed to instantiate") as caught:
        parser.get_parsed_content("loss")
    assert not isinstance(caught.value, MedclrError)
    cause = find_cause(caught.value)
    assert type(cause) is ConfigError
    assert str(cause) == LAYOUT


def chain(*errors: BaseException, explicit: bool) -> BaseException:
    """The last of ``errors``, each raised from the one before it, or while it was handled."""
    for inner, outer in itertools.pairwise(errors):
        setattr(outer, "__cause__" if explicit else "__context__", inner)
    return errors[-1]


@pytest.mark.parametrize("explicit", [True, False])
def test_the_outermost_of_several_causes_counts(explicit: bool) -> None:
    inner, outer = temperature_error(ScanError), temperature_error(ConfigError)
    error = chain(KeyError("x"), inner, ValueError("y"), outer, RuntimeError("z"), explicit=explicit)
    assert find_cause(error) is outer
    assert find_cause(outer) is outer
    assert find_cause(outer.__cause__ or outer.__context__) is inner


def test_an_error_of_somebody_else_has_no_cause_of_ours() -> None:
    assert find_cause(None) is None
    assert find_cause(chain(KeyError("x"), ValueError("y"), explicit=True)) is None


def test_errors_that_cause_each_other_end_the_search() -> None:
    first, second = ValueError("x"), KeyError("y")
    first.__context__, second.__context__ = second, first
    assert find_cause(first) is None


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


WRAPPED = """
    from medclr.errors import ConfigError, show_errors_last
    show_errors_last()
    show_errors_last()
    try:
        raise ConfigError("The temperature is unusable.", got=0, wanted="a number > 0", fix="Set temperature: 0.1.")
    except ConfigError as error:
        raise RuntimeError("Failed to instantiate component") from error
"""


def test_an_uncaught_error_ends_with_our_lines_and_a_failing_exit_code(tmp_path: Path) -> None:
    result = run_python("-c", textwrap.dedent(WRAPPED), cwd=tmp_path)
    assert result.returncode == 1
    assert "RuntimeError: Failed to instantiate component" in result.stderr
    assert result.stderr.endswith(f"\nConfigError: {LAYOUT}\n")
    assert result.stderr.count(f"\nConfigError: {LAYOUT}\n") == 1


def test_an_error_of_somebody_else_is_shown_as_ever(tmp_path: Path) -> None:
    program = "raise ValueError('nothing of ours')"
    plain = run_python("-c", program, cwd=tmp_path)
    hooked = run_python(
        "-c", f"from medclr.errors import show_errors_last; show_errors_last(); {program}", cwd=tmp_path
    )
    assert hooked.returncode == plain.returncode == 1
    assert hooked.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1] == "ValueError: nothing of ours"


def test_the_hook_that_was_there_before_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    show_errors_last()
    hook = sys.excepthook
    show_errors_last()
    assert sys.excepthook is hook
    error = temperature_error()
    hook(type(error), error, None)
    assert seen == [error]
    assert capsys.readouterr().err.endswith(f"ConfigError: {LAYOUT}\n")


REFUSING = """
    from medclr.errors import ConfigError


    class Refusing:
        def __init__(self, temperature):
            raise ConfigError(
                "The temperature is unusable.", got=temperature, wanted="a number > 0", fix="Set temperature: 0.1."
            )
"""
CONFIG = """
    initialize: [{_target_: medclr.errors.show_errors_last}]
    loss: {_target_: refusing.Refusing, temperature: 0}
    run: ["$@loss"]
"""


@pytest.mark.slow
def test_a_bundle_run_by_monai_ends_with_our_lines(tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text(textwrap.dedent(REFUSING))
    (tmp_path / "train.yaml").write_text(textwrap.dedent(CONFIG))
    result = run_python("-m", "monai.bundle", "run", "--config_file", "train.yaml", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "RuntimeError: Failed to instantiate component 'refusing.Refusing'" in result.stderr
    assert result.stderr.endswith(f"\nConfigError: {LAYOUT}\n")
