"""Log-ratios as scores: the dual they give, margins in nats, what may be mixed, and every refusal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import make_tiny_lm
from transformers import PreTrainedTokenizerFast

from can_dist.config import LogRatio, Model, validate_config
from can_dist.doctor.preflight import preflight
from can_dist.dual import Margin, ScoreTable, solve_dual
from can_dist.errors import ConfigError, DataError, InfeasibleConstraint
from can_dist.run import Run
from can_dist.scoring.kinds import scorer_identity
from can_dist.scoring.log_ratio import check_one_reference, check_same_text, given_ratio, log_ratio, margins_in_nats
from can_dist.scoring.protocol import PolicyRatio
from can_dist.stages.solve import solve
from can_dist.tables.artifacts import open_stage, write_part
from can_dist.workspace import Workspace

WORDS = [f"w{i}" for i in range(6)]
ANY = Model(model="any")

# ------------------------------------------------------------------------------- categorical, 2 prompts × 4 responses

REF_PK = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
R_PK = np.array([[1, 0.2, -0.5, 0.7], [0, 1.5, -1, 0.5]])
G_PK = np.array([[-1, 0.5, 2, -0.3], [1, -2, 0.8, 0.1]])
LAM = {(0.5, 1.0): 1.0232216096, (0.1, 0.5): 0.5506337981}  # by (β, margin)


def exact_policy(score_PK: np.ndarray, beta: float) -> np.ndarray:
    weight_PK = REF_PK * np.exp(score_PK / beta)
    return weight_PK / weight_PK.sum(axis=1, keepdims=True)


def logs(policy_PK: np.ndarray) -> pa.ChunkedArray:
    return pa.chunked_array([np.log(policy_PK).ravel()])


def ratio_scores(score_PK: np.ndarray, beta: float) -> np.ndarray:
    return log_ratio(logs(exact_policy(score_PK, beta)), logs(REF_PK), PolicyRatio(ANY, ANY, beta))


@pytest.mark.parametrize(("beta", "margin"), LAM)
@pytest.mark.parametrize(("beta_r", "beta_g"), [(0.5, 0.5), (0.1, 0.2), (0.5, 0.2), (2.0, 0.025)])
def test_exact_aligned_policies_give_the_lambda_of_their_rewards(
    beta: float, margin: float, beta_r: float, beta_g: float
) -> None:
    """Whatever β each was trained with: ln Z(x) cancels, and margins stay in score units."""
    prompts, weights = np.repeat([0, 1], 4), np.log(REF_PK).ravel()
    found = solve_dual(
        ratio_scores(R_PK, beta_r), ratio_scores(G_PK, beta_g), prompts, beta=beta,
        constraints=[Margin("safety", margin)], log_weight_N=weights, tolerance=1e-13,
    )  # fmt: skip
    plain = solve_dual(
        R_PK.ravel(), G_PK.ravel(), prompts, beta=beta, constraints=[Margin("safety", margin)], log_weight_N=weights,
        tolerance=1e-13,
    )  # fmt: skip
    assert found.lam["safety"] == pytest.approx(plain.lam["safety"], abs=1e-10)
    assert found.lam["safety"] == pytest.approx(LAM[beta, margin], abs=1e-10)
    assert found.feasibility["attainable"]["safety"] == pytest.approx(1.4525, abs=1e-10)


def test_the_wrong_beta_of_a_policy_gives_another_lambda() -> None:
    wrong = ratio_scores(G_PK, 0.2) / 0.2 * 0.5
    found = solve_dual(
        ratio_scores(R_PK, 0.5), wrong, np.repeat([0, 1], 4), beta=0.5, constraints=[Margin("safety", 1.0)],
        log_weight_N=np.log(REF_PK).ravel(),
    )  # fmt: skip
    assert abs(found.lam["safety"] - LAM[0.5, 1.0]) > 0.1


def test_scale_multiplies_the_score() -> None:
    logp, logp_ref = pa.chunked_array([[-1.0, -2.0]]), pa.chunked_array([[-3.0, -1.0]])
    np.testing.assert_allclose(log_ratio(logp, logp_ref, PolicyRatio(ANY, ANY, 0.1, scale=3.0)), [0.6, -0.3])


# ------------------------------------------------------------------------------------------------- margins in nats


def test_margins_are_told_in_score_units_and_in_nats() -> None:
    table = ScoreTable.build([0.0] * 4, [[1.0, 5.0], [3.0, 5.0], [0.0, 1.0], [2.0, 3.0]], ["a", "a", "b", "b"])
    scorers = {"safety": {"kind": "log_ratio", "beta": 0.2, "scale": 0.5}, "other": {"kind": "callable"}}
    (line,) = margins_in_nats(table, [Margin("safety", 0.5), Margin("other", 0.1)], scorers)
    # the best of both prompts is 1 above its mean
    assert line == (
        "safety: margin 0.5 is 5 nats of ln π/π_ref, at most 1 or 10 nats attainable (one nat is 0.1 of the score)"
    )
    (by_threshold,) = margins_in_nats(table, [Margin("safety", threshold=2.0), Margin("other", 0.1)], scorers)
    assert "safety: margin 0.5 is 5 nats" in by_threshold  # ḡ = 1.5


def config(reward: dict[str, Any], safety: dict[str, Any], **changes: Any) -> Any:
    raw: dict[str, Any] = {
        "prompts": {"source": "prompts.jsonl", "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": reward,
        "constraints": {"safety": {"scorer": safety, "margin": 0.3}},
        "beta": 0.5,
    }
    return validate_config(raw | changes)


GIVEN = {"kind": "log_ratio", "model": {"model": "aligned"}, "beta": 0.2}


@pytest.mark.parametrize(("margin", "feasible"), [(0.3, True), (50.0, False)])
def test_the_solve_tells_the_attainable_margin_in_nats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], margin: float, feasible: bool
) -> None:
    settings = config(GIVEN, GIVEN, method="pecan", constraints={"safety": {"scorer": GIVEN, "margin": margin}})
    values = np.random.default_rng(0).normal(size=(2, 240))
    prompts = np.repeat(np.arange(30), 8)
    work = Workspace(tmp_path, settings)
    stage = open_stage(tmp_path, "scores", "reference", {}, {})
    write_part(stage.path, 0, pa.table({"prompt_id": prompts, "reward": values[0], "safety": values[1]}))
    scores = stage.commit(info={"scorers": {"safety": {"kind": "log_ratio", "beta": 0.2, "scale": 1.0}}})
    attainable = (values[1].reshape(30, 8).max(axis=1) - values[1].reshape(30, 8).mean(axis=1)).mean()
    expected = (
        f"safety: margin {margin:.4g} is {margin / 0.2:.4g} nats of ln π/π_ref, at most {attainable:.4g} or "
        f"{attainable / 0.2:.4g} nats attainable (one nat is 0.2 of the score)"
    )
    if feasible:
        solve(work, scores, reward="reward", constraints=settings.constraints, beta=0.5)
        assert expected in capsys.readouterr().err
    else:
        with pytest.raises(InfeasibleConstraint) as error:
            solve(work, scores, reward="reward", constraints=settings.constraints, beta=0.5)
        assert f"safety: margin 50.00 requested, at most {attainable:.2f} attainable" in str(error.value)
        assert expected in str(error.value)
    work.close()


# ----------------------------------------------------------------------------------------- tokenizers and templates


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make_tiny_lm(directory / "reference", WORDS)
    make_tiny_lm(directory / "aligned", WORDS, seed=1)
    make_tiny_lm(directory / "other words", [*WORDS[:3], "w9", *WORDS[3:]])
    for name in ("other end", "other chat template", "splits otherwise"):
        make_tiny_lm(directory / name, WORDS)
    change(directory / "other end", eos_token="<pad>")
    template = PreTrainedTokenizerFast.from_pretrained(directory / "reference").chat_template
    change(directory / "other chat template", chat_template=template.replace("<user>{{", "<user> Q: {{"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "splits otherwise")
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("naïve", "w1 w2")
    tokenizer.save_pretrained(directory / "splits otherwise")
    return directory


def change(directory: Path, **attributes: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("other words", "vocabulary: 'w3' is 9, in the reference's 8"),
        ("other end", "eos_token_id is 0, the reference's 4"),
        ("other chat template", "its tokenizer's chat template differs from the reference's (from character 57: "),
        ("splits otherwise", "splits 'Hello, world: 12 naïve <s> tests.' into [2, 1, 1, 1, 6, 7, "),
    ],
)  # fmt: skip
def test_a_model_that_reads_other_text_than_the_reference_is_refused(
    models: Path, name: str, difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(DataError) as error:
        check_same_text(Model(model=name), Model(model="reference"))
    assert str(error.value).startswith(f"model {name!r}: {difference}")
    assert str(error.value).endswith(
        "A log-ratio needs both models to see the same tokens. Give a policy aligned from 'reference', with its "
        "tokenizer and template, or leave out the model to have one trained."
    )


def test_a_plain_template_must_be_the_references(models: Path) -> None:
    aligned, reference = str(models / "aligned"), str(models / "reference")
    plain = "USER: {prompt} ASSISTANT:"
    check_same_text(Model(model=aligned, template=plain), Model(model=reference, template=plain))
    with pytest.raises(DataError, match=r"template is None, the reference's 'USER: \{prompt\} ASSISTANT:'\. A log"):
        check_same_text(Model(model=aligned), Model(model=reference, template=plain))


def test_a_model_aligned_from_the_reference_is_taken(models: Path) -> None:
    reference, aligned = Model(model=str(models / "reference")), Model(model=str(models / "aligned"))
    found = given_ratio("safety", LogRatio(beta=0.2, model=aligned), reference)
    assert (found.policy, found.reference, found.beta, found.scale) == (aligned, reference, 0.2, 1.0)


def test_preflight_refuses_a_model_with_another_tokenizer(models: Path) -> None:
    (models / "prompts.jsonl").write_text("")
    wrong = {**GIVEN, "model": {"model": str(models / "other words")}}
    settings = config(
        {"kind": "callable", "function": "builtins:len"},
        wrong,
        reference={"model": str(models / "reference")},
        prompts={"source": str(models / "prompts.jsonl")},
    )
    with pytest.raises(DataError, match="other words': vocabulary: 'w3' is 9"):
        preflight(settings)


# ------------------------------------------------------------------------------------------------ what may be mixed


def test_identity_tells_both_models_and_the_betas_apart(models: Path) -> None:
    reference, aligned = Model(model=str(models / "reference")), Model(model=str(models / "aligned"))
    specs = [
        PolicyRatio(aligned, reference, 0.2),
        PolicyRatio(aligned, reference, 0.1),
        PolicyRatio(aligned, reference, 0.2, scale=1.5),
        PolicyRatio(reference, aligned, 0.2),
    ]
    identities = [scorer_identity(spec, "fp32") for spec in specs]
    assert all(one != other for i, one in enumerate(identities) for other in identities[:i])
    assert identities[0]["weights"] == identities[3]["reference"] != identities[0]["reference"]


def test_log_ratios_of_different_references_are_not_mixed() -> None:
    """FAULTS F22."""
    one = {"kind": "log_ratio", "reference": "aaaa"}
    check_one_reference(
        {"reward": one, "safety": one, "logp.reference": {"kind": "log_prob", "weights": "aaaa"}}, "logp.reference"
    )
    check_one_reference({"reward": {"kind": "callable"}}, "logp.reference")
    mixed = {"reward": one, "safety": {**one, "reference": "bbbb"}}
    with pytest.raises(DataError) as error:
        check_one_reference(mixed, "logp.reference")
    assert str(error.value) == (
        "log-ratios relative to different references (reward to aaaa, safety to bbbb): their sum is the reward of no "
        "policy. Score them all relative to the model that is trained."
    )
    with pytest.raises(DataError, match=r"\(reward to aaaa, logp\.reference to cccc\)"):
        check_one_reference(
            {"reward": one, "logp.reference": {"kind": "log_prob", "weights": "cccc"}}, "logp.reference"
        )


def test_an_untrained_policy_is_refused_where_a_score_is_asked_for(models: Path, tmp_path: Path) -> None:
    learner = {"kind": "log_ratio", "beta": 0.2, "criterion": "safe"}
    label = {"preferences": {"source": "pairs.jsonl"}}
    settings = config({**learner, "criterion": "helpful"}, learner, method="pecan", label=label)
    stage = open_stage(tmp_path, "generate", "reference on train", {}, {})
    with Run(tmp_path, settings) as run, pytest.raises(ConfigError) as error:
        run.score(stage.commit(), settings.reward, settings.constraints, settings.reference)
    assert str(error.value) == (
        "scorer 'reward': its policy is yet to be trained, or its score to be calibrated, on people's preferences. "
        "Call run.aligned first and give what it returns to run.score."
    )


# ---------------------------------------------------------------------------------------------------- configuration

HELPFUL = {"kind": "log_ratio", "beta": 0.1, "criterion": "helpful"}
SAFE = {"kind": "log_ratio", "beta": 0.2, "criterion": "safe"}
PREFERENCES = {"source": "pairs.jsonl"}
PECAN: dict[str, Any] = {
    "method": "pecan",
    "prompts": {"source": "prompts.jsonl", "num_validation": 0},
    "strength": 1,
    "reference": {"model": "lm"},
    "reward": HELPFUL,
    "constraints": {"safety": {"scorer": SAFE, "margin": 0.3}},
    "label": {"preferences": PREFERENCES},
}


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(PECAN)
    for path, value in changes.items():
        *groups, key = path.split(".")
        node = raw
        for group in groups:
            node = node.setdefault(group, {})
        if value is None:
            node.pop(key)
        else:
            node[key] = value
    return raw


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": GIVEN},
        {"reward.calibrate": True},
        {"reward": GIVEN, "constraints.safety.scorer": GIVEN, "label": None},
        {"reward": GIVEN, "constraints.safety.scorer": {**SAFE, "preferences": PREFERENCES}, "label": None},
        {"reward": {**GIVEN, "calibrate": True, "criterion": "helpful"}},
        {"method": "mocan", "reward": GIVEN, "constraints.safety.scorer": GIVEN, "label": None},
        {"label.human": {"smoothing": 0.1}},
        {"label.pairs": "preferences"},
    ],
)
def test_what_a_configuration_of_pecan_may_say(changes: dict[str, Any]) -> None:
    validate_config(with_changes(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"kind": "callable", "function": "a:b"}},
         "reward: method pecan takes scorers of kind 'log_ratio', this one is 'callable'"),
        ({"constraints.safety.scorer": {"kind": "sequence_classifier", "model": "cost"}},
         "constraints: safety.scorer: method pecan takes scorers of kind 'log_ratio', this one is "
         "'sequence_classifier'"),
        ({"method": "mocan", "label": None},
         "reward: only method pecan trains or calibrates a log_ratio; give its model and leave out calibrate, or set "
         "method to pecan"),
        ({"reward.criterion": None},
         "reward: give a model, or the criterion ('helpful' or 'safe') by which it is trained"),
        ({"reward": {**GIVEN, "criterion": "helpful"}},
         "reward: a given model without calibrate learns nothing; leave out criterion and preferences"),
        ({"reward.beta": None}, "reward.beta: required, not given."),
        ({"reward.beta": 0}, "reward.beta: expected greater than 0 (found 0)"),
        ({"reward.criterion": "nice"}, "reward.criterion: expected 'helpful' or 'safe' (found 'nice')"),
        ({"label": {}}, "label: method pecan learns from a data set's own labels; name it in label.preferences"),
        ({"reward": GIVEN, "constraints.safety.scorer": GIVEN},
         "label: label.preferences names the data set when label.pairs is 'preferences', and only then"),
        ({"reward": GIVEN, "constraints.safety.scorer": GIVEN, "label": {"human": {"smoothing": 0.1}}},
         "label: method pecan does not use label.human; leave out"),
        ({"label.human": {"loss": "kto"}},
         "label: method pecan aligns its policies by DPO on pairs; human.loss must be 'dpo', not 'kto'"),
        ({"reward.calibrate": True, "label.validation_fraction": 0.0},
         "label: calibrate needs preferences that nothing is trained on; set validation_fraction above 0"),
    ],
)  # fmt: skip
def test_what_a_configuration_of_pecan_may_not_say(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_config(with_changes(changes))
    assert f"  {message}" in str(error.value).splitlines()
