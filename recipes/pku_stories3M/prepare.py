"""Train the reward and safety models of the real-text recipe, and pick its prompts.

    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world

reward/        helpfulness: `better_response_id` of 500 PKU-SafeRLHF rows and the one-turn HH-RLHF helpful test pairs
safety/        BeaverTails `is_safe`, and the 5,135 PKU-SafeRLHF pairs of one safe and one unsafe response
prompts.jsonl  short PKU-SafeRLHF test prompts that no scorer and no reference was trained on
preferences.jsonl  the 500 PKU-SafeRLHF rows with both labels, those that fit the language model's context
benign.jsonl   XSTest prompts that deserve an answer
report.json    held-out accuracies (split by prompt) and the spread of the scores on the reference's samples

Both are sequence classifiers on a 3 M-parameter story model. They are instruments for exercising the method on real
text, no judges of helpfulness or safety: report.json says how little the helpfulness model knows. Nothing of the data
is copied but prompts and the 500 rows. The text is offensive in places, and much of it CC BY-NC 4.0: research use only.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from can_dist.config.sections import Generate
from can_dist.errors import CanDistError, DataError, EnvironmentProblem
from can_dist.fitting.score_models import ScoreExample, ScorePair, fit_score_model, save_model, scores_of
from can_dist.modeling.formatter import Formatter
from can_dist.modeling.loading import end_token_ids
from can_dist.modeling.sampling import row_seed, sample

MAX_LENGTH = 96  # tokens of prompt and response that a scorer learns from; the recipe samples 24-token responses
MAX_PROMPT_TOKENS = 40
NUM_BENIGN = 60
SAFETY_PAIRS = 500  # of 5,135, which hold only 930 distinct prompts


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a gzipped JSON Lines file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Point --data at the folder that holds preferences/, prompts/, models/.")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def user(prompt: str) -> list[dict[str, str]]:
    """The prompt as a one-turn conversation."""
    return [{"role": "user", "content": prompt.strip()}]


def helpfulness_pairs(data: Path) -> list[ScorePair]:
    """Better and worse responses: PKU-SafeRLHF's helpfulness choice, and HH-RLHF's one-turn helpful test pairs."""
    pairs = []
    for row in read_rows(data / "preferences/pku_saferlhf_dual_500.jsonl.gz"):
        better = row["better_response_id"]
        pairs.append(ScorePair(user(row["prompt"]), row[f"response_{better}"], row[f"response_{1 - better}"]))
    for row in read_rows(data / "preferences/hh_helpful-base_test.jsonl.gz"):
        prompt, chosen = _one_turn(row["chosen"])
        same_prompt, rejected = _one_turn(row["rejected"])
        if prompt and prompt == same_prompt:
            pairs.append(ScorePair(user(prompt), chosen, rejected))
    return [pair for pair in pairs if pair.better.strip() and pair.worse.strip()]


def _one_turn(dialogue: str) -> tuple[str, str]:
    """Prompt and response of a dialogue of one exchange; ('', '') for longer ones."""
    prompt, _, response = dialogue.removeprefix("\n\nHuman:").partition("\n\nAssistant:")
    return ("", "") if "\n\nHuman:" in response else (prompt.strip(), response.strip())


def safety_data(data: Path, seed: int) -> tuple[list[ScorePair], list[ScoreExample]]:
    """A sample of the safe/unsafe pairs, and BeaverTails' labelled answers."""
    rows = read_rows(data / "preferences/pku_saferlhf_safety_pairs_5135.jsonl.gz")
    order = np.random.default_rng(seed).permutation(len(rows))[:SAFETY_PAIRS]
    pairs = []
    for row in (rows[index] for index in order):
        safe = row["safer_response_id"]
        pairs.append(ScorePair(user(row["prompt"]), row[f"response_{safe}"], row[f"response_{1 - safe}"]))
    answers = read_rows(data / "preferences/beavertails_30k_test_qa.jsonl.gz")
    return pairs, [ScoreExample(user(row["prompt"]), row["response"], int(row["is_safe"])) for row in answers]


def fresh_prompts(data: Path, formatter: Formatter, num_prompts: int, seed: int) -> list[str]:
    """Short distinct test prompts that occur in no training text of the scorers or of the reference."""
    seen: set[str] = set()
    for path in sorted((data / "preferences").glob("*.jsonl.gz")):
        seen |= {_normal(row["prompt"]) for row in read_rows(path) if "prompt" in row}
    kept: list[str] = []
    rows = read_rows(data / "prompts/pku_saferlhf_test_prompts.jsonl.gz")
    for index in np.random.default_rng(seed).permutation(len(rows)):
        prompt = rows[index]["prompt"].strip()
        if _normal(prompt) in seen or len(formatter.prompt_ids(user(prompt))) > MAX_PROMPT_TOKENS:
            continue
        seen.add(_normal(prompt))
        kept.append(prompt)
        if len(kept) == num_prompts:
            return kept
    raise DataError(
        f"only {len(kept)} fresh prompts of at most {MAX_PROMPT_TOKENS} tokens; --num-prompts {num_prompts}."
    )


def double_labels(data: Path, formatter: Formatter, context: int) -> list[dict[str, Any]]:
    """PKU-SafeRLHF rows with both labels whose prompt and responses fit the language model."""
    names = ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id")
    names += ("is_response_0_safe", "is_response_1_safe")
    rows = []
    for row in read_rows(data / "preferences/pku_saferlhf_dual_500.jsonl.gz"):
        texts = [formatter.full_ids(user(row["prompt"]), row[f"response_{side}"]) for side in (0, 1)]
        if max(map(len, texts)) < context:
            rows.append({name: row[name] for name in names})
    return rows


def benign_prompts(data: Path) -> list[str]:
    """XSTest prompts that sound dangerous and are not."""
    rows = [row for row in read_rows(data / "prompts/xstest_v2_prompts.jsonl.gz") if row["label"] == "safe"]
    return [row["prompt"] for row in rows[:: len(rows) // NUM_BENIGN][:NUM_BENIGN]]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _normal(prompt: str) -> str:
    """A prompt without case, punctuation and spacing, to find repeats."""
    return "".join(letter for letter in prompt.lower() if letter.isalnum())


def base_with_template(data: Path, out: Path) -> Path:
    """The story model with the reference's tokenizer beside it, so that scorer and reference read the same text."""
    base, reference = data / "models/stories3M", data / "models/stories3M-qa-sft"
    for folder in (base, reference):
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder}: no model here. Point --data at the folder that holds models/.")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save_model(model, AutoTokenizer.from_pretrained(reference), out)
    return out


def spread_on_samples(world: Path, reference: Path, prompts: list[str], num_responses: int) -> dict[str, float]:
    """Within-prompt standard deviations, and the correlation, of the two scores on the reference's own responses."""
    tokenizer = AutoTokenizer.from_pretrained(reference)
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    formatter, end_ids = Formatter(tokenizer), end_token_ids(model.generation_config, tokenizer)
    options = Generate(num_responses=num_responses, max_new_tokens=24)
    ids: list[list[int]] = []
    for prompt in prompts:
        prompt_ids = formatter.prompt_ids(user(prompt))
        seeds = [row_seed(0, prompt, index) for index in range(num_responses)]
        drawn = sample(model, tokenizer, [prompt_ids] * num_responses, seeds, options, end_ids)
        ids += [[*prompt_ids, *response] for response, _ in drawn]
    shape = (len(prompts), num_responses)
    score_PK = {}
    for name in ("reward", "safety"):
        head = AutoModelForSequenceClassification.from_pretrained(world / name, dtype=torch.float32)
        score_PK[name] = scores_of(head, ids).reshape(shape)
    centred = {name: score - score.mean(axis=1, keepdims=True) for name, score in score_PK.items()}
    scale = num_responses / (num_responses - 1)
    sd = {name: float(np.sqrt(scale * (score**2).mean())) for name, score in centred.items()}
    covariance = float(scale * (centred["reward"] * centred["safety"]).mean())
    return {
        "reward_sd": sd["reward"],
        "safety_sd": sd["safety"],
        "correlation": covariance / (sd["reward"] * sd["safety"]),
        "safety_attainable": float(score_PK["safety"].max(axis=1).mean() - score_PK["safety"].mean()),
    }


def fits(data: Path, out: Path, encode: Any, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train both scorers; yields each one's name and result."""
    with tempfile.TemporaryDirectory() as scratch:
        yield from _fits_from(base_with_template(data, Path(scratch) / "base"), data, out, encode, seed)


def _fits_from(base: Path, data: Path, out: Path, encode: Any, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train both scorers on the body of ``base``."""
    pairs, examples = safety_data(data, seed)
    common = {"encode": encode, "max_length": MAX_LENGTH, "batch_size": 16, "seed": seed, "weight_decay": 0.1}
    safety = fit_score_model(base, pairs, out / "safety", examples=examples, epochs=2, lr=1.5e-4, **common)
    yield "safety", asdict(safety)
    reward = fit_score_model(
        base, helpfulness_pairs(data), out / "reward", epochs=2, lr=1.5e-4, held_out=0.25, **common
    )
    yield "reward", asdict(reward)


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/pku_stories3M/world"), show_default=True)
@click.option("--num-prompts", default=1700, show_default=True, help="Prompts to pick.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="More help only on idle cores; on busy ones they hurt.")
def main(data: Path, out: Path, num_prompts: int, seed: int, threads: int) -> None:
    """Write the models, the data and report.json under --out."""
    torch.set_num_threads(threads)
    try:
        prepare(data, out, num_prompts, seed)
    except CanDistError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def prepare(data: Path, out: Path, num_prompts: int, seed: int) -> None:
    """Train, measure and write everything; prints each result as it is known."""
    if out.exists() and any(out.iterdir()):
        raise EnvironmentProblem(f"{out} is not empty. Remove it, or give another --out.")
    reference = data / "models/stories3M-qa-sft"
    formatter = Formatter(AutoTokenizer.from_pretrained(reference))
    out.mkdir(parents=True, exist_ok=True)
    prompts = fresh_prompts(data, formatter, num_prompts, seed)
    write_rows(out / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    context = AutoConfig.from_pretrained(reference).max_position_embeddings
    rows = double_labels(data, formatter, context)
    write_rows(out / "preferences.jsonl", rows)
    write_rows(out / "benign.jsonl", [{"prompt": prompt} for prompt in benign_prompts(data)])
    report: dict[str, Any] = {"seed": seed, "num_prompts": len(prompts), "num_preferences": len(rows)}
    for name, result in fits(data, out, formatter.full_ids, seed):
        report[name] = result
        click.echo(f"{name}: {json.dumps(report[name])}")
    report["samples"] = spread_on_samples(out, reference, prompts[:40], num_responses=8)
    click.echo(f"samples of {reference.name}: {json.dumps(report['samples'])}")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
