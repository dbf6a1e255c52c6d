"""The architecture: imports point down only, the dual is pure, and what is unsafe is nowhere in the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "can_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

# from the top down; a part may import what lies in a lower layer, or in itself
LAYERS = [
    ["__main__"],
    ["cli", "train"],
    ["demo"],
    ["pipeline", "outcomes"],
    ["algorithms", "doctor"],
    ["run"],
    ["stages"],
    ["judging", "workspace"],
    ["scoring", "training"],
    ["modeling", "cluster", "reporting"],
    ["measuring"],
    ["tables", "dual"],
    ["console", "endpoints"],
    ["config"],
    ["errors"],
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    """'can_dist.dual.solve' → 'dual'."""
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, ``from a import b`` as a.b too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            if node.module == "can_dist":
                yield from (f"can_dist.{alias.name}" for alias in node.names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def upward_imports(module: str, imported: Iterator[str]) -> list[str]:
    """The imports of a module that do not point down."""
    if module == "can_dist":
        return []  # the public names
    here = part_of(module)
    inside = [name for name in imported if name.startswith("can_dist.")]
    return [name for name in inside if part_of(name) != here and RANK[part_of(name)] <= RANK[here]]


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {part_of(module_name(path)) for path in FILES if module_name(path) != "can_dist"}
    assert parts <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down_only(path: Path) -> None:
    assert upward_imports(module_name(path), imports(path)) == []


@pytest.mark.parametrize(
    ("module", "imported", "upward"),
    [
        ("can_dist.tables.scores", "can_dist.stages.solve", True),
        ("can_dist.tables.scores", "can_dist.dual", True),
        ("can_dist.errors", "can_dist.config", True),
        ("can_dist.stages.solve", "can_dist.dual", False),
        ("can_dist.stages.solve", "can_dist.stages.train", False),
    ],
)
def test_an_upward_import_would_be_found(module: str, imported: str, upward: bool) -> None:
    assert bool(upward_imports(module, iter([imported]))) is upward


# -------------------------------------------------------------------------------------------------------- the dual

DUAL = sorted((PACKAGE / "dual").glob("*.py"))


@pytest.mark.parametrize("path", DUAL, ids=module_name)
def test_dual_imports_arithmetic_only(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"can_dist", "numpy", "scipy"} | ({"numba"} if path.name == "kernel.py" else set())
    assert not {"pathlib", "os", "io", "shutil", "tempfile", "subprocess", "socket"} & set(imports(path))


@pytest.mark.parametrize("path", DUAL, ids=module_name)
def test_dual_imports_nothing_of_ours_but_errors(path: Path) -> None:
    assert {part_of(name) for name in imports(path) if name.startswith("can_dist.")} <= {"dual", "errors"}


@pytest.mark.parametrize("path", DUAL, ids=module_name)
def test_dual_opens_no_file(path: Path) -> None:
    assert not {"open", "np.load", "np.save", "np.savez", "np.loadtxt"} & set(calls(path.read_text(encoding="utf-8")))


def test_dual_loads_neither_torch_nor_ray_nor_pyarrow() -> None:
    code = "import sys, can_dist.dual; print({'torch', 'ray', 'pyarrow', 'pydantic', 'pandas'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


# -------------------------------------------------------------------------------------------------------- packages


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels` of Hugging Face"


def test_transformers_imports_from_the_repository_root() -> None:
    code = "import sys; sys.path.insert(0, ''); import transformers; from transformers import LlamaForCausalLM"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------- unsafe

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml", "joblib"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "np.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "__import__",
}
FORBIDDEN_ARGUMENTS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def calls(source: str) -> Iterator[str]:
    """Every called name, with its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func)


def unsafe(source: str) -> list[str]:
    """What of a source text is forbidden in this package."""
    tree = ast.parse(source)
    found = [name for name in calls(source) if name in FORBIDDEN_CALLS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if n.split(".")[0] in FORBIDDEN_MODULES or n in FORBIDDEN_CALLS]
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            forbidden = FORBIDDEN_ARGUMENTS.get(str(node.arg))
            found += [f"{node.arg}={forbidden}"] if forbidden is not None and node.value.value is forbidden else []
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_unsafe_in_the_source(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(x)",
        "from torch import load",
        "eval(x)",
        "exec(x)",
        "import yaml",
        "subprocess.run(x, shell=True)",
        "from_pretrained(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
        "load(x, weights_only=False)",
    ],
)
def test_something_unsafe_would_be_found(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize("source", ["model.eval()", "YAML(typ='safe').load(x)", "f(trust_remote_code=spec.trust)"])
def test_something_safe_is_left_alone(source: str) -> None:
    assert unsafe(source) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_is_no_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
