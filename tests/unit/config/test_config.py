"""Configuration: what is accepted, what is refused and in which words, overrides, identity, and the key reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from can_dist.config import Config, SequenceClassifier, dump_yaml, load_config, validate_config
from can_dist.config.base import identity
from can_dist.config.describe import describe_keys, format_keys, models_in
from can_dist.config.methods import OWN_SECTIONS
from can_dist.errors import ConfigError

BASE: dict[str, Any] = {
    "prompts": {"source": "prompts.jsonl", "num_validation": 0},
    "strength": 1,
    "reference": {"model": "./reference"},
    "reward": {"kind": "sequence_classifier", "model": "./reward"},
    "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:safety"}, "margin": 1.0}},
}
# every group that BASE leaves to its defaults is filled, so that a bound can be reached by its path
FULL = BASE | {
    "prompts": {"source": "prompts.jsonl"},
    "strength": {},
    "label": {"pairs": "preferences", "preferences": {"source": "pairs.jsonl"}},
    "train": {"lora": {"r": 8}},
}


def learning_from_people(loss: str) -> dict[str, Any]:
    """A configuration whose method uses ``label.human``."""
    return FULL | {"method": "dpo_s", "label": {"preferences": {"source": "pairs.jsonl"}, "human": {"loss": loss}}}


def base_of(key: str) -> dict[str, Any]:
    """The configuration in which a key may have other values than its default."""
    if key in ("generate.num_responses", "train.lora.quantize"):  # by which no strength can be chosen
        return FULL | {"strength": 1}
    if not key.startswith("label.human."):
        return FULL
    return learning_from_people("kto" if key.endswith("_weight") else "dpo")


def changed(path: str, value: Any, base: dict[str, Any] = FULL) -> dict[str, Any]:
    """Return a copy of a configuration with one key set."""
    raw = copy.deepcopy(base)
    *parents, last = path.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return raw


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_config(raw)
    return str(caught.value)


def write(tmp_path: Path, raw: Any) -> Path:
    """Write a configuration file: text as it is, anything else as YAML."""
    path = tmp_path / "config.yaml"
    if isinstance(raw, str):
        path.write_text(raw, encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(raw, file)
    return path


def get(config: BaseModel, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


# -------------------------------------------------------------------------------------------------------- bounds

# (key, largest refused below or None, smallest accepted, largest accepted, smallest refused above or None)
BOUNDS = [
    ("seed", -1, 0, 2**63 - 1, 2**63),
    ("beta", 0, 1e-9, 1e9, None),
    ("reward.max_length", 7, 8, 10**6, None),
    ("reward.tokens_per_pass", 0, 1, 10**6, None),
    ("reward.min_accuracy", -0.001, 0, 1, 1.001),
    ("constraints.safety.scorer.batch_size", 0, 1, 10**6, None),
    ("prompts.num_train", 0, 1, 10**9, None),
    ("prompts.num_test", 1, 2, 10**9, None),
    ("prompts.num_validation", 31, 32, 10**9, None),
    ("prompts.num_sealed", 63, 64, 10**9, None),
    ("generate.num_responses", 0, 1, 1000, None),
    ("generate.temperature", 0, 1e-6, 10, 10.001),
    ("generate.top_p", 0, 1e-6, 1, 1.001),
    ("generate.max_new_tokens", 0, 1, 10**6, None),
    ("generate.max_truncated", -0.001, 0, 1, 1.001),
    ("generate.batch_prompts", 0, 1, 32, None),
    ("generate.tokens_at_once", 0, 1, 10**6, None),
    ("generate.shard_prompts", 0, 4, 4000, None),
    ("solve.confidence", 0.499, 0.5, 0.999, 1),
    ("label.pairs_per_prompt", 0, 1, 10**6, None),
    ("label.validation_fraction", -0.001, 0, 0.999, 1),
    ("label.human.smoothing", -0.001, 0, 0.499, 0.5),
    ("label.human.desirable_weight", 0, 1e-9, 1e9, None),
    ("label.human.undesirable_weight", 0, 1e-9, 1e9, None),
    ("train.learning_rate", 0, 1e-12, 0.999, 1),
    ("train.warmup_steps", -1, 0, 10**6, None),
    ("train.num_epochs", 0, 1, 1000, None),
    ("train.max_steps", 0, 1, 10**9, None),
    ("train.batch_size", 0, 1, 10**6, None),
    ("train.tokens_per_pack", 0, 1, 10**6, None),
    ("train.collate_workers", -1, 0, 64, None),
    ("train.weight_decay", -0.001, 0, 10, None),
    ("train.betas", [-0.001, 0.9], [0, 0], [0.999, 0.999], [0.9, 1]),
    ("train.max_grad_norm", 0, 1e-9, 1e9, None),
    ("train.checkpoint_every", 0, 1, 10**6, None),
    ("train.eval_every", 0, 1, 10**6, None),
    ("train.log_every", 0, 1, 10**6, None),
    ("train.max_shard_size_mb", 0, 1, 10**6, None),
    ("train.lora.r", 0, 1, 4096, None),
    ("train.lora.alpha", 0, 1e-6, 4096, None),
    ("train.lora.dropout", -0.001, 0, 0.999, 1),
    ("strength", 0, 1e-3, 100, None),
    ("strength.max", 0, 1e-9, 1e9, None),
    ("strength.max_kl", 0, 1e-9, 1e9, None),
    ("strength.confidence", 0.499, 0.5, 0.999, 1),
    ("evaluate.num_responses", 0, 1, 1000, None),
    ("evaluate.num_samples", -1, 0, 1000, None),
    ("cluster.num_actors", 0, 1, 10**4, None),
    ("cluster.cpus_per_actor", 0, 0.01, 128, None),
    ("cluster.gpus_per_actor", -0.1, 0, 8, None),
    ("cluster.num_workers", 0, 1, 10**4, None),
    ("cluster.cpus_per_worker", 0, 0.01, 128, None),
    ("cluster.gpus_per_worker", -0.1, 0, 1, 1.01),
    ("cluster.shard_attempts", 0, 1, 100, None),
    ("cluster.max_quarantine", -1, 0, 10**6, None),
    ("cluster.first_deadline_s", 0, 0.1, 10**6, None),
    ("cluster.min_deadline_s", 0, 0.1, 10**6, None),
    ("cluster.max_failures", -1, 0, 100, None),
    ("cluster.hang_timeout_s", 0, 0.1, 10**6, None),
    ("cluster.stop_grace_s", 0, 0.1, 10**6, None),
    ("cluster.wait_resources_s", 0, 0.1, 10**6, None),
]
INSIDE = [(key, value) for key, _, *accepted, _ in BOUNDS for value in accepted]
OUTSIDE = [(key, value) for key, below, *_, above in BOUNDS for value in (below, above) if value is not None]


@pytest.mark.parametrize(("key", "value"), INSIDE)
def test_value_on_a_bound_is_accepted(key: str, value: Any) -> None:
    found = get(validate_config(changed(key, value, base_of(key))), key)
    assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("key", "value"), OUTSIDE)
def test_value_outside_a_bound_is_refused_with_its_key(key: str, value: Any) -> None:
    message = refusal(changed(key, value, base_of(key)))
    assert "1 problem." in message
    assert (key if key != "label.pairs_per_prompt" else "pairs_per_prompt") in message


def test_every_number_of_the_configuration_is_in_the_table_of_bounds() -> None:
    free = {
        "reward.sign",
        "constraints.safety.scorer.sign",
        "constraints.safety.margin",
        "constraints.safety.threshold",
        "constraints.safety.level",
    }
    free |= {"constraints.safety.alpha"}  # of a cvar, in test_tails.py
    # in BASE the reward is a classifier and the constraint's scorer a callable: each one's own numbers are tested there
    free |= {"constraints.safety.scorer.max_length", "constraints.safety.scorer.tokens_per_pass", "reward.batch_size"}
    free |= {"constraints.safety.scorer.min_accuracy"}
    free |= {"reward.beta", "constraints.safety.scorer.beta"}  # of a log_ratio, in test_log_ratio.py
    free |= {"train.activation_checkpointing"}  # or a truth value, below
    numbers = {
        key.name.replace("<name>", "safety")
        for key in describe_keys(Config)
        if "number" in key.type or "-1" in key.type
        if key.name.split(".")[0] not in OWN_SECTIONS  # in test_methods.py
        if key.kind not in ("multi_head", "beaver", "guard", "http")  # in unit/scoring
        if not key.name.startswith("generate.endpoint.")  # in test_brought_responses.py
        if not key.name.startswith("constraints.<name>.others.")  # of the types of constraints.<name>.scorer
    }
    assert numbers - free == {key for key, *_ in BOUNDS}


def test_activation_checkpointing_is_of_no_layer_every_layer_or_every_nth() -> None:
    key = "train.activation_checkpointing"
    for given, kept in ((False, False), (True, True), (0, False), (1, True), (2, 2), (7, 7)):
        found = get(validate_config(changed(key, given)), key)
        assert (found, type(found)) == (kept, type(kept))
    assert f"{key}: expected a valid boolean" in refusal(changed(key, -1))
    assert "greater than or equal to 2 (found -1)" in refusal(changed(key, -1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "key", ["beta", "constraints.safety.margin", "train.learning_rate", "cluster.wait_resources_s"]
)
def test_numbers_must_be_finite(key: str, value: float) -> None:
    assert key in refusal(changed(key, value))


@pytest.mark.parametrize("key", ["seed", "beta", "generate.num_responses", "label.pairs_per_prompt", "reference.model"])
def test_true_is_no_number_and_no_text(key: str) -> None:
    assert f"{key}: expected a number or text, not true/false (found True)" in refusal(changed(key, True))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("generate.num_responses", 2.5, "generate.num_responses: expected a valid integer"),
        ("generate.num_responses", "many", "(found 'many')"),
        (
            "solve.estimator",
            "jacknife",
            "solve.estimator: expected 'empirical', 'jackknife', 'gaussian' or 'auto' (found 'jacknife')",
        ),
        ("train.schedule", "cosin", "train.schedule: expected 'cosine', 'linear' or 'constant' (found 'cosin')"),
        (
            "method",
            "mocann",
            "  method: unknown method 'mocann'. Did you mean 'mocan'? Valid: mocan, pecan, dpo_h, dpo_s, safedpo, "
            "sacpo, p_sacpo, cdpo, caid, primal_dual.",
        ),
        ("method", "reinforce", "method: unknown method 'reinforce'. Valid: mocan, "),
        ("method", 5, "method: unknown method 5. Valid: mocan, "),
        ("precision", "fp16", "precision: expected 'auto', 'bf16' or 'fp32' (found 'fp16')"),
        ("reward.sign", 0, "reward.sign: expected 1 or -1 (found 0)"),
        (
            "reward.kind",
            "gard",
            "  reward.kind: unknown kind of scorer 'gard'. Did you mean 'guard'? Valid: sequence_classifier, "
            "multi_head, beaver, guard, http, callable, log_ratio.",
        ),
        ("constraints.safety.scorer.kind", "callabel", "scorer.kind: unknown kind of scorer 'callabel'. Did you mean"),
        ("reward", 3, "reward: expected a group of keys (found 3)"),
        ("generate", None, "generate: expected a group of keys (found None)"),
        ("generate.stop", "END", "generate.stop: expected a list (found 'END')"),
        ("train.betas", [0.9], "train.betas.1: required, not given."),
        ("train.betas", [0.9, 0.9, 0.9], "train.betas: expected at most 2 items, not 3"),
        (
            "train.lora.target_modules",
            5,
            "train.lora.target_modules: expected a list or expected 'all-linear' (found 5)",
        ),
        ("label.pairs_per_prompt", "some", "label.pairs_per_prompt: expected a valid integer"),
        ("reference.template", "USER:", "reference.template: must contain {prompt} (found 'USER:')"),
        ("constraints.safety.scorer.function", "no_colon", "constraints.safety.scorer.function"),
        ("constraints", {}, "constraints: expected at least 1 item, not 0"),
        ("constraints", [], "constraints: expected a group of keys (found [])"),
        ("generate.shard_prompts", 6, "generate: shard_prompts (6) must be a multiple of batch_prompts"),
    ],
)
def test_a_wrong_value_is_answered_with_its_key_and_what_is_expected(key: str, value: Any, expected: str) -> None:
    message = refusal(changed(key, value))
    assert expected in message
    assert "1 problem." in message


@pytest.mark.parametrize("key", ["prompts", "reference", "reward", "constraints"])
def test_required_group_is_asked_for(key: str) -> None:
    raw = {name: value for name, value in BASE.items() if name != key}
    assert f"{key}: required, not given." in refusal(raw)


def test_scorer_without_kind_is_a_sequence_classifier() -> None:
    assert isinstance(validate_config(changed("reward", {"model": "m"})).reward, SequenceClassifier)


# --------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("genrate", "generate"),
        ("prompts.sorce", "source"),
        ("generate.num_response", "num_responses"),
        ("train.learning_rte", "learning_rate"),
        ("train.lora.rank_alpha", "alpha"),
        ("label.preferences.sourc", "source"),
        ("cluster.num_worker", "num_workers"),
        ("reward.modle", "model"),
        ("reward.max_lenght", "max_length"),
        ("constraints.safety.margn", "margin"),
        ("constraints.safety.scorer.functoin", "function"),
        ("constraints.safety.scorer.siegn", "sign"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest_valid_one(unknown: str, nearest: str) -> None:
    assert f"{unknown}: unknown key. Did you mean '{nearest}'?" in refusal(changed(unknown, {}))


def test_unknown_key_is_answered_with_the_keys_of_its_own_scorer_kind() -> None:
    message = refusal(changed("constraints.safety.scorer.max_length", 8))
    assert "Valid keys here: batch_size, function, kind, sign." in message


def test_constraint_named_like_a_scorer_kind_keeps_its_name_in_the_message() -> None:
    raw = copy.deepcopy(BASE)
    raw["constraints"]["callable"] = {"scorer": {"kind": "callable", "function": "a:b", "siegn": 1}, "margin": 1}
    assert "constraints.callable.scorer.siegn: unknown key. Did you mean 'sign'?" in refusal(raw)


def test_key_far_from_every_valid_one_gets_no_guess_but_the_list() -> None:
    message = refusal(changed("xyzzy", 1))
    assert "Did you mean" not in message
    assert "Valid keys here: basis, beta, caid, cdpo, cluster, constraints" in message


def test_key_that_is_no_text_is_refused() -> None:
    assert "1: Keys should be strings" in refusal({**BASE, 1: 2})


def test_all_problems_are_reported_at_once() -> None:
    raw = changed("sed", 1)
    raw = changed("beta", -1, raw)
    raw = changed("generate.top_p", 2, raw)
    raw = changed("constraints.safety.margn", 2, raw)
    raw["constraints"]["honesty"] = {"scorer": {"kind": "callable", "function": "a:b"}}
    del raw["prompts"]
    message = refusal(raw)
    assert message.startswith("configuration: 6 problems.\n")
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "beta",
        "prompts",
        "constraints.safety.margn",
        "constraints.honesty",
        "generate.top_p",
        "sed",
    ]


# ---------------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize("demand", [{}, {"margin": 1.0, "threshold": 2.0}])
def test_constraint_needs_exactly_one_of_margin_and_threshold(demand: dict[str, float]) -> None:
    scorer = BASE["constraints"]["safety"]["scorer"]
    message = refusal({**BASE, "constraints": {"safety": {"scorer": scorer, **demand}}})
    assert "constraints.safety: give exactly one of margin (improvement over the reference) and threshold" in message


@pytest.mark.parametrize("demand", [{"margin": -1.0}, {"margin": 0.0}, {"threshold": 0.0}])
def test_constraint_takes_one_demand_of_any_sign(demand: dict[str, float]) -> None:
    scorer = BASE["constraints"]["safety"]["scorer"]
    config = validate_config({**BASE, "constraints": {"safety": {"scorer": scorer, **demand}}})
    constraint = config.constraints["safety"]
    assert {"margin": constraint.margin, "threshold": constraint.threshold} == {
        "margin": None,
        "threshold": None,
        **demand,
    }


def test_constraint_may_be_met_exactly() -> None:
    assert validate_config(FULL).constraints["safety"].equal is False
    assert validate_config(changed("constraints.safety.equal", True)).constraints["safety"].equal is True
    assert "constraints.safety.equal: expected a valid boolean" in refusal(changed("constraints.safety.equal", "often"))


def test_confidence_with_an_equality_is_refused() -> None:
    raw = changed("solve.confidence", 0.95, changed("constraints.safety.equal", True))
    raw["constraints"]["honesty"] = {**raw["constraints"]["safety"], "equal": False}
    assert refusal(raw) == (
        "configuration: 1 problem.\n  solve: confidence 0.95 raises the margins to their safe side, and an equality "
        "has none; leave out solve.confidence or constraints.safety.equal"
    )


def test_confidence_alone_and_equality_alone_are_accepted() -> None:
    assert validate_config(changed("solve.confidence", 0.95)).solve.confidence == 0.95
    assert validate_config(changed("constraints.safety.equal", True)).solve.confidence is None


def test_confidence_with_broken_constraints_reports_those() -> None:
    message = refusal(changed("solve.confidence", 0.95, changed("constraints", {})))
    assert "1 problem." in message
    assert "constraints: expected at least 1 item" in message


@pytest.mark.parametrize(
    "name", ["reward", "prompt_id", "response_id", "num_tokens", "finish_reason", "two words", "a.b", "1st", "", "é"]
)
def test_constraint_name_that_could_not_be_a_column_is_refused(name: str) -> None:
    assert f"constraint name {name!r}:" in refusal({**BASE, "constraints": {name: BASE["constraints"]["safety"]}})


def test_a_constraint_called_minus_cost_turns_what_its_scorer_gives() -> None:
    scorer = BASE["constraints"]["safety"]["scorer"]
    written = {"-toxicity": {"scorer": scorer, "margin": 1.0}}
    constraints = validate_config({**BASE, "constraints": written}).constraints
    assert constraints["-toxicity"].scorer == validate_config(BASE).constraints["safety"].scorer.model_copy(
        update={"sign": -1}
    )
    resolved = {"-toxicity": constraints["-toxicity"].model_dump(mode="json", exclude_none=True)}
    assert validate_config({**BASE, "constraints": resolved}).constraints == constraints, "a written one means the same"
    both = {**written, "toxicity": {"scorer": scorer, "margin": 1.0}}
    assert "-toxicity and toxicity are one score and its negative" in refusal({**BASE, "constraints": both})
    guarded = {"-toxicity": {"scorer": {"kind": "guard", "model": "m"}, "margin": 1.0}}
    assert "-toxicity: a scorer of kind 'guard' gives no cost" in refusal({**BASE, "constraints": guarded})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"method": "dpo_s"}, "method dpo_s learns from a data set's own labels; name it in label.preferences"),
        ({"label": {"human": {"loss": "kto"}}}, "label: method mocan does not use label.human; leave out"),
        (
            {"method": "dpo_h", "label": {"labels": "sampled", "preferences": {"source": "x"}}},
            "label: method dpo_h does not use label.labels; leave out",
        ),
        (
            {"label": {"labels": "listwise", "pairs_per_prompt": 3}},
            "label: labels 'listwise' compares all responses of a prompt; leave out pairs_per_prompt",
        ),
        (
            {"label": {"human": {"loss": "kto", "smoothing": 0.1}}},
            "label.human: loss 'kto' does not use smoothing; leave out",
        ),
        (
            {"label": {"human": {"safe_flags": False, "undesirable_weight": 2.0}}},
            "label.human: loss 'dpo' does not use safe_flags, undesirable_weight; leave out",
        ),
    ],
)
def test_label_keys_that_the_method_or_loss_does_not_use_are_refused(raw: dict[str, Any], message: str) -> None:
    assert message in refusal({**BASE, **raw})


@pytest.mark.parametrize("name", ["safety", "harm-less_2", "S"])
def test_plain_constraint_name_is_accepted(name: str) -> None:
    config = validate_config({**BASE, "constraints": {name: BASE["constraints"]["safety"]}})
    assert list(config.constraints) == [name]


def test_all_bad_constraint_names_are_listed() -> None:
    safety = BASE["constraints"]["safety"]
    assert "'reward', 'a b'" in refusal({**BASE, "constraints": {"reward": safety, "ok": safety, "a b": safety}})


@pytest.mark.parametrize(
    "label",
    [
        {"pairs": "preferences"},
        {"pairs": "responses", "preferences": {"source": "x"}},
        {"preferences": {"source": "x"}},
    ],
)
def test_preference_data_is_named_when_and_only_when_its_pairs_are_used(label: dict[str, Any]) -> None:
    assert "label.preferences names the data set when label.pairs is 'preferences'" in refusal({**BASE, "label": label})


# ----------------------------------------------------------------------------------------------------------- files


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a\n- b\n", "list"), ("just text\n", "str")])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"expected a mapping of keys at the top level, found {kind}"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    ["seed: [1\n", "seed: {a\n", "a: b\n---\nc: d\n", "\tseed: 1\n", "seed: !!python/object/apply:os.getcwd []\n"],
)
def test_s5_invalid_yaml_is_refused_with_file_and_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: not valid YAML: (.|\n)*line \d+"):
        load_config(write(tmp_path, text))


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read as UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [("seed: 1\nbeta: 1\nseed: 2\n", 3, "seed"), ("generate:\n  top_p: 1\n  top_p: 1\n", 3, "top_p")],
)
def test_s5_key_given_twice_is_refused_with_its_line(tmp_path: Path, text: str, line: int, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.yaml, line {line}: key '{key}' is given twice"):
        load_config(write(tmp_path, text))


def test_problems_of_a_file_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, changed("beta", -1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: 1 problem.\n")


# ------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("beta=1e-4", "beta", 1e-4),
        ("beta=2", "beta", 2.0),
        ("constraints.safety.margin=2.5", "constraints.safety.margin", 2.5),
        ("evaluate.num_samples=3", "evaluate.num_samples", 3),
        ("train.lora={r: 4, alpha: 8}", "train.lora.r", 4),
        ("generate.stop=[END, '</s>']", "generate.stop", ("END", "</s>")),
        ("generate.stop=['a=b']", "generate.stop", ("a=b",)),
        ("train.betas=[0.8, 0.95]", "train.betas", (0.8, 0.95)),
        ("reference.revision='123'", "reference.revision", "123"),
        ("reference.template='USER: {prompt}'", "reference.template", "USER: {prompt}"),
        ("reward.max_length=null", "reward.max_length", None),
        ("prompts.num_train=", "prompts.num_train", None),
        (" seed =7", "seed", 7),
    ],
)
def test_override_sets_a_key(tmp_path: Path, override: str, key: str, value: Any) -> None:
    found = get(load_config(write(tmp_path, BASE), [override]), key)
    assert found == value
    assert type(found) is type(value)


def test_later_override_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, BASE), ["seed=1", "seed=2"]).seed == 2


def test_override_adds_a_constraint(tmp_path: Path) -> None:
    added = "constraints.honesty={scorer: {kind: callable, function: a:b}, threshold: 0}"
    config = load_config(write(tmp_path, BASE), [added, "constraints.honesty.threshold=0.5"])
    assert config.constraints["honesty"].threshold == 0.5


def test_override_can_exchange_margin_for_threshold(tmp_path: Path) -> None:
    overrides = ["constraints.safety.margin=null", "constraints.safety.threshold=1"]
    assert load_config(write(tmp_path, BASE), overrides).constraints["safety"].threshold == 1


@pytest.mark.parametrize("override", ["seed", "=1", "", "a..b=1", ".seed=1", "seed.=1"])
def test_override_without_key_and_value_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .*: expected key=value, for example"):
        load_config(write(tmp_path, BASE), [override])


def test_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set beta\.x=1: 'beta' holds a value, not a group of keys"):
        load_config(write(tmp_path, {**BASE, "beta": 0.1}), ["beta.x=1"])


def test_override_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set beta=\{: not valid YAML"):
        load_config(write(tmp_path, BASE), ["beta={"])


def test_override_of_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generate.num_response: unknown key. Did you mean 'num_responses'"):
        load_config(write(tmp_path, BASE), ["generate.num_response=4"])


# --------------------------------------------------------------------------------- resolved form, identity, frozen


TRICKY = {
    "reference.template": "USER: {prompt}\n\nASSISTANT: 'é' \"q\" # no comment: ",
    "reference.revision": "0123",
    "generate.stop": ["\n", "yes", "null", "1e-4", " x ", "Ω\t"],
    "train.learning_rate": 1e-7,
    "seed": 2**63 - 1,
    "constraints.safety.margin": -0.1 - 0.2,
}


@pytest.mark.parametrize("key", [None, *TRICKY])
def test_resolved_configuration_reads_back_as_itself(tmp_path: Path, key: str | None) -> None:
    config = validate_config(FULL if key is None else changed(key, TRICKY[key]))
    assert load_config(write(tmp_path, dump_yaml(config))) == config


def leaves(model: type[BaseModel], path: str = "") -> list[tuple[str, bool]]:
    """Every key of FULL's models with whether it is declared runtime."""
    found = []
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        found.append((f"{path}{name}", isinstance(extra, dict) and bool(extra.get("runtime"))))
        if name in (
            "generate",
            "solve",
            "label",
            "train",
            "evaluate",
            "cluster",
            "prompts",
            "reference",
            "lora",
            "preferences",
        ):
            found = found[:-1] + leaves(models_in(field.annotation)[0], f"{path}{name}.")
    return found


OTHER = {
    "cluster.on_nonfinite": "quarantine",
    "generate.max_truncated": 0.5,
    "train.lora.quantize": "nf4",
    "train.kernels": "liger",
    "generate.engine": None,  # vllm is tied to cluster.gpus_per_actor
    "method": None,  # tied to label
    **dict.fromkeys(OWN_SECTIONS),  # tied to method
    "methods": {"mocan": {"beta": 2.0}},
    "evaluate.benign_prompts": {"source": "benign.jsonl"},
    "evaluate.profile": {"set": "pku", "source": "pku.jsonl"},
    "label.pairs": None,  # tied to label.preferences
    "label.human": None,  # of methods that learn from people
    "label.as_published": None,  # of method pecan
    "solve.estimator": "empirical",
    "solve.confidence": 0.9,
    "solve.require": "trusted",
    "label.labels": "sampled",
    "precision": "fp32",
    "train.schedule": "linear",
    "reference.template": "{prompt}!",
    "reference.template_options": None,  # of a chat template, and here is a plain one
    "generate.stop": ["END"],
    "generate.responses": {"source": "responses.jsonl"},
    "generate.endpoint": {"base_url": "http://localhost:8000/v1", "model": "m"},
    "prompts.num_validation": 64,
    "prompts.num_sealed": 64,
    "train.feedback": None,  # of runs with validation prompts, and here are none
    "train.stop": None,  # likewise
    "strength": 1.5,
    "strength.max_kl": 2.0,
    "strength.confidence": 0.9,
    "generate.batch_prompts": 8,
    "generate.shard_prompts": 64,
    "generate.top_p": 0.5,
    "label.pairs_per_prompt": 3,
    "label.validation_fraction": 0.5,
    "train.betas": [0.5, 0.5],
    "train.lora.target_modules": ["q_proj"],
    "train.trackers": ["tensorboard"],
    "cluster.gpus_per_worker": 1,
    "reward": {"kind": "callable", "function": "a:b"},
    "constraints": {"honesty": {"scorer": {"kind": "callable", "function": "a:b"}, "margin": 1.0}},
}


def another(key: str, now: Any) -> Any:
    """A valid value of a key that differs from the present one."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(now, bool):
        return not now
    if now is None or isinstance(now, str):
        return 12 if key in ("prompts.num_train", "train.max_steps") else "other"
    return now + 1 if isinstance(now, int) else now * 0.5 + 0.001


ALL_KEYS = [(key, runtime) for key, runtime in leaves(Config) if OTHER.get(key, "") is not None]


@pytest.mark.parametrize(("key", "runtime"), ALL_KEYS)
def test_f38_identity_changes_with_every_field_but_the_runtime_ones(key: str, runtime: bool) -> None:
    before = validate_config(base_of(key))
    after = validate_config(changed(key, another(key, get(before, key)), base_of(key)))
    assert after != before
    assert (identity(after) == identity(before)) is runtime


def test_identity_of_the_cluster_is_empty() -> None:
    assert identity(validate_config(BASE).cluster) == {}


def test_identity_leaves_out_excluded_fields() -> None:
    assert "ds_config" not in identity(validate_config(BASE).train, exclude=["ds_config"])


def test_identity_is_plain_json_data() -> None:
    found = identity(validate_config(FULL))
    assert found["train"]["betas"] == [0.9, 0.999]
    assert found["constraints"]["safety"]["scorer"]["function"] == "scorers:safety"


@pytest.mark.parametrize("path", ["", "train", "constraints.safety", "reward"])
def test_configuration_is_frozen(path: str) -> None:
    config = validate_config(BASE)
    model = get(config, path) if path else config
    with pytest.raises(ValidationError, match="frozen"):
        setattr(model, next(iter(type(model).model_fields)), "x")


# ------------------------------------------------------------------------------------------------ the key reference


def all_models(model: type[BaseModel] = Config) -> set[type[BaseModel]]:
    inner = [one for field in model.model_fields.values() for one in models_in(field.annotation)]
    return {model}.union(*map(all_models, inner))


def test_reference_names_every_field_of_every_model() -> None:
    described = [key.name.rsplit(".", 1)[-1] for key in describe_keys(Config)]
    assert {name for model in all_models() for name in model.model_fields} == set(described)
    assert {model.__name__ for model in all_models()} >= {"Lora", "Constraint", "PythonCallable", "DataSource"}


def test_reference_names_each_key_once_per_kind_of_scorer() -> None:
    keys = [(key.name, key.kind) for key in describe_keys(Config)]
    assert len(keys) == len(set(keys))
    assert ("constraints.<name>.scorer.function", "callable") in keys
    assert ("reward.max_length", "sequence_classifier") in keys


@pytest.mark.parametrize("model", sorted(all_models(), key=lambda model: model.__name__))
def test_every_field_has_a_one_line_description(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        description = field.description or ""
        assert description.endswith("."), name
        assert "\n" not in description, name


def test_reference_shows_type_bounds_default_and_runtime() -> None:
    text = format_keys(Config)
    assert "generate.temperature: number > 0, <= 10; default 1.0\n    Sampling temperature" in text
    assert "prompts.num_train: whole number >= 1 or null; default null\n" in text
    assert 'train.schedule: "cosine" or "linear" or "constant"; default "cosine"\n' in text
    assert "reference.model: text; required\n" in text
    assert (
        "cluster.num_workers: whole number >= 1; default 2\n    DeepSpeed ranks. Changing it recomputes nothing."
        in text
    )


@pytest.mark.parametrize(
    "noise", ["Annotated", "Literal[", "Union", "typing", "<class", "FieldInfo", "see below", "None"]
)
def test_reference_holds_no_python_notation(noise: str) -> None:
    assert noise not in format_keys(Config)
