"""``can-dist chat``: the answers are the run's own draws, in two columns; a run without a policy is told so."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from trained_run import TrainedRun

from can_dist.cli import cli
from can_dist.cli.chat import side_by_side
from can_dist.errors import DataError
from can_dist.outcomes.chat import Answers, Chat
from can_dist.stages.generate import GenerateJob
from can_dist.tables.artifacts import open_stage, write_part
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.schemas import PROMPTS

PROMPT = "tea lock"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    generate = {"num_responses": 3, "max_new_tokens": 12, "temperature": 0.7}
    return TrainedRun(tmp_path_factory.mktemp("chat"), generate=generate)


def test_a_run_without_a_policy_is_told_so(trained: TrainedRun) -> None:
    with pytest.raises(DataError, match=r"expected one policy, found none. `can-dist run` makes it"):
        CliRunner().invoke(cli, ["chat", str(trained.run), "-p", PROMPT], catch_exceptions=False)


def test_answers_are_the_first_draws_of_the_run(trained: TrainedRun, tmp_path: Path) -> None:
    policy = trained.train()
    messages = [{"role": "user", "content": PROMPT}]
    row = {"prompt_id": prompt_id(messages), "messages": messages, "split": "test"}
    stage = open_stage(tmp_path, "prompts", "prompts", {}, {})
    write_part(stage.path, 0, pa.Table.from_pylist([row], schema=PROMPTS))
    prompts = stage.commit()
    drawn = {}
    for role, model in (("reference", trained.folder / "lm"), ("policy", policy.path / "policy")):
        spec = trained.reference.model_copy(update={"model": str(model)})
        job = GenerateJob(
            spec, trained.config.generate, trained.config.seed, "fp32", "test", prompts.path, tmp_path, "its digest"
        )
        drawn[role] = job._sample(job.load(), [row])[0]
    answers = Chat(trained.run).answer(PROMPT)
    assert (answers.reference, answers.policy) == (drawn["reference"]["text"], drawn["policy"]["text"])
    assert answers.cut == tuple(role for role in drawn if drawn[role]["finish_reason"] == "length")


def test_lines_are_answered_until_the_input_ends(trained: TrainedRun) -> None:
    trained.train()
    done = CliRunner().invoke(cli, ["chat", str(trained.run)], input=f"{PROMPT}\n\n  yes \n", catch_exceptions=False)
    assert done.exit_code == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("> ")] == [f"> {PROMPT}", "> yes"]
    assert done.stdout.count("reference") == 2
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens, and at most 52 leave room"):
        CliRunner().invoke(cli, ["chat", str(trained.run), "-p", "tea " * 80], catch_exceptions=False)


def test_columns_fit_the_terminal_and_nothing_steers_it() -> None:
    words = " ".join(["one two three"] * 10)
    answers = Answers("why\x1b[2J", words, "short\n\nsecond\x07 line", ("reference",))
    text = side_by_side(answers, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert "\x1b" not in text
    assert "\x07" not in text
    left = [line.partition("│")[0].strip() for line in text.splitlines()[2:]]
    assert " ".join(filter(None, left)) == f"{words} […]"
    right = [line.partition("│")[2].strip() for line in text.splitlines()[1:5]]
    assert right == ["policy", "short", "", r"second\x07 line"]
