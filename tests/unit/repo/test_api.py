"""The public names of the package: they load, their examples run, and they take tables and arrays alike."""

import doctest
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import can_dist
from can_dist import Margin, frontier, solve_dual
from can_dist.errors import ConfigError, DataError

METHODS = {"mocan", "pecan", "cdpo", "caid", "primal_dual", "sacpo", "p_sacpo", "dpo", "safedpo"}
NEEDS_A_RUN = {"Run", "run_pipeline", "constrained_reward", *METHODS}
"""Their examples train; tests/integration/test_api_run.py runs them."""
MINIMAL = """
prompts: {source: prompts.jsonl}
reference: {model: lm}
reward: {kind: callable, function: "scorers:num_words"}
constraints: {safety: {scorer: {kind: callable, function: "scorers:num_calm"}, margin: 1}}
"""
COLUMNS = {
    "id": ["a", "a", "b", "b", "b"],
    "helpful": [1.0, 0.0, 0.5, 0.0, 0.2],
    "calm": [0.0, 1.0, 1.0, 0.0, 0.3],
    "honest": [0.2, 0.1, 0.0, 0.4, 0.3],
}


@pytest.mark.parametrize("name", can_dist.__all__)
def test_every_public_name_loads_and_is_itself(name: str) -> None:
    assert getattr(can_dist, name).__name__ == name


def test_public_names_are_those_that_type_checkers_see() -> None:
    source = Path(can_dist.__file__).read_text(encoding="utf-8")
    listed = source.partition("if TYPE_CHECKING:")[2].partition("_HOMES")[0]
    assert [name for name in can_dist.__all__ if name not in listed] == []
    assert set(can_dist.__all__) == set(can_dist._HOMES)
    assert (Path(can_dist.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(set(can_dist.__all__) - NEEDS_A_RUN))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.yaml").write_text(MINIMAL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    public = getattr(can_dist, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(public, name, globs=vars(inspect.getmodule(public)).copy())
    assert example.examples, f"{name} has no example"
    told: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert results.failed == 0, "".join(told)


@pytest.mark.parametrize("name", [name for name in can_dist.__all__ if name.islower()])
def test_functions_are_annotated(name: str) -> None:
    public = getattr(can_dist, name)
    assert set(inspect.signature(public).parameters) | {"return"} == set(typing.get_type_hints(public))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        can_dist.nothing  # noqa: B018


def test_solver_alone_loads_neither_torch_nor_ray() -> None:
    code = "import sys; from can_dist import solve_dual; sys.exit(bool({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Columns:
    """A table as polars has it: names as ``columns``, a column by subscript."""

    columns = tuple(COLUMNS)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array(COLUMNS[name])


TABLES = {"pandas": pd.DataFrame(COLUMNS), "pyarrow": pa.table(COLUMNS), "dict": COLUMNS, "columns": Columns()}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_gives_what_its_arrays_give(kind: str) -> None:
    constraints = [Margin("honest", margin=0.01), Margin("calm", margin=0.1)]
    utility = np.stack([COLUMNS["honest"], COLUMNS["calm"]], axis=1)
    arrays = (COLUMNS["helpful"], utility, COLUMNS["id"])
    asked = {"beta": 0.5, "reward": "helpful", "prompt": "id"}
    table = TABLES[kind]
    assert solve_dual(table, constraints=constraints, **asked) == solve_dual(*arrays, beta=0.5, constraints=constraints)
    traced = frontier(table, names=["honest", "calm"], num_points=9, **asked)
    assert traced.to_dict() == frontier(*arrays, beta=0.5, names=["honest", "calm"], num_points=9).to_dict()
    alone = solve_dual(table, constraints=[], **asked)
    assert alone.lam == {}


def test_minus_names_the_column_with_its_sign_turned() -> None:
    asked = {"beta": 0.5, "reward": "helpful", "prompt": "id"}
    cost = {**COLUMNS, "cost": [-value for value in COLUMNS["calm"]]}
    expected = solve_dual(COLUMNS, constraints=[Margin("calm", 0.1)], **asked)
    assert solve_dual(cost, constraints=[Margin("-cost", 0.1)], **asked).lam["-cost"] == expected.lam["calm"]
    for table in TABLES.values():
        assert solve_dual(table, constraints=[Margin("-calm", -9.0)], **asked).lam == {"-calm": 0.0}


def test_a_sliced_frame_is_read_by_position_not_by_index() -> None:
    frame = pd.DataFrame(COLUMNS).iloc[[4, 1, 3, 0, 2]]
    asked = {"beta": 0.5, "reward": "helpful", "prompt": "id", "constraints": [Margin("calm", margin=0.1)]}
    assert solve_dual(frame, **asked).lam == pytest.approx(solve_dual(COLUMNS, **asked).lam, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [COLUMNS],
            r"no column 'prompt_id', 'reward', 'safety'; it has id, helpful, calm, honest.*reward= and prompt=",
        ),
        ([np.ones(3)], r"found one ndarray, expected a table with named columns.*or the three arrays"),
        ([np.ones(3), np.ones(3)], r"prompt_N: not given; give reward_N, utility_NJ and prompt_N"),
    ],
)
def test_what_is_no_table_is_refused(arguments: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solve_dual(*arguments, beta=1.0, constraints=[Margin("safety", margin=0.1)])
    with pytest.raises(ConfigError, match=message):
        frontier(*arguments, beta=1.0, names=["safety"])


def test_a_missing_score_in_a_frame_is_refused_by_name() -> None:
    frame = pd.DataFrame({**COLUMNS, "calm": [0.0, None, 1.0, 0.0, 0.3]})
    with pytest.raises(DataError, match=r"calm.*row"):
        solve_dual(frame, beta=1.0, reward="helpful", prompt="id", constraints=[Margin("calm", margin=0.1)])


@pytest.mark.parametrize("names", [["calm"], ["calm", "honest"]])
def test_a_frontier_plots_itself(names: list[str]) -> None:
    figure = frontier(COLUMNS, beta=0.5, names=names, reward="helpful", prompt="id", num_points=9).plot()
    labels = " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes) + str(figure._supxlabel)
    assert all(f"margin of {name}" in labels for name in names)
    figure.canvas.draw()


def test_three_constraints_have_no_picture() -> None:
    table = {**COLUMNS, "polite": [0.1, 0.3, 0.2, 0.0, 0.4]}
    names = ["calm", "honest", "polite"]
    curve = frontier(table, beta=0.5, names=names, reward="helpful", prompt="id", num_points=8)
    with pytest.raises(ConfigError, match=r"frontier of calm, honest, polite: a picture has one or two constraints"):
        curve.plot()
