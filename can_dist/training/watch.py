"""What the policy does while it is trained, by the reference's scored validation responses; λ steered by it.

One forward pass over these responses gives ln π_θ, and with ln π_ref and the scores an estimate of every gain and of
KL. Nothing is generated, and nothing is trained on them: on its training responses, which it memorises, a policy looks
finished long before it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from can_dist.dual import PolicyEstimate, ScoreTable, estimate_line, estimate_policy, steer
from can_dist.dual.flat import Best, compared, objective
from can_dist.errors import NumericalError
from can_dist.modeling.formatter import Formatter
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.tables.quarantine import quarantined, scored_responses, without
from can_dist.tables.schemas import LOGP_REFERENCE
from can_dist.tables.scores import score_arrays
from can_dist.tables.utilities import with_utilities
from can_dist.training import ranks
from can_dist.training.batches import Batch, Example, Slot, rank_packs
from can_dist.training.spec import Steering, TrainSpec, WatchSpec
from can_dist.training.targets import combined_score, score_targets

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """What one evaluation says of the policy: numbers by name, and the same as a line for people."""

    values: dict[str, float]
    line: str


class Watch:
    """The validation responses as packs, their scores, and λ as it is now.

    Attributes:
        lam: λ by constraint, by which the examples are labelled now.
        best: The evaluation that later ones are compared with, where ``train.stop`` is flat.
    """

    def __init__(
        self, spec: WatchSpec, preferences: Artifact, formatter: Formatter, *, beta: float, tokens_per_pack: int
    ) -> None:
        self.spec, self.beta, self.tokens_per_pack = spec, beta, tokens_per_pack
        self.loss: str = preferences.info["loss"]
        self.lam = dict(spec.lam)
        scores = load_artifact(spec.scores)
        responses = scored_responses(scores.input("responses"), scores)
        rows = with_utilities(without(scores.table, quarantined(scores)), spec.columns, str(spec.scores))
        arrays = score_arrays(rows, spec.reward, list(spec.lam), str(spec.scores))
        weight_N = None if spec.log_weight is None else rows.column(spec.log_weight).to_numpy()
        self.table = ScoreTable.build(
            arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, weight_N, names=list(spec.lam)
        )
        self.ref_N: FloatArray = rows.column(LOGP_REFERENCE).to_numpy()
        self._rows: dict[str, list[int]] = {}
        self.examples = list(self._grouped(responses, formatter))
        self._scores = _scores_of(preferences, spec) if spec.steering else {}
        self.best: Best | None = None

    @classmethod
    def of(cls, spec: TrainSpec, preferences: Artifact, formatter: Formatter) -> Watch | None:
        """Read the tables of a training's validation responses; None where it has none.

        A prompt whose responses fill more than a pack is spread over several.

        Raises:
            DataError: A table is damaged, or its scores are no finite numbers.
        """
        if spec.watch is None:
            return None
        return cls(spec.watch, preferences, formatter, beta=spec.beta, tokens_per_pack=spec.train.tokens_per_pack)

    def moves_after(self, step: int) -> bool:
        """Return whether λ moves after ``step`` optimizer steps."""
        return self.spec.steering is not None and step in self.spec.steering.steps

    def compares_after(self, step: int) -> bool:
        """Return whether the evaluation after ``step`` optimizer steps can end the training."""
        return self.spec.stop_every is not None and step % self.spec.stop_every == 0

    @property
    def is_flat(self) -> bool:
        """Whether the estimates no longer rise, so that the training ends."""
        return self.best is not None and self.best.is_flat

    def course(self, total: int) -> dict[str, Any]:
        """Return what watching changed: the last λ where it moves, and the best step where it ended the training."""
        course: dict[str, Any] = {"lam": self.lam} if self.spec.steering is not None else {}
        if self.best is not None and self.best.is_flat:
            course["stopped"] = {"of_steps": total, "best_step": self.best.step}
        return course

    def packs(self, rank: int, world_size: int) -> list[list[Slot]]:
        """Return the packs of a rank; every response lies in one pack of one rank."""
        return rank_packs(self.examples, self.tokens_per_pack, rank, world_size)

    @torch.no_grad()
    def log_probs(self, model: Any, batches: Iterable[Batch], device: str | torch.device) -> FloatArray:
        """Return ln π_θ of every validation response, (N,) in nats, the same on all ranks; each passes its packs."""
        logp_N = torch.zeros(len(self.ref_N), dtype=torch.float64, device=device)
        for batch in batches:
            counted = zip(batch.example_ids, batch.share_B.tolist(), strict=True)
            rows = [row if share else -1 for name, share in counted for row in self._rows[name]]
            is_counted = torch.tensor([row >= 0 for row in rows], device=device)
            row_R = torch.tensor([row for row in rows if row >= 0], dtype=torch.long, device=device)
            logp_N[row_R] = model(batch.pack)[is_counted].double()
        dist.all_reduce(logp_N)
        logps: FloatArray = logp_N.cpu().numpy()
        return logps

    def observe(self, logp_N: FloatArray, step: int) -> Observation:
        """Estimate what the policy does after ``step`` steps; move λ, or compare, where due; the same on all ranks.

        Raises:
            NumericalError: A log-probability is not finite, on all ranks.
        """
        observed = Observation({}, ""), self.lam, self.best
        with ranks.agreed():
            if dist.get_rank() == 0:
                observed = self._observe(logp_N, step)
        observation, self.lam, self.best = ranks.of_first(
            observed
        )  # one machine's arithmetic, so that all have the same bits
        return observation

    def labelled(self, batch: Batch) -> Batch:
        """Return a batch with the targets of λ as it is now; batches are made ahead, when λ may have been another."""
        if self.spec.steering is None:
            return batch
        lam_J = list(self.lam.values())
        targets = []
        for name in batch.example_ids:
            reward_K, utility_KJ = self._scores[name]
            target_K = score_targets(self.loss, combined_score(reward_K, utility_KJ, lam_J), self.beta)
            targets.append(torch.tensor(target_K, dtype=torch.float32))
        target_BN = pad_sequence(targets, batch_first=True).to(batch.target_BN.device)
        return replace(batch, target_BN=target_BN)

    def _observe(self, logp_N: FloatArray, step: int) -> tuple[Observation, dict[str, float], Best | None]:
        if bad := int((~np.isfinite(logp_N)).sum()):
            raise NumericalError(
                f"step {step}: the policy's log-probabilities of {bad} of {len(logp_N)} validation responses are not "
                "finite.",
                "Lower train.learning_rate, or use precision fp32 to find the cause.",
            )
        estimate = estimate_policy(self.table, self.ref_N, logp_N, lam=self.lam, beta=self.beta)
        line = estimate_line(estimate, self.spec.demands)
        values, lam = _numbers(estimate, self.lam), self.lam
        if self.spec.steering is not None and self.moves_after(step):
            lam = self._steered(estimate, self.spec.steering)
            line += f"; lambda {_moved(self.lam, lam)}"
        best = self._compared(logp_N, step) if self.compares_after(step) else self.best
        return Observation(values, line), lam, best

    def _compared(self, logp_N: FloatArray, step: int) -> Best:
        objective_P = objective(self.table, self.ref_N, logp_N, list(self.lam.values()), self.beta)
        if step == 0:
            return Best(0, objective_P)
        return compared(self.best or Best(0, np.zeros_like(objective_P)), objective_P, step)  # 0: the reference's

    def _steered(self, estimate: PolicyEstimate, steering: Steering) -> dict[str, float]:
        gain_J = [estimate.improvement[name].mean for name in self.lam]
        lam_J = steer(
            list(self.lam.values()), gain_J, self.spec.demands, np.array(steering.hessian_JJ), step=steering.step
        )
        return dict(zip(self.lam, lam_J.tolist(), strict=True))

    def _grouped(self, responses: pa.Table, formatter: Formatter) -> Iterator[Example]:
        """Yield the responses to each prompt as examples of at most a pack, and keep the rows of each."""
        of_prompt: dict[str, list[int]] = {}
        for row, prompt_id in enumerate(responses.column("prompt_id").to_pylist()):
            of_prompt.setdefault(prompt_id, []).append(row)
        token_ids, messages = responses.column("token_ids"), responses.column("messages")
        for rows in of_prompt.values():
            prompt_ids = formatter.prompt_ids(messages[rows[0]].as_py())
            tokens = [token_ids[row].as_py() for row in rows]
            for part in _parts([len(ids) for ids in tokens], self.tokens_per_pack - len(prompt_ids)):
                name = str(rows[part[0]])
                self._rows[name] = [rows[index] for index in part]
                nothing = [0.0] * len(part)
                yield Example(name, prompt_ids, [tokens[index] for index in part], nothing, nothing, 1.0)


def _parts(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut a list into parts of at most ``budget`` in all, or of one that is larger; yield their indices."""
    part: list[int] = []
    for index, size in enumerate(sizes):
        if part and sum(sizes[i] for i in part) + size > budget:
            yield part
            part = []
        part.append(index)
    yield part


def _scores_of(preferences: Artifact, spec: WatchSpec) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return r (K,) and g (K, J) of the responses of every example, by its id."""
    labelled = preferences.input("scores")
    scores = with_utilities(labelled.table, spec.columns, str(labelled.path))
    row_of = {name: row for row, name in enumerate(scores.column("response_id").to_pylist())}
    reward_N = scores.column(spec.reward).to_numpy().astype(np.float64)
    utility_NJ = np.stack([scores.column(name).to_numpy().astype(np.float64) for name in spec.lam], axis=1)
    examples = preferences.table.select(["example_id", "response_ids"]).to_pylist()
    rows = {example["example_id"]: [row_of[name] for name in example["response_ids"]] for example in examples}
    return {name: (reward_N[of_example], utility_NJ[of_example]) for name, of_example in rows.items()}


def _numbers(estimate: PolicyEstimate, lam: dict[str, float]) -> dict[str, float]:
    """Return an estimate, and λ that the policy was trained towards, as numbers by name; those that exist."""
    values = {"reward": estimate.reward_improvement.mean, "kl": estimate.kl.mean, "ess": estimate.ess}
    values |= {"length": estimate.length.mean, "direction": estimate.direction.mean}
    for name, gain in estimate.improvement.items():
        values |= {f"gain.{name}": gain.mean, f"gain.{name}.low": gain.low, f"gain.{name}.high": gain.high}
        values[f"lam.{name}"] = lam[name]
    return {f"estimate.{name}": value for name, value in values.items() if math.isfinite(value)}


def _moved(before: dict[str, float], after: dict[str, float]) -> str:
    """Return how λ moved, for people."""
    several = len(before) > 1
    return ", ".join(f"{name + ' ' if several else ''}{before[name]:.3g} to {after[name]:.3g}" for name in before)
