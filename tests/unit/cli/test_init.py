"""``can-dist init``: the configuration that it writes is read, examined and explained; nothing is half-written."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import make_tiny_classifier, make_tiny_lm

from can_dist.cli import cli
from can_dist.cli.init import examples_per_step, learning_rate
from can_dist.config import load_config
from can_dist.config.describe import describe_keys
from can_dist.config.root import Config
from can_dist.doctor.finding import Severity
from can_dist.doctor.inputs import check_inputs
from can_dist.errors import ConfigError, DataError

WORDS = ("calm", "rude", "tell", "me", "safe", "unsafe", *map(str, range(400)))
MODELS = ("--reference", "lm", "--reward", "reward", "--cost", "cost")


def pair(number: int) -> dict[str, Any]:
    labels = {"better_response_id": number % 2, "safer_response_id": 0}
    flags = {"is_response_0_safe": True, "is_response_1_safe": False}
    return {"prompt": f"tell me {number}", "response_0": "calm", "response_1": "rude", **labels, **flags}


ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"tell me {number}"} for number in range(400)],
    "few": [{"prompt": f"tell me {number}"} for number in range(150)],
    "fewest": [{"prompt": f"tell me {number}"} for number in range(9)],
    "pairs": [pair(number) for number in range(150)],
    "responses": [{"prompt": f"tell me {n}", "responses": ["calm", "rude", "calm rude"]} for n in range(150)],
    "uneven": [{"prompt": f"tell me {n}", "responses": ["calm"] * (2 + n % 2)} for n in range(150)],
    "chosen": [{"prompt": "tell me", "chosen": "calm", "rejected": "rude"}],
    "unknown": [{"promt": "tell me", "lang": "en"}],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    make_tiny_lm(folder / "lm", WORDS)
    make_tiny_classifier(folder / "reward", WORDS)
    make_tiny_classifier(folder / "cost", WORDS, seed=1)
    make_tiny_classifier(folder / "heads", WORDS, num_labels=3)
    silent = make_tiny_lm(folder / "silent", WORDS)
    (silent / "chat_template.jinja").unlink()
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    draw = random.Random(0)
    scores = [
        {"prompt_id": f"p{n}", "num_tokens": 3, "helpful": draw.gauss(0, 1), "safety": draw.gauss(0, 2)}
        for n in range(200)
        for _ in range(16)
    ]
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, scores)), encoding="utf-8")
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    (folder / "table.csv").write_text("prompt\ntell me\n", encoding="utf-8")
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with links to the world."""
    for item in world.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["init", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def errors_of(config: Config) -> list[str]:
    return [f"{f.subject}: {f.state}" for f in check_inputs(config) if f.severity is Severity.ERROR]


def test_score_models_make_a_mocan_that_the_doctor_accepts(place: Path) -> None:
    assert init("my.yaml", "--data", "prompts.jsonl", *MODELS) == "can-dist doctor --config my.yaml --run RUN\n"
    config = load_config("my.yaml")
    assert errors_of(config) == []
    scorer = config.constraints["safety"].scorer
    assert (config.method, scorer.kind, getattr(scorer, "sign", 0)) == ("mocan", "sequence_classifier", -1)
    assert (config.prompts.num_test, config.prompts.num_validation, config.generate.max_new_tokens) == (64, 128, 32)


def test_the_training_follows_the_size_of_the_model_and_of_the_data(place: Path) -> None:
    """64 wide, 208 prompts to train on: 1e-6 · 4096/64, and 4 a step are 52 steps (8 would be 26)."""
    init("my.yaml", "--data", "prompts.jsonl", *MODELS)
    train = load_config("my.yaml").train
    width = json.loads((place / "lm" / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    assert (train.learning_rate, train.batch_size) == (float(f"{4.096e-3 / width:.0e}"), 4)
    assert f" 1e-06 × 4096 / {width} " in (place / "my.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "rate"), [(64, 6e-5), (192, 2e-5), (896, 5e-6), (4096, 1e-6), (8192, 5e-7)])
def test_a_wider_model_has_a_lower_learning_rate(width: int, rate: float) -> None:
    assert learning_rate(width) == rate


@pytest.mark.parametrize(("prompts", "size"), [(1, 1), (79, 1), (80, 2), (336, 8), (640, 16), (9999, 32)])
def test_an_epoch_has_forty_steps_where_there_are_prompts_for_them(prompts: int, size: int) -> None:
    assert examples_per_step(prompts) == size
    assert prompts < 40 or prompts // size >= 40


def test_keys_are_explained_by_the_words_of_the_model(place: Path) -> None:
    init("my.yaml", "--data", "prompts.jsonl", *MODELS)
    text = " ".join(line.strip(" #") for line in (place / "my.yaml").read_text(encoding="utf-8").splitlines())
    said = {key.name: key.description for key in describe_keys(Config) if key.kind in ("", "sequence_classifier")}
    for name in ("generate.num_responses", "prompts.num_validation", "constraints.<name>.scorer.sign", "seed"):
        assert said[name] in text, name
    assert max(map(len, (place / "my.yaml").read_text(encoding="utf-8").splitlines())) <= 120


def test_pairs_labelled_by_both_make_a_pecan_without_score_models(place: Path) -> None:
    init("my.yaml", "--data", "pairs.jsonl", "--reference", "lm")
    config = load_config("my.yaml")
    assert errors_of(config) == []
    assert config.method == "pecan"
    assert config.label.preferences is not None
    assert (config.prompts.num_test, config.prompts.num_validation, config.strength) == (30, 40, load_default())


def load_default() -> Any:
    return Config.model_fields["strength"].get_default(call_default_factory=True)


def test_pairs_with_score_models_are_read_for_their_prompts(place: Path) -> None:
    init("my.yaml", "--data", "pairs.jsonl", *MODELS)
    config = load_config("my.yaml")
    assert (config.method, config.label.preferences, errors_of(config)) == ("mocan", None, [])


def test_brought_responses_set_their_number_and_a_guard_is_known(place: Path) -> None:
    init("my.yaml", "--data", "responses.jsonl", "--reference", "lm", "--reward", "reward", "--safety", "lm")
    config = load_config("my.yaml")
    assert config.generate.responses is not None
    assert (config.generate.num_responses, config.constraints["safety"].scorer.kind) == (3, "guard")
    assert errors_of(config) == []


def test_a_function_scores_and_a_template_is_for_models_without(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "scorers_of_init.py").write_text("def words(prompts, texts):\n    return [0.0 for _ in texts]\n")
    monkeypatch.syspath_prepend(str(place))
    scorers = ("--reward", "scorers_of_init:words", "--cost", "cost")
    with pytest.raises(ConfigError, match=r"silent: its tokenizer has no chat template.* Give --template"):
        init("my.yaml", "--data", "prompts.jsonl", "--reference", "silent", *scorers)
    assert not (place / "my.yaml").exists()
    init("my.yaml", "--data", "few.jsonl", "--reference", "silent", *scorers, "--template", "USER: {prompt} ANSWER:")
    config = load_config("my.yaml")
    assert (config.reference.template, config.reward.kind) == ("USER: {prompt} ANSWER:", "callable")
    assert getattr(config.constraints["safety"].scorer, "template", "") is None
    assert errors_of(config) == []


def test_scores_need_no_file_and_the_command_solves_them(place: Path) -> None:
    words = shlex.split(init("my.yaml", "--data", "scores.jsonl"))
    assert not (place / "my.yaml").exists()
    assert words[:6] == ["can-dist", "solve", "--scores", "scores.jsonl", "--reward", "helpful"]
    assert "safety:margin=1" in words, "half a standard deviation of 2"
    done = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
    assert done.exit_code == 0
    assert "May be trusted" in done.output
    assert (place / "page.html").is_file()


def test_from_another_folder_the_paths_lead_to_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "conf").mkdir()
    (place / "other").mkdir()
    init("conf/my.yaml", "--data", "prompts.jsonl", *MODELS)
    monkeypatch.chdir(place / "other")
    assert errors_of(load_config("../conf/my.yaml")) == []


def test_a_file_that_is_there_is_kept_unless_forced(place: Path) -> None:
    (place / "my.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"my.yaml: is there already.* --force"):
        init("my.yaml", "--data", "prompts.jsonl", *MODELS)
    with pytest.raises(DataError):
        init("my.yaml", "--data", "unknown.jsonl", *MODELS, "--force")
    assert (place / "my.yaml").read_text() == "mine"
    init("my.yaml", "--data", "prompts.jsonl", *MODELS, "--force")
    assert load_config("my.yaml").method == "mocan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "unknown.jsonl", *MODELS), r"Columns found: promt, lang[\s\S]*is 'promt' meant to be 'prompt'"),
        (("--data", "cut.parquet", *MODELS), r"cut.parquet: truncated or damaged Parquet file"),
        (("--data", "table.csv", *MODELS), r"table.csv: unknown kind of file"),
        (("--data", "none.jsonl", *MODELS), r"none.jsonl: no such file"),
        (("--data", "owner/set", *MODELS), r"give its revision"),
        (("--data", "fewest.jsonl", *MODELS), r"9 distinct prompts[\s\S]*10 or more"),
        (("--data", "uneven.jsonl", *MODELS), r"from 2 to 3 responses each"),
        (("--data", "chosen.jsonl", "--reference", "lm"), r"which was chosen, not by what[\s\S]*--reward and --safety"),
        (("--data", "prompts.jsonl", "--reference", "lm"), r"prompts without people's labels[\s\S]*--reward"),
        (("--data", "prompts.jsonl", "--reward", "reward", "--cost", "cost"), r"Give --reference MODEL"),
        (("--data", "prompts.jsonl", *MODELS[:4]), r"--reward is given without --safety or --cost"),
        (("--data", "prompts.jsonl", *MODELS, "--safety", "cost"), r"Leave out one"),
        (("--data", "prompts.jsonl", *MODELS[:4], "--cost", "heads"), r"heads: has 3 outputs \(LABEL_0, LABEL_1"),
        (("--data", "prompts.jsonl", *MODELS[:4], "--cost", "lm"), r"gives no cost[\s\S]*--safety"),
        (("--data", "prompts.jsonl", "--reference", "./gone", *MODELS[2:]), r"'./gone': no such directory"),
        (("--data", "prompts.jsonl", "--reference", "reward", *MODELS[2:]), r"reward"),
        (("--data", "scores.jsonl", *MODELS), r"nothing would read --reference, --reward, --cost"),
        (("--data", "prompts.jsonl", *MODELS[:4], "--cost", "no_such_module:f"), r"no_such_module"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(place: Path, arguments: Sequence[str], message: str) -> None:
    before = sorted(place.iterdir())
    with pytest.raises((ConfigError, DataError), match=message):
        init("my.yaml", *arguments)
    assert sorted(place.iterdir()) == before
