"""Every family of templates and tokenizers × conversations × {sampled, brought, pairs, scored}: no cell is silent.

A cell has the numbers of plain transformers on the same conversation, or is refused before anything is computed by a
message that names the model and what it does not take. The oracle is transformers' ``apply_chat_template`` for what
is asked, and the family's ``reply``, written by hand, for what its model writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from families import CONVERSATIONS, FAMILIES, Family, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)

from can_dist.config import Model, SequenceClassifier, validate_config
from can_dist.config.sections import Generate
from can_dist.doctor.conversations import check_reference, check_scorer, kinds_of
from can_dist.errors import CanDistError, DataError
from can_dist.modeling.formatter import open_formatter
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import LogProb, Response
from can_dist.stages.brought_responses import response_row, tokenise
from can_dist.stages.generate import GenerateJob
from can_dist.stages.ingest import ingest_pairs, ingest_prompts
from can_dist.tables.schemas import PROMPTS
from can_dist.workspace import Workspace

FAST = ("llama2", "chatml", "qwen3 without thinking", "gemma", "vicuna, beginning spelled out", "t5")
"""Families whose numbers are computed in `make test`; the others' take a minute."""


def asked(name: str) -> dict[str, Any]:
    messages, _ = CONVERSATIONS[name]
    return {"prompt_id": name, "messages": messages, "split": "train"}


def model_of(directory: Path, family: Family) -> Model:
    return Model(model=str(directory), template=family.template, template_options=family.options)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("references")
    return {name: make_model(root / name, family) for name, family in FAMILIES.items()}


# ---------------------------------------------------------------------------------------------------------- the oracle


def prompt_text(tokenizer: Any, family: Family, messages: list[dict[str, str]]) -> str:
    """What transformers itself, or by hand the plain template, writes up to the response."""
    if family.template is None:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **family.options)
    beginning = "<s>" if family.adds_bos and not family.template.startswith("<s>") else ""
    return beginning + family.template.replace("{prompt}", messages[0]["content"])


def oracle_ids(directory: Path, family: Family, name: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of what the model writes."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages, text = CONVERSATIONS[name]
    prompt, reply = prompt_text(tokenizer, family, messages), family.reply.format(text.strip())
    ids, whole, alone = (
        tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, prompt + reply, reply)
    )
    return ids, whole[len(ids) :] if whole[: len(ids)] == ids else alone


def oracle_logp(model: Any, prompt: list[int], response: list[int]) -> float:
    logits_TV = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return float(sum(logits_TV[len(prompt) - 1 + at, token] for at, token in enumerate(response)))


def oracle_whole(directory: Path, family: Family, name: str) -> list[int]:
    """Token ids of the whole conversation as transformers writes it for a score model."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages, text = CONVERSATIONS[name]
    if family.template is None:
        whole = [*messages, {"role": "assistant", "content": text}]
        written = tokenizer.apply_chat_template(whole, tokenize=False, **family.options)
    else:
        written = prompt_text(tokenizer, family, messages) + text + family.eos
    return tokenizer(written, add_special_tokens=False).input_ids


# ------------------------------------------------------------------------------------------------------- the four ways


class Parrot:
    """Stands for a model that samples given tokens, so that the sampled way can be met with known ones."""

    device = "cpu"
    config = SimpleNamespace(is_encoder_decoder=True)  # so that it is left to its own `generate`

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.generation_config: Any = None

    def generate(self, ids_BT: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([ids_BT, torch.tensor([self.tokens] * len(ids_BT))], dim=1)


def sampled(reference: Model, name: str, tokens: list[int]) -> dict[str, Any]:
    formatter = open_formatter(reference)
    job = GenerateJob(reference, Generate(num_responses=1), 0, "fp32", "train", Path(), Path(), "its digest")
    # what comes after the end token must not count
    (row,) = job._sample((Parrot([*tokens, *tokens]), formatter), [asked(name)])
    return row


def brought(reference: Model, name: str) -> dict[str, Any]:
    _, text = CONVERSATIONS[name]
    row = response_row(asked(name), 0, text, "given")
    tokenise(open_formatter(reference), 512, [row]).check(reference, "responses.jsonl", 512, 1)
    return row


def paired(reference: Model, names: list[str], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The chosen and the rejected response of a data set of pairs, by the conversation's name."""
    rows = [{"prompt": m, "chosen": t, "rejected": "wait"} for m, t in (CONVERSATIONS[name] for name in names)]
    directory.mkdir()
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    raw = {
        "prompts": {"source": str(directory / "prompts.jsonl"), "num_test": 2},
        "reference": reference.model_dump(),
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
    }
    work = Workspace(directory / "run", validate_config(raw))
    source = work.config.prompts.model_copy(update={"source": str(directory / "pairs.jsonl")})
    table = ingest_pairs(work, source, reference, ingest_prompts(work, work.config.prompts)).table.to_pylist()
    by_content = {json.dumps(CONVERSATIONS[name][0], sort_keys=True): name for name in names}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        found.setdefault(by_content[json.dumps(turns, sort_keys=True)], []).append(row)
    return found


# ------------------------------------------------------------------------------------------------------------ the cells


def readable(family: Family) -> list[str]:
    """The conversations that a data set may hold and the family takes."""
    return [name for name in CONVERSATIONS if name not in {*family.refuses, "empty prompt"}]


def refusal(check: Any) -> str:
    try:
        check()
    except CanDistError as error:
        return str(error)
    return ""


def check_asked(reference: Model, name: str) -> None:
    """What preflight looks at, and the tokens of a response that comes as text."""
    check_reference(
        "reference", reference, kinds_of(pa.Table.from_pylist([asked(name)], schema=PROMPTS)), are_texts=True
    )
    brought(reference, name)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_what_the_model_writes_or_the_cell_is_refused(
    references: dict[str, Path], name: str, conversation: str
) -> None:
    family, reference = FAMILIES[name], model_of(references[name], FAMILIES[name])
    message = refusal(lambda: check_asked(reference, conversation))
    assert bool(message) is (conversation in family.refuses), message
    if message:
        assert any(word in message for word in (references[name].name, "plain template")), message
        assert any(word in message for word in ("role", "refuses", "messages", "another text")), message
        return
    prompt, response = oracle_ids(references[name], family, conversation)
    assert open_formatter(reference).prompt_ids(CONVERSATIONS[conversation][0]) == prompt
    assert brought(reference, conversation)["token_ids"] == response
    row = sampled(reference, conversation, response)
    assert (row["token_ids"], row["finish_reason"]) == (response, "stop")
    assert row["text"] == CONVERSATIONS[conversation][1].strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_have_the_same_tokens(references: dict[str, Path], tmp_path: Path, name: str) -> None:
    family, reference = FAMILIES[name], model_of(references[name], FAMILIES[name])
    names = readable(family)
    rows = paired(reference, names, tmp_path / "pairs")
    assert set(rows) == set(names)
    for conversation, (chosen, _) in rows.items():
        assert chosen["token_ids"] == oracle_ids(references[name], family, conversation)[1], conversation
        assert chosen["text"] == brought(reference, conversation)["text"]


def test_empty_prompt_is_refused_by_the_readers_of_data_sets(references: dict[str, Path], tmp_path: Path) -> None:
    reference = model_of(references["chatml"], FAMILIES["chatml"])
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 0, field 'prompt': .* expected a last message that is not"):
        paired(reference, ["empty prompt"], tmp_path / "pairs")


@pytest.mark.parametrize("name", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_one_text_has_one_log_probability_and_the_score_of_its_card(
    references: dict[str, Path], tmp_path: Path, name: str
) -> None:
    family, reference = FAMILIES[name], model_of(references[name], FAMILIES[name])
    names = readable(family)
    lm = AutoModelForCausalLM.from_pretrained(references[name], dtype=torch.float32).eval()
    pairs = paired(reference, names, tmp_path / "pairs")
    scorer = load_scorer(LogProb(model=reference), "fp32")
    for conversation in names:
        prompt, response = oracle_ids(references[name], family, conversation)
        rows = [sampled(reference, conversation, response), brought(reference, conversation), pairs[conversation][0]]
        responses = [Response(str(n), row["messages"], row["text"], row["token_ids"]) for n, row in enumerate(rows)]
        with torch.no_grad():
            expected = oracle_logp(lm, prompt, response)
        np.testing.assert_allclose(scorer.score(responses), [expected] * 3, rtol=1e-4, err_msg=conversation)

    judge = make_model(tmp_path / "rm", family, LlamaForSequenceClassification, seed=1, num_labels=1)
    spec = SequenceClassifier(**model_of(judge, family).model_dump())
    rm = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    classifier = load_scorer(spec, "fp32")
    for conversation in CONVERSATIONS:
        table = pa.Table.from_pylist([asked(conversation)], schema=PROMPTS)
        if refusal(lambda table=table: check_scorer("reward", spec, kinds_of(table))):
            assert conversation in family.refuses | DROPPED.get(name, set()), conversation
            continue
        assert conversation not in family.refuses - {"emoji", "right to left"}, conversation
        messages, text = CONVERSATIONS[conversation]
        with torch.no_grad():
            ids = torch.tensor([oracle_whole(judge, family, conversation)])
            expected = float(rm(ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
        np.testing.assert_allclose(
            classifier.score([Response("r", messages, text, [])]), [expected], rtol=1e-4, err_msg=conversation
        )


DROPPED = {"mistral with system": {"system"}}
"""The system message is written before the last turn if that is the user's: of a whole conversation it is lost."""
