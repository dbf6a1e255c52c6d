"""The score cache: what is kept, for whom, and what happens when several processes keep at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from can_dist.errors import EnvironmentProblem
from can_dist.stages.score_cache import keep, look_up, open_cache, score_keys
from can_dist.tables.schemas import RESPONSES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def responses(*texts: str, token: int = 1, prompt: str = "q") -> pa.Table:
    rows = [
        {
            "prompt_id": "p",
            "response_id": f"p/{k}",
            "messages": [{"role": "user", "content": prompt}],
            "text": text,
            "token_ids": [token],
            "num_tokens": 1,
            "finish_reason": "stop",
        }
        for k, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=RESPONSES)


def test_what_is_kept_comes_back_bit_for_bit() -> None:
    keys = score_keys("scorer", responses(*map(str, range(1200))))
    value_N = np.random.default_rng(0).standard_normal(1200) * 10.0 ** np.arange(1200).clip(max=300)
    value_N[:4] = [-0.0, 0.0, 5e-324, 2.0**60]
    with open_cache() as cache:
        keep(cache, keys, value_N)
    with open_cache() as cache:
        assert look_up(cache, keys).tobytes() == value_N.tobytes()


def test_rows_of_several_numbers_are_kept_whole_or_not_at_all() -> None:
    keys = score_keys("scorer", responses("a", "b", "c"))
    value_NL = np.array([[1.0, -0.0], [np.nan, 2.0], [3.0, 4.0]])
    with open_cache() as cache:
        keep(cache, keys, value_NL)
        found_NL = look_up(cache, keys, (2,))
    assert found_NL[[0, 2]].tobytes() == value_NL[[0, 2]].tobytes()
    assert np.isnan(found_NL[1]).all()


def test_numbers_that_are_not_finite_are_not_kept() -> None:
    keys = score_keys("scorer", responses("a", "b", "c", "d"))
    with open_cache() as cache:
        keep(cache, keys, np.array([1.0, np.nan, np.inf, -np.inf]))
        assert np.isfinite(look_up(cache, keys)).tolist() == [True, False, False, False]


def test_first_number_stays() -> None:
    """Another batch may give another last bit; a score that was read once must not move."""
    keys = score_keys("scorer", responses("a"))
    with open_cache() as cache:
        keep(cache, keys, np.array([1.0]))
        keep(cache, keys, np.array([2.0]))
        assert look_up(cache, keys).tolist() == [1.0]


def test_key_is_the_scorer_the_conversation_the_text_and_its_tokens() -> None:
    keys = [
        score_keys("scorer", responses("a"))[0],
        score_keys("other", responses("a"))[0],
        score_keys("scorer", responses("b"))[0],
        score_keys("scorer", responses("a", prompt="r"))[0],
        score_keys("scorer", responses("a", token=2))[0],
    ]
    assert len(set(keys)) == len(keys)
    # not the ids: they belong to the run
    assert score_keys("scorer", responses("x", "a"))[1] == keys[0]


def test_no_text_is_kept(home: Path) -> None:
    with open_cache() as cache:
        keep(cache, score_keys("scorer", responses("a very private text")), np.array([1.0]))
    content = (home / "can_dist" / "scores.sqlite").read_bytes()
    assert b"scores" in content
    assert b"private" not in content


WRITER = """
import sys, numpy as np
from can_dist.stages.score_cache import keep, look_up, open_cache
for k in range(50):
    with open_cache() as cache:
        keep(cache, [bytes([int(sys.argv[1]), k, n]) for n in range(20)], np.arange(20.0))
"""


def test_processes_may_keep_at_once() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(number)]) for number in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    with open_cache() as cache:
        keys = [bytes([writer, k, n]) for writer in range(3) for k in range(50) for n in range(20)]
        assert look_up(cache, keys).tolist() == list(range(20)) * 150


def test_damaged_file_is_named_with_what_to_do(home: Path) -> None:
    path = home / "can_dist" / "scores.sqlite"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 100)
    with (
        pytest.raises(EnvironmentProblem, match=r"scores\.sqlite: .* Delete the file, or set cluster\.score_cache to"),
        open_cache(),
    ):
        pass


def test_folder_that_cannot_be_made_is_named(home: Path) -> None:
    (home / "can_dist").write_text("a file")
    with pytest.raises(EnvironmentProblem, match=r"score cache .*scores\.sqlite"), open_cache():
        pass
