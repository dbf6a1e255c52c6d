"""Train a score model: a sequence classifier with one output, from pairs and from labelled examples.

The score is ``AutoModelForSequenceClassification`` with ``num_labels=1`` read at the last attended token, fp32. Pairs
are fitted by Bradley-Terry, −ln σ(s_better − s_worse); examples by the logistic loss of a 0/1 label, so that with
examples a score above 0 means "label 1". Higher is better. Texts reach the model as the token ids that the caller's
``encode(messages, response)`` makes: the formatter used to train is the formatter used to score.

    result = fit_score_model(base, pairs, out, encode=Formatter(tokenizer).full_ids)

Shapes: B sequences in a batch, T tokens. Single process, plain torch: meant for models of a few million parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from can_dist.console import progress
from can_dist.errors import DataError, EnvironmentProblem, NumericalError
from can_dist.modeling.precision import say_accelerator
from can_dist.tables.artifacts import atomic_directory

Messages = Sequence[dict[str, str]]
Encode = Callable[[Messages, str], list[int]]
Measured = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]
_POOL_BATCHES = 16  # batches whose members are sorted by length together


@dataclass(frozen=True)
class ScorePair:
    """Two responses to the same messages, the better one first."""

    messages: Messages
    better: str
    worse: str


@dataclass(frozen=True)
class ScoreExample:
    """One response with a 0/1 label; 1 is the good side (safe, helpful)."""

    messages: Messages
    response: str
    label: int


@dataclass(frozen=True)
class FitResult:
    """The result of a fit; held-out rows share no messages with training rows."""

    num_train_pairs: int
    num_train_examples: int
    num_held_out_pairs: int
    num_held_out_examples: int
    num_truncated: int
    num_steps: int
    train_loss: float  # mean over the last epoch
    pair_accuracy: float | None  # share of held-out pairs whose better response scores higher (ties count half)
    pair_accuracy_se: float | None
    auc: float | None  # of the held-out examples


@dataclass(frozen=True)
class _Row:
    """One unit of the loss: a pair (two sequences) or an example (one sequence and its label)."""

    ids: tuple[list[int], ...]
    label: int


def fit_score_model(
    base: Path,
    pairs: Sequence[ScorePair],
    out: Path,
    *,
    encode: Encode,
    examples: Sequence[ScoreExample] = (),
    epochs: int = 2,
    lr: float = 3e-4,
    batch_size: int = 32,
    max_length: int = 512,
    weight_decay: float = 0.01,
    held_out: float = 0.15,
    seed: int = 0,
    measured: Measured | None = None,
) -> FitResult:
    """Fit a one-output sequence classifier on the body of ``base`` and save it, with its tokenizer, in ``out``.

    Args:
        base: directory of a causal language model and its tokenizer.
        pairs: fitted by the Bradley-Terry loss.
        out: written whole or not at all, with the result in ``out/fit.json``.
        encode: token ids of a conversation and a response.
        examples: fitted by the logistic loss.
        epochs: passes over the training rows.
        lr: peak learning rate of AdamW.
        batch_size: rows per step.
        max_length: longest sequence in tokens; longer ones lose their end and are counted.
        weight_decay: of AdamW.
        held_out: share of distinct messages that measure the accuracy and the AUC.
        seed: of the head, the split and the order.
        measured: is told the held-out pairs' differences of scores, better less worse, and the held-out examples'
            scores and labels, before the model is written; what it returns stands in ``out/fit.json`` too.

    Raises:
        EnvironmentProblem: ``out`` exists.
        DataError: no training rows, a label other than 0 and 1, or texts that the model cannot read.
        NumericalError: the loss is not finite.
    """
    if out.exists():
        raise EnvironmentProblem(f"score model: {out} exists already. Remove it, or name another folder.")
    model = load_classifier(base, seed)
    rows, num_truncated = _encode_rows(pairs, examples, encode, max_length)
    is_aside = _split([*map(_key, pairs), *map(_key, examples)], held_out, seed)
    train, test = ([row for row, aside in zip(rows, is_aside, strict=True) if aside == part] for part in (False, True))
    if not train:
        raise DataError(f"score model: held_out={held_out} leaves no training rows of {len(rows)}. Lower held_out.")
    num_steps, train_loss = _fit(model, train, epochs, lr, batch_size, weight_decay, seed, out.name)
    held_out_scores = _held_out_scores(model, test, batch_size)
    further = {} if measured is None else measured(*held_out_scores)
    accuracy, accuracy_se, auc = _measure(*held_out_scores)
    result = FitResult(
        num_train_pairs=sum(len(row.ids) == 2 for row in train),
        num_train_examples=sum(len(row.ids) == 1 for row in train),
        num_held_out_pairs=sum(len(row.ids) == 2 for row in test),
        num_held_out_examples=sum(len(row.ids) == 1 for row in test),
        num_truncated=num_truncated,
        num_steps=num_steps,
        train_loss=train_loss,
        pair_accuracy=accuracy,
        pair_accuracy_se=accuracy_se,
        auc=auc,
    )
    save_model(
        model,
        AutoTokenizer.from_pretrained(base),
        out,
        {"fit.json": json.dumps({**asdict(result), **further}, indent=2)},
    )
    return result


def load_classifier(base: Path, seed: int) -> Any:
    """Return the fp32 classifier on the body of ``base``, with a zero head; ``seed`` draws any other new weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _quiet():
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    if model.config.pad_token_id is None:
        raise DataError(f"score model: {base}/config.json has no pad_token_id, which batched scoring needs. Set it.")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise DataError(f"score model: {type(model).__name__} of {base} has no linear head 'score' over a token state.")
    torch.nn.init.zeros_(model.score.weight)
    return model


def scores_of(model: Any, ids: Sequence[list[int]], batch_size: int = 64) -> np.ndarray:
    """Return the score of each sequence of token ids, in order, without gradients."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    scores = np.zeros(len(ids), dtype=np.float64)
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            scores[chosen] = _scores(model, [ids[index] for index in chosen]).double().numpy()
    return scores


def save_model(model: Any, tokenizer: Any, out: Path, extra_files: dict[str, str] | None = None) -> None:
    """Save ``model`` and ``tokenizer`` in ``out``: written beside it, then renamed."""
    say_accelerator()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as built, _quiet():
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        for name, text in (extra_files or {}).items():
            (built / name).write_text(text + "\n", encoding="utf-8")


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return P(score of a 1 > score of a 0), ties half; None where one class is missing."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return None
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and its notice about the fresh head (which is the point here) off the screen."""
    verbosity, shown = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()


def _key(row: ScorePair | ScoreExample) -> str:
    """Return a string that is the same for rows of equal messages only."""
    return json.dumps([dict(message) for message in row.messages], sort_keys=True, ensure_ascii=False)


def _encode_rows(
    pairs: Sequence[ScorePair], examples: Sequence[ScoreExample], encode: Encode, max_length: int
) -> tuple[list[_Row], int]:
    """Return the token ids of every pair and example, cut at ``max_length``, and how many sequences were cut."""
    if not pairs and not examples:
        raise DataError("score model: no pairs and no examples to learn from. Pass at least one of them.")
    num_truncated = 0

    def ids_of(messages: Messages, response: str) -> list[int]:
        nonlocal num_truncated
        ids = list(encode(messages, response))
        if not ids:
            raise DataError(f"score model: encode() made no tokens of {messages!r} and {response!r}.")
        num_truncated += len(ids) > max_length
        return ids[:max_length]

    rows = [_Row((ids_of(pair.messages, pair.better), ids_of(pair.messages, pair.worse)), 1) for pair in pairs]
    for example in examples:
        if example.label not in (0, 1):
            raise DataError(f"score model: label {example.label!r} of {example.messages!r}; expected 0 or 1.")
        rows.append(_Row((ids_of(example.messages, example.response),), int(example.label)))
    return rows, num_truncated


def _split(keys: Sequence[str], held_out: float, seed: int) -> list[bool]:
    """Return whether each row is held out: the distinct keys with the smallest digests are, so by prompt."""
    distinct = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    aside = set(distinct[: round(held_out * len(distinct))])
    return [key in aside for key in keys]


def _batches(rows: Sequence[_Row], batch_size: int, generator: np.random.Generator) -> Iterator[list[_Row]]:
    """Yield batches of one kind (pairs or examples) and of similar lengths, in random order."""
    batches: list[list[_Row]] = []
    for num_sequences in (1, 2):
        kind = [row for row in rows if len(row.ids) == num_sequences]
        order = generator.permutation(len(kind))
        for first in range(0, len(order), _POOL_BATCHES * batch_size):
            pool = [kind[index] for index in order[first : first + _POOL_BATCHES * batch_size]]
            pool.sort(key=lambda row: max(len(ids) for ids in row.ids))
            batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    for index in generator.permutation(len(batches)):
        yield batches[index]


def _scores(model: Any, ids: Sequence[list[int]]) -> Tensor:
    """Return scores (B,) of right-padded sequences, each read at its last attended token."""
    if any(row[-1] == model.config.pad_token_id for row in ids):
        raise DataError(
            f"score model: a text ends with the padding token ({model.config.pad_token_id}), before which transformers "
            "will read the trained model. Give the base model a padding token of its own."
        )
    ids_BT = pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=model.config.pad_token_id)
    mask_BT = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True)
    body = getattr(model, model.base_model_prefix)
    hidden_BTD = body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    last_B = mask_BT.sum(1) - 1
    scores: Tensor = model.score(hidden_BTD[torch.arange(len(ids)), last_B].float()).squeeze(-1)
    return scores


def _loss(model: Any, batch: Sequence[_Row]) -> Tensor:
    """Return the mean Bradley-Terry loss of a batch of pairs, or the mean logistic loss of a batch of examples."""
    if len(batch[0].ids) == 2:
        scores = _scores(model, [row.ids[0] for row in batch] + [row.ids[1] for row in batch])
        better_B, worse_B = scores.chunk(2)
        return -functional.logsigmoid(better_B - worse_B).mean()
    scores_B = _scores(model, [row.ids[0] for row in batch])
    labels_B = torch.tensor([float(row.label) for row in batch])
    return functional.binary_cross_entropy_with_logits(scores_B, labels_B)


def _fit(
    model: Any, rows: Sequence[_Row], epochs: int, lr: float, batch_size: int, weight_decay: float, seed: int, name: str
) -> tuple[int, float]:
    """Run AdamW with a linear warm-up and decay; return the number of steps and the last epoch's mean loss."""
    generator = np.random.default_rng(seed)
    schedule = [batch for _ in range(epochs) for batch in _batches(rows, batch_size, generator)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    num_steps, warmup = len(schedule), max(1, len(schedule) // 20)
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[]), progress(f"fit {name}", num_steps, "step") as bar:
        torch.manual_seed(seed)
        for step, batch in enumerate(schedule):
            rate = lr * min((step + 1) / warmup, (num_steps - step) / num_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise NumericalError(f"score model {name}: loss {losses[-1]} at step {step}. Lower lr (now {lr}).")
            bar.update()
    model.eval()
    last_epoch = losses[-max(1, num_steps // max(1, epochs)) :]
    return num_steps, float(np.mean(last_epoch))


def _held_out_scores(model: Any, rows: Sequence[_Row], batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the differences of scores of pairs, better less worse, and the scores and labels of examples."""
    pairs = [row for row in rows if len(row.ids) == 2]
    singles = [row for row in rows if len(row.ids) == 1]
    scores = scores_of(model, [ids for row in pairs for ids in row.ids], 2 * batch_size).reshape(-1, 2)
    alone = scores_of(model, [row.ids[0] for row in singles], 2 * batch_size)
    return scores[:, 0] - scores[:, 1], alone, np.array([row.label for row in singles])


def _measure(
    gap_N: np.ndarray, score_N: np.ndarray, label_N: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """Return the accuracy on held-out pairs, its standard error, and the AUC on held-out examples."""
    right = (np.sign(gap_N) + 1) / 2
    accuracy = accuracy_se = None
    if len(right):
        accuracy, accuracy_se = float(right.mean()), float(right.std() / np.sqrt(len(right)))
    return accuracy, accuracy_se, area_under_curve(score_N, label_N)
