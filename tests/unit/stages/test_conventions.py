"""F23: one template from the responses through the reference's log-probabilities to training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_tiny_lm

from can_dist.config import Model, validate_config
from can_dist.errors import DataError
from can_dist.modeling.formatter import convention
from can_dist.scoring.protocol import LogProb
from can_dist.stages.brought_responses import bring_responses
from can_dist.stages.examples import Examples, commit
from can_dist.stages.ingest import ingest_pairs, ingest_prompts
from can_dist.stages.score import score
from can_dist.stages.train import train
from can_dist.tables.artifacts import Artifact, open_stage
from can_dist.workspace import Workspace

WORDS = [f"w{i}" for i in range(12)]
PLAIN = "w0 {prompt} w1 "


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    make_tiny_lm(tmp_path / "lm", WORDS)
    rows = [{"prompt": f"w1 w{n}", "responses": ["w3", "w4 w5"]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "prompts": {"source": str(tmp_path / "rows.jsonl"), "num_test": 2, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(tmp_path / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
        "generate": {"num_responses": 2, "responses": {"source": str(tmp_path / "rows.jsonl")}},
    }
    return Workspace(tmp_path / "run", validate_config(raw))


def brought(work: Workspace, reference: Model) -> Artifact:
    assert work.config.generate.responses is not None
    prompts = ingest_prompts(work, work.config.prompts)
    return bring_responses(work, reference, prompts, work.config.generate.responses)


def labelled(work: Workspace, reference: Model) -> Artifact:
    """Preferences, without any, whose log-probabilities say that they are of ``reference``."""
    scores = open_stage(work.directory, "scores", "some", {}, {})
    info = {"scorers": {"logp.reference": {"text": convention(reference)}}}
    row = {
        "example_id": "one", "prompt_id": "p", "split": "train", "messages": [{"role": "user", "content": "w1"}],
        "response_ids": ["p/0", "p/1"], "texts": ["w3", "w4"], "token_ids": [[8, 4], [9, 4]], "logp_ref": [-1.0, -2.0],
        "scores": [], "target": [1.0, 0.0], "weight": 1.0,
    }  # fmt: skip
    stage = open_stage(work.directory, "label", "some", {}, {})
    examples = Examples(stage)
    examples.add(row)
    return commit(work, examples, [], scores.commit(info=info), loss="sigmoid")


def test_f23_responses_of_another_template_get_no_log_probabilities(work: Workspace) -> None:
    reference = work.config.reference
    plain = reference.model_copy(update={"template": PLAIN})
    for written, read in ((reference, plain), (plain, reference)):
        responses = brought(work, written)
        with pytest.raises(DataError) as refused:
            score(work, responses, {"logp.reference": LogProb(model=read)}, role="reference on train")
        message = str(refused.value)
        assert message.startswith(f"{responses.path}: made with ")
        assert f"the template {PLAIN!r}" in message
        assert f"a tokenizer's chat template (digest {convention(reference)['digest'][:12]})" in message
        assert message.endswith("Give every stage of a run the same template and tokenizer.")


def test_f23_pairs_say_their_template_too(work: Workspace, tmp_path: Path) -> None:
    rows = [{"prompt": f"w1 w{n}", "chosen": "w3", "rejected": "w4"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = work.config.prompts.model_copy(update={"source": str(tmp_path / "pairs.jsonl")})
    prompts = ingest_prompts(work, work.config.prompts)
    pairs = ingest_pairs(work, source, work.config.reference, prompts, mismatched=False)
    assert pairs.info["text"] == convention(work.config.reference)


def test_f23_training_with_another_template_than_the_log_probabilities_is_refused(work: Workspace) -> None:
    """Also where it goes on from another policy, whose first loss cannot tell (F46)."""
    reference = work.config.reference
    preferences = labelled(work, reference)
    plain = reference.model_copy(update={"template": PLAIN})
    for start in (None, Model(model=reference.model, template=PLAIN)):
        with pytest.raises(DataError, match=rf"{preferences.path.name}: made with a tokenizer.s chat template .*w0"):
            train(work, plain, preferences, beta=0.5, start=start)


def test_f23_chat_template_changed_in_the_models_directory_is_another_one(work: Workspace) -> None:
    reference = work.config.reference
    preferences = labelled(work, reference)
    before = convention(reference)
    template = Path(reference.model) / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = convention(reference)
    with pytest.raises(DataError) as refused:
        train(work, reference, preferences, beta=0.5)
    for one in (before, after):
        assert f"a tokenizer's chat template (digest {one['digest'][:12]})" in str(refused.value)


def test_f23_transformers_has_one_tokenizer_of_a_model(work: Workspace) -> None:
    """There is no slow one to compare the fast one with; when there is again, docs/faults.md must say otherwise."""
    from transformers import AutoTokenizer

    fast, slow = (AutoTokenizer.from_pretrained(work.config.reference.model, use_fast=one) for one in (True, False))
    assert type(fast) is type(slow)
    assert fast.is_fast
    assert slow.is_fast
