"""The architecture: rooms in one order, no circles, everything where it lives, and nothing unsafe in the source."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from can_dist.config import METHODS

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "can_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
# room → what the page says it imports; from the top down: a room may import what has a lower row, or itself
ROOMS = {
    name: cell.split()
    for name, cell in re.findall(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \| ([^|]*) \|$", DESIGN, re.MULTILINE)
}
RANK = {room: rank for rank, room in enumerate(ROOMS)}
# of branch `models`, which ends it; delete with its merge
LIBRARIES = {
    "click": {"cli", "train"},
    "datasets": {"tables"},
    "deepspeed": {"training"},
    "matplotlib": {"reporting"},
    "numba": {"cluster", "dual"},
    "peft": {"training"},
    "ray": {"cluster"},
    "torch": {"demo", "fitting", "modeling", "scoring", "training"},
    "transformers": {"demo", "fitting", "modeling", "scoring", "training"},
}
"""The rooms that may import a library: each is known by few, so that the others load and test without it."""
EXCEPTIONS = {
    ("can_dist.doctor.environment", "torch"),  # which build and which devices there are
    ("can_dist.doctor.ray_cluster", "ray"),  # what the cluster says of itself
    ("can_dist.stages.train_on_ray", "ray"),  # starts several ranks by Ray Train
}
LONGEST_FUNCTION = 60  # lines without the docstring, which may hold an example
LINES_WITH_METHODS = 3
FILES_AT_THE_TOP = 9


def part_of(module: str) -> str:
    """'can_dist.dual.solve' → 'dual'."""
    return module.split(".")[1]


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, at its top or inside a function; of ours the very file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {whole if whole in MODULES else str(node.module) for whole in wholes}
    return frozenset(names)


def module_name(path: Path) -> str:
    return next(name for name, other in MODULES.items() if other == path)


def ours(path: Path) -> set[str]:
    """The files of this package that a file imports; not the public names, which anything may be among."""
    return {name for name in imports(path) if name in MODULES and name != "can_dist"}


def upward_imports(module: str, imported: set[str]) -> set[str]:
    """The imports of a module that do not point down."""
    if module == "can_dist":
        return set()  # the public names
    here = part_of(module)
    return {name for name in imported if part_of(name) != here and RANK[part_of(name)] <= RANK[here]}


def test_every_room_has_a_row_in_the_design_page() -> None:
    assert {part_of(name) for name in MODULES if name != "can_dist"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_design_page_says_what_a_room_imports(room: str) -> None:
    imported = {
        part_of(name) for module, path in MODULES.items() if module.split(".")[1:2] == [room] for name in ours(path)
    }
    assert " ".join(ROOMS[room]) == " ".join(sorted(imported - {room}, key=list(ROOMS).index))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down_only(path: Path) -> None:
    assert upward_imports(module_name(path), ours(path)) == set()


@pytest.mark.parametrize(
    ("module", "imported", "upward"),
    [
        ("can_dist.tables.scores", "can_dist.stages.solve", True),
        ("can_dist.dual.solve", "can_dist.tables", True),
        ("can_dist.errors", "can_dist.config", True),
        ("can_dist.stages.solve", "can_dist.dual", False),
        ("can_dist.stages.solve", "can_dist.stages.train", False),
    ],
)
def test_an_upward_import_would_be_found(module: str, imported: str, upward: bool) -> None:
    assert bool(upward_imports(module, {imported})) is upward


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The files of one circle of imports, the first one again at its end; none: []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: ours(path) - {name} for name, path in MODULES.items()}
    assert circle(graph) == []


def test_a_circle_would_be_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# ------------------------------------------------------------------------------------------------- where things live


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} & LIBRARIES.keys()


def strangers(module: str, imported: set[str]) -> set[str]:
    """The libraries that a module imports and its room does not."""
    room = module.split(".")[1] if "." in module else module
    return {name for name in imported if room not in LIBRARIES[name]}


def test_libraries_stay_in_their_rooms() -> None:
    strange = {(module, name) for module, path in MODULES.items() for name in strangers(module, libraries(path))}
    assert strange == EXCEPTIONS


def test_every_room_of_a_library_needs_it() -> None:
    using = {name: {part_of(m) for m, path in MODULES.items() if name in libraries(path)} for name in LIBRARIES}
    assert {name: rooms - using[name] for name, rooms in LIBRARIES.items() if rooms - using[name]} == {}


def test_a_library_in_another_room_would_be_found() -> None:
    assert strangers("can_dist.stages.solve", {"ray"}) == {"ray"}
    assert strangers("can_dist.cluster.actors", {"ray"}) == set()
    assert "ray" in libraries(PACKAGE / "cluster" / "connection.py"), "an import inside a function counts"


def test_few_files_lie_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= FILES_AT_THE_TOP


def named_methods(source: str) -> set[int]:
    """The lines that spell a method's name as a text of its own."""
    constants = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {node.lineno for node in constants if isinstance(node.value, str) and node.value in METHODS}


def test_methods_are_named_in_their_table_only() -> None:
    elsewhere = [
        path for path in FILES if path.parent.name != "algorithms" and path != PACKAGE / "config" / "methods.py"
    ]
    lines = [f"{path}:{line}" for path in elsewhere for line in named_methods(path.read_text(encoding="utf-8"))]
    assert len(lines) <= LINES_WITH_METHODS, lines


def test_a_methods_name_would_be_found() -> None:
    source = 'if method in ("mocan", "pecan"):\n    x = "of mocan"\ny = METHODS["caid"]'
    assert named_methods(source) == {1, 3}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = int(first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return int(function.end_lineno or 0) - function.lineno + 1 - docstring


def long_functions(source: str) -> list[str]:
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [function.name for function in functions if length(function) > LONGEST_FUNCTION]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_function_is_longer_than_60_lines(path: Path) -> None:
    assert long_functions(path.read_text(encoding="utf-8")) == []


def test_a_long_function_would_be_found() -> None:
    lines = "    x = 1\n" * LONGEST_FUNCTION
    assert long_functions(f"def f():\n{lines}") == ["f"]
    assert long_functions(f'def f():\n    """A\n    B."""\n{lines}') == ["f"]
    assert long_functions("def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)) == []


def test_reading_order_names_files_and_their_share_of_the_lines() -> None:
    [section] = re.findall(r"^## Reading order\n(.*?)^## ", DESIGN, re.MULTILINE | re.DOTALL)
    files = re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)
    assert len(files) == 12
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    [percent] = re.findall(r"(\d+) % of the lines", section)
    share = 100 * sum(lines[PACKAGE / name] for name in files) / sum(lines.values())
    assert int(percent) == pytest.approx(share, abs=1)


# --------------------------------------------------------------------------------------------------------- the tests

TESTS = ROOT / "tests"
OF_THE_REPOSITORY = "repo"


def test_tests_follow_the_rooms() -> None:
    assert list((TESTS / "unit").glob("*.py")) == [], "into the folder of their room"
    folders = {path.name for path in (TESTS / "unit").iterdir() if any(path.glob("*.py"))}
    assert folders <= {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {OF_THE_REPOSITORY}


def test_helpers_lie_by_kind_and_say_when_to_use_them() -> None:
    assert {path.name for path in TESTS.glob("*.py")} == {"conftest.py", "private_home.py"}
    files = list((TESTS / "helpers").rglob("*.py"))
    assert len(files) > 20
    for path in files:
        assert path.relative_to(TESTS / "helpers").parts[0] in ("faults", "runs", "servers", "worlds")
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


# -------------------------------------------------------------------------------------------------------- the dual

DUAL = sorted((PACKAGE / "dual").rglob("*.py"))


@pytest.mark.parametrize("path", DUAL, ids=module_name)
def test_dual_imports_arithmetic_only(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"can_dist", "numpy", "scipy"} | ({"numba"} if path.name == "kernel.py" else set())
    assert not {"pathlib", "os", "io", "shutil", "tempfile", "subprocess", "socket"} & imports(path)


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


VAGUE = {"found", "what", "one", "where", "asked"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_variables_are_named_by_nouns(path: Path) -> None:
    """A pronoun names nothing that a reader could search for."""
    names = {
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    }
    assert not names & VAGUE
