"""The shape of the house: which room may import which, how large a file may be, and what may not be called at all."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# From the roof to the cellar. A room imports itself and the floors below its own, never a room above or a neighbour.
FLOORS = (
    {"cli"},
    {"demo"},
    {"evaluate"},
    {"engine", "transfer"},
    {"methods", "pairs", "weights"},
    {"affinity", "views", "models", "losses", "data", "shipped", "launch"},
    {"geometry", "keys", "errors", "distributed", "draws", "disk"},
)
HEIGHT = {room: len(FLOORS) - level for level, floor in enumerate(FLOORS) for room in floor}
FRONT_DOOR = ("__init__.py", "__main__.py")
LONGEST_FILE = 320
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "misc", "common"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources(package: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every module below a package's folder, parsed; paths are relative to the folder."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package), ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that a module of ``package`` imports, wherever in the file, in whatever form."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "importlib.import_module", "__import__"):
            yield from (
                (node.lineno, arg.value)
                for arg in node.args[:1]
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )


def called(node: ast.Call) -> str:
    """The dotted name of what a call calls; empty where it is no plain name."""
    parts: list[str] = []
    function = node.func
    while isinstance(function, ast.Attribute):
        parts.insert(0, function.attr)
        function = function.value
    return ".".join([function.id, *parts]) if isinstance(function, ast.Name) else ""


def floor_problems(package: Path) -> list[str]:
    """Every import inside the package that climbs, goes sideways, uses the front door, or enters a bundle."""
    problems = []
    for path, tree in sources(package):
        if str(path) in FRONT_DOOR:
            continue
        room = path.parts[0].removesuffix(".py")
        if room not in HEIGHT:
            problems.append(f"{path}: the room {room!r} has no floor; give it one in {Path(__file__).name}")
            continue
        dotted = ".".join([package.name, *path.parent.parts])
        for line, name in imports(tree, dotted):
            problem = import_problem(room, name, package.name)
            if problem:
                problems.append(f"{path}:{line}: {problem}")
    return problems


def import_problem(room: str, name: str, package: str) -> str | None:
    first, *rest = name.split(".")
    if first == "bundles":
        return f"imports {name}, but nothing imports a bundle; its path may be an argument"
    if first != package:
        return None
    target = rest[0] if rest else ""
    if target not in HEIGHT:
        return f"imports {name} through the package's front door; import it from the room it lives in"
    if target == room or HEIGHT[target] < HEIGHT[room]:
        return None
    way = "climbs from" if HEIGHT[target] > HEIGHT[room] else "goes sideways from"
    return f"importing {name} {way} {room!r} to {target!r}"


def test_imports_only_go_down() -> None:
    assert floor_problems(ROOT / "medclr") == []


def test_every_floor_is_a_room_of_its_own() -> None:
    assert len(HEIGHT) == sum(len(floor) for floor in FLOORS)


@pytest.mark.parametrize(
    ("file", "line", "word"),
    [
        ("losses/info_nce.py", "from medclr.engine.trainer import ContrastiveTrainer", "climbs"),
        ("losses/info_nce.py", "import medclr.engine as engine", "climbs"),
        ("losses/info_nce.py", "from ..methods import simclr", "climbs"),
        ("losses/__init__.py", "from ..methods import simclr", "climbs"),
        ("data/deep/inside.py", "from ...pairs.rules import SamePatient", "climbs"),
        ("losses/info_nce.py", "def late():\n    from medclr.methods import SimCLR", "climbs"),
        ("losses/info_nce.py", "import importlib\nimportlib.import_module('medclr.methods.simclr')", "climbs"),
        ("geometry.py", "from medclr import views", "climbs"),
        ("losses/info_nce.py", "from medclr.views import TwoViews", "sideways"),
        ("geometry.py", "from .draws import draw_key", "sideways"),
        ("views/spatial.py", "from medclr import save_encoder", "front door"),
        ("views/spatial.py", "from medclr import *", "front door"),
        ("views/spatial.py", "import medclr", "front door"),
        ("views/spatial.py", "import bundles.segmentation", "nothing imports a bundle"),
        ("shed/tools.py", "", "has no floor"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, file: str, line: str, word: str) -> None:
    planted = tmp_path / "medclr" / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(line)
    problems = floor_problems(tmp_path / "medclr")
    assert len(problems) == 1
    assert word in problems[0]
    assert file in problems[0]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("__init__.py", "from medclr.engine import ContrastiveTrainer"),
        ("engine/trainer.py", "from medclr.methods import SimCLR\nfrom medclr import keys\nfrom .. import errors"),
        ("engine/trainer.py", "from .caching import chunks\nfrom . import optim\nfrom medclr.engine.optim import x"),
        ("losses/__init__.py", "from .info_nce import info_nce\nfrom ..draws import uniform"),
        ("views/spatial.py", "import medclr_extra\nfrom monai import data\nimport torch"),
    ],
)
def test_a_proper_import_is_let_through(tmp_path: Path, file: str, line: str) -> None:
    planted = tmp_path / "medclr" / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(line)
    assert floor_problems(tmp_path / "medclr") == []


def test_a_file_holds_one_idea() -> None:
    package = ROOT / "medclr"
    lengths = {str(path): len((package / path).read_text().splitlines()) for path, _ in sources(package)}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_a_file_is_named_for_what_it_holds() -> None:
    names = {part for path, _ in sources(ROOT / "medclr") for part in path.with_suffix("").parts}
    assert names & NAMES_THAT_SAY_NOTHING == set()


def unsafe_reads(tree: ast.Module) -> list[str]:
    """What in a module could run code hidden in a file that it reads."""
    found = [f"line {line}: imports {name}" for line, name in imports(tree, "") if name.split(".")[0] in UNPICKLERS]
    found += [f"line {line}: imports torch.load by name" for line, name in imports(tree, "") if name == "torch.load"]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {option.arg: option.value for option in node.keywords}
        if called(node) == "torch.load" and not is_true(options.get("weights_only")):
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        allowed = options.get("allow_pickle")
        if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
            found.append(f"line {node.lineno}: allow_pickle")
    return found


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def test_no_file_that_is_read_can_run_code() -> None:
    found = {str(path): unsafe_reads(tree) for path, tree in sources(ROOT / "medclr")}
    assert {path: problems for path, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("import pickle", False),
        ("from joblib import load", False),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=trusted)", False),
        ("from torch import load", False),
        ("np.load(path, allow_pickle=True)", False),
        ("torch.load(path, map_location='cpu', weights_only=True)", True),
        ("np.load(path, allow_pickle=False)", True),
        ("json.load(file)", True),
    ],
)
def test_an_unsafe_read_is_told_from_a_safe_one(source: str, safe: bool) -> None:
    assert (unsafe_reads(ast.parse(source)) == []) == safe


def undeclared(package: Path, requirements: list[str]) -> dict[str, str]:
    """Top-level names that a package imports and no requirement brings: name -> a file that imports it."""
    declared = {canonicalize_name(Requirement(text).name) for text in requirements}
    brought_by = importlib.metadata.packages_distributions()
    missing = {}
    for path, tree in sources(package):
        for _, name in imports(tree, ".".join([package.name, *path.parent.parts])):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == package.name:
                continue
            if not {canonicalize_name(owner) for owner in brought_by.get(top, [])} & declared:
                missing[top] = str(path)
    return missing


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert undeclared(ROOT / "medclr", project["dependencies"]) == {}


def test_an_undeclared_library_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "medclr").mkdir()
    (tmp_path / "medclr" / "cli.py").write_text("import json\nimport torch\nimport scipy.stats\nimport yaml\n")
    assert undeclared(tmp_path / "medclr", ["torch>=2.8", "PyYAML"]) == {"scipy": "cli.py"}
