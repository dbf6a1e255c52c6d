"""responses → scores: one float column per scorer, on Ray actors; each scorer's column is an artifact of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load, save

from can_dist.config import MultiHead
from can_dist.errors import DataError
from can_dist.modeling.classifiers import output_weights
from can_dist.modeling.formatter import require_convention
from can_dist.modeling.loading import load_model_config
from can_dist.modeling.precision import run_precision
from can_dist.scoring.kinds import check_scorer_opens, halved, load_scorer, scorer_identity, shown_name
from can_dist.scoring.log_ratio import check_one_reference, log_ratio
from can_dist.scoring.protocol import ActorSpec, LogProb, Outputs, PolicyRatio, Response, ScorerSpec
from can_dist.stages.score_cache import keep, look_up, open_cache, score_keys
from can_dist.tables.artifacts import (
    MANIFEST,
    Artifact,
    StageDirectory,
    atomic_file,
    canonical_json,
    load_artifact,
    read_part,
    write_json,
    write_part,
)
from can_dist.tables.quarantine import QUARANTINED, quarantined, without
from can_dist.tables.schemas import LOGP_REFERENCE, RESPONSES, SCORE_KEYS, check_schema, check_unique
from can_dist.workspace import Workspace


def score(work: Workspace, responses: Artifact, scorers: Mapping[str, ScorerSpec], *, role: str) -> Artifact:
    """Return the ``scores`` table: the responses' keys, lengths, and one float64 column per scorer.

    Columns are named after the scorers, log-probabilities ``logp.<name>``; each column's metadata holds the model,
    weights digest, template and sign. Higher is better in every score: a cost model enters with ``sign: -1``.

    Raises:
        DataError: A score is not finite (response ids listed), a model does not fit its spec, log-ratios are relative
            to different references, or a model for log-probabilities has another template than the responses.
    """
    columns = {name: _column(work, responses, name, spec, role) for name, spec in scorers.items()}
    check_one_reference({name: artifact.info["scorer"] for name, artifact in columns.items()}, LOGP_REFERENCE)
    stage = work.open("scores", role, {"columns": list(columns)}, {"responses": responses, **columns})
    if stage.finished:
        return stage.finished
    check_unique(responses.table, ["response_id"], str(responses.path))
    left_out = {key: why for artifact in columns.values() for key, why in quarantined(artifact).items()}
    table = without(responses.table.select([*SCORE_KEYS.names, "num_tokens", "finish_reason"]), left_out)
    _check_every_prompt(responses, table)
    for name, artifact in columns.items():
        part = without(artifact.table, left_out)
        if not part.column("response_id").equals(table.column("response_id")):
            raise DataError(f"{artifact.path}: its response ids are not those of {responses.path}.")
        table = table.append_column(part.schema.field(name), part.column(name))
    write_part(stage.path, 0, table.combine_chunks())
    info = {"scorers": {name: dict(artifact.info["scorer"]) for name, artifact in columns.items()}}
    return stage.commit(info=info | ({QUARANTINED: left_out} if left_out else {}))


def _check_every_prompt(responses: Artifact, scored: pa.Table) -> None:
    given, left = (pc.unique(table.column("prompt_id")) for table in (responses.table, scored))
    if empty := given.filter(pc.invert(pc.is_in(given, value_set=left))).to_pylist():
        raise DataError(
            f"{responses.path}: every response of {len(empty)} prompt(s) is quarantined: {', '.join(empty[:5])}. "
            "Remove these prompts."
        )


def _column(work: Workspace, responses: Artifact, name: str, spec: ScorerSpec, role: str) -> Artifact:
    if isinstance(spec, PolicyRatio):
        return _score_ratio(work, responses, name, spec, role)
    if isinstance(spec, MultiHead):
        return _score_choice(work, responses, name, spec, role)
    return _score_one(work, responses, name, spec, role)


def _score_one(
    work: Workspace, responses: Artifact, name: str, spec: ActorSpec, role: str, num_outputs: int | None = None
) -> Artifact:
    """Score every response with one scorer, a shard per part; a score is one number, or ``num_outputs`` numbers."""
    precision = run_precision(work.config)
    scorer_keys = scorer_identity(spec, precision)
    label = f"{name}, {role}"
    stage = work.open("score", label, {"column": name, "scorer": scorer_keys}, {"responses": responses})
    # only sampled responses may be left out: rows of a given pair belong together
    allowed = work.config.cluster.max_quarantine if responses.stage == "generate" else 0
    if stage.finished:
        return _check_allowed(stage.finished, allowed)
    rows = {int(e["file"][5:10]): e["rows"] for e in responses.manifest["files"] if "rows" in e}
    if (identity := canonical_json(scorer_keys)) not in work.checked:
        check_scorer_opens(spec)
        work.checked.add(identity)
    text = {}
    if isinstance(spec, LogProb):
        text = {"text": require_convention(spec.model, responses.info.get("text"), str(responses.path))}
    job = ScoreJob(
        name,
        spec,
        identity,
        precision,
        responses.path,
        stage.path,
        allowed,
        work.config.cluster.on_nonfinite,
        num_outputs,
    )
    finished = stage.finished_parts()
    with work.timed("score", label, responses=sum(rows.values())):
        todo = {shard: n for shard, n in rows.items() if shard not in finished}
        if work.config.cluster.score_cache:
            todo = _take_from_cache(work, job, todo, label)
        work.run_shards(job, todo, f"score ({label})")
        if work.config.cluster.score_cache:
            _put_into_cache(job, rows)
        num_tokens = pc.sum(responses.table.column("num_tokens")).as_py()
        left_out = job.quarantined()
        if left_out:
            work.say(f"score ({label}): {len(left_out)} of {sum(rows.values())} responses are quarantined")
        _check_number(stage.path, left_out, allowed)  # each actor counts only those that it saw
        _check_rows(stage, sum(rows.values()) - len(left_out))
        return stage.commit(
            files=job.quarantine_files(),
            info={
                "scorer": {"name": name, "model": shown_name(spec), **scorer_keys, **text},
                "num_tokens": num_tokens,
                **({QUARANTINED: left_out} if left_out else {}),
            },
            parts=rows,
        )


def _check_allowed(scores: Artifact, allowed: int) -> Artifact:
    """Return finished scores; raise if they leave out more responses than the configuration allows now."""
    _check_number(scores.path, quarantined(scores), allowed)
    return scores


def _check_number(path: Path, left_out: Mapping[str, str], allowed: int) -> None:
    if len(left_out) > allowed:
        raise DataError(
            f"{path}: {len(left_out)} response(s) have no score: {', '.join(list(left_out)[:5])}; "
            f"cluster.max_quarantine is {allowed}. Raise it, or delete the directory to have them scored again."
        )


def _score_ratio(work: Workspace, responses: Artifact, name: str, spec: PolicyRatio, role: str) -> Artifact:
    """Subtract the reference's log-probabilities, scored once for all, from those of the aligned policy."""
    column = f"logp.{name}"
    logp = _score_one(work, responses, column, LogProb(model=spec.policy), role)
    logp_ref = _score_one(work, responses, LOGP_REFERENCE, LogProb(model=spec.reference), role)
    left_out = quarantined(logp) | quarantined(logp_ref)
    both = [without(scores.table, left_out) for scores in (logp, logp_ref)]
    keys = both[0].select(SCORE_KEYS.names)
    if not keys.equals(both[1].select(SCORE_KEYS.names)):
        raise DataError(f"{logp.path}: its response ids are not those of {logp_ref.path}.")
    values_N = log_ratio(both[0].column(column), both[1].column(LOGP_REFERENCE), spec)
    inputs = {"logp": logp, "logp_ref": logp_ref, **spec.made_from}
    return _derived(work, name, spec, role, inputs, keys, values_N, left_out)


def _score_choice(work: Workspace, responses: Artifact, name: str, spec: MultiHead, role: str) -> Artifact:
    """Weigh the outputs of a classifier; they are computed once for all scores made of them."""
    weight_L = np.array(output_weights(spec, load_model_config(spec, "sequence classifier")))
    column = f"outputs.{Path(spec.model).name}"
    outputs = _score_one(work, responses, column, Outputs(body=spec), role, len(weight_L))
    values_N = numbers(outputs.table.column(column)) @ weight_L * spec.sign
    keys = outputs.table.select(SCORE_KEYS.names)
    return _derived(work, name, spec, role, {"outputs": outputs}, keys, values_N, quarantined(outputs))


def _derived(
    work: Workspace,
    name: str,
    spec: PolicyRatio | MultiHead,
    role: str,
    inputs: Mapping[str, Artifact],
    keys: pa.Table,
    values_N: np.ndarray,
    left_out: Mapping[str, str],
) -> Artifact:
    """Commit a column computed from columns that actors scored."""
    scorer_keys = scorer_identity(spec, run_precision(work.config))
    stage = work.open("score", f"{name}, {role}", {"column": name, "scorer": scorer_keys}, inputs)
    if stage.finished:
        return stage.finished
    field = pa.field(name, pa.float64(), metadata={"scorer": canonical_json(scorer_keys)})
    write_part(stage.path, 0, keys.append_column(field, pa.array(values_N)).combine_chunks())
    info = {"scorer": {"name": name, "model": shown_name(spec), **scorer_keys}}
    return stage.commit(info=info | ({QUARANTINED: dict(left_out)} if left_out else {}))


def _check_rows(stage: StageDirectory, expected: int) -> None:
    """Raise ``DataError`` unless every response has a score or is quarantined."""
    if (num_scores := stage.parts_table().num_rows) != expected:
        raise DataError(
            f"{stage.path}: {num_scores} scores where {expected} responses are not quarantined. Delete the directory "
            "and run again."
        )


def _take_from_cache(work: Workspace, job: ScoreJob, shards: Mapping[int, int], label: str) -> dict[int, int]:
    """Write the shards whose scores are all cached, and return the others, which actors must complete."""
    left, num_known = {}, 0
    with open_cache() as cache:
        for shard, num_rows in shards.items():
            table = job.read(shard)
            value_N = look_up(cache, score_keys(job.identity, table), job.shape)
            num_known += int(is_known(value_N).sum())
            if is_known(value_N).all():
                job.commit(shard, table, value_N)
            else:
                left[shard] = num_rows
                with atomic_file(job.known_path(shard)) as temporary:
                    temporary.write_bytes(save({job.name: value_N}))
    of = sum(shards.values())
    work.say(f"score ({label}): {num_known:,} of {of:,} from cache", event="cache", label=label, known=num_known, of=of)
    return left


def _put_into_cache(job: ScoreJob, shards: Iterable[int]) -> None:
    with open_cache() as cache:
        for shard in shards:
            value_N = numbers(read_part(job.out / f"part-{shard:05d}.arrow").column(job.name))
            keep(cache, score_keys(job.identity, without(job.read(shard), job.quarantined(shard))), value_N)


@dataclass(frozen=True)
class ScoreJob:
    """The work of one actor: open one scorer, score a part of the responses."""

    name: str
    spec: ActorSpec
    identity: str
    precision: str
    responses: Path
    out: Path
    max_quarantine: int
    on_nonfinite: str = "fail"
    num_outputs: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one response's score: () for a number, (L,) for several."""
        return () if self.num_outputs is None else (self.num_outputs,)

    @property
    def models(self) -> str:
        """The scorer, with the digest of its weights."""
        return f"score {self.spec!r} {self.precision} {self.identity}"

    def load(self) -> Any:
        """Open the scorer."""
        return load_scorer(self.spec, self.precision)

    def process(self, loaded: Any, shard: int) -> None:
        """Score and commit one part; a score that is not finite raises, or its response is left out."""
        table = self.read(shard)
        known = self.known_path(shard)
        value_N = load(known.read_bytes())[self.name] if known.is_file() else self._unknown(table.num_rows)
        left = without(table, self.quarantined(shard))
        value_N = value_N[pc.is_in(table.column("response_id"), left.column("response_id")).to_numpy()]
        table, todo = left, np.flatnonzero(~is_known(value_N))
        # the one place where a cost becomes a utility: from here on higher is better
        value_N[todo] = loaded.score(_responses(table.take(todo))) * getattr(self.spec, "sign", 1)
        is_finite_N = is_known(value_N)
        if not is_finite_N.all():
            self._leave_out(shard, table.filter(~is_finite_N), value_N[~is_finite_N])
        self.commit(shard, table.filter(is_finite_N), value_N[is_finite_N])

    def halved(self) -> ScoreJob | None:
        """Return the job with passes of half the size, or None."""
        spec = halved(self.spec)
        return None if spec is None else replace(self, spec=spec)

    def row_names(self, shard: int) -> list[str]:
        """Return the names of the responses of a shard, for messages."""
        left = without(self.read(shard), self.quarantined(shard))
        return [f"response {name!r}" for name in left.column("response_id").to_pylist()]

    def set_aside(self, shard: int, row: int, why: str) -> bool:
        """Quarantine a response, if the configuration allows one more."""
        if len(self.quarantined()) >= self.max_quarantine:
            return False
        response_id = without(self.read(shard), self.quarantined(shard)).column("response_id")[row].as_py()
        self._quarantine(shard, {response_id: why})
        return True

    def _quarantine(self, shard: int, why: Mapping[str, str]) -> None:
        reasons = {response_id: f"{self.name}: {reason}" for response_id, reason in why.items()}
        write_json(self._quarantine_path(shard), self.quarantined(shard) | reasons)

    def quarantined(self, shard: int | None = None) -> dict[str, str]:
        """Return the ids left out of a shard, or of all shards, with the reasons."""
        paths = [self._quarantine_path(shard)] if shard is not None else [self.out / n for n in self.quarantine_files()]
        files = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        return {response_id: why for file in files for response_id, why in file.items()}

    def quarantine_files(self) -> list[str]:
        """Return the names of the files that list the ids left out, one per part that has any."""
        return sorted(path.name for path in self.out.glob("quarantined-*.json"))

    def _quarantine_path(self, shard: int) -> Path:
        return self.out / f"quarantined-{shard:05d}.json"

    def try_rows(self, loaded: Any, shard: int, rows: range) -> None:
        """Score some responses of a shard and keep nothing."""
        left = without(self.read(shard), self.quarantined(shard))
        loaded.score(_responses(left.slice(rows.start, len(rows))))

    def read(self, shard: int) -> pa.Table:
        """Return one part of the responses."""
        manifest = self.responses / MANIFEST
        written_ns = manifest.stat().st_mtime_ns if manifest.is_file() else 0
        table = _opened(self.responses, written_ns).part(shard)
        return check_schema(table, RESPONSES, f"{self.responses}, part {shard}")

    def known_path(self, shard: int) -> Path:
        """Return the file of a part's cached scores, NaN for the others; it is removed at commit."""
        return self.out / f".tmp-known-{shard:05d}.safetensors"

    def commit(self, shard: int, table: pa.Table, value_N: np.ndarray) -> None:
        """Write the scores of one part of the responses."""
        values = pa.array(value_N.ravel(), pa.float64())
        if self.num_outputs is not None:
            values = pa.FixedSizeListArray.from_arrays(values, self.num_outputs)
        field = pa.field(self.name, values.type, metadata={"scorer": self.identity})
        columns = [*table.select(SCORE_KEYS.names).columns, values]
        write_part(self.out, shard, pa.table(columns, schema=pa.schema([*SCORE_KEYS, field])))

    def _unknown(self, num_rows: int) -> np.ndarray:
        return np.full((num_rows, *self.shape), np.nan)

    def _leave_out(self, shard: int, table: pa.Table, value_N: np.ndarray) -> None:
        """Quarantine the responses of a shard whose scores are not finite, if the configuration allows it."""
        bad = dict(zip(table.column("response_id").to_pylist(), value_N.tolist(), strict=True))
        num_left_out = len(self.quarantined()) + len(bad)
        if self.on_nonfinite == "fail" or num_left_out > self.max_quarantine:
            listed = ", ".join(f"{response_id} ({value})" for response_id, value in list(bad.items())[:5])
            raise DataError(
                f"scorer {self.name!r}: {len(bad)} score(s) are not finite numbers: {listed}. Look at these "
                "responses and at the model's precision. Sampled responses may be left out: cluster.on_nonfinite: "
                f"quarantine, and cluster.max_quarantine, which is {self.max_quarantine}, at least {num_left_out}."
            )
        self._quarantine(shard, {response_id: f"its score is {value}" for response_id, value in bad.items()})


@lru_cache(maxsize=1)
def _opened(directory: Path, _written_ns: int) -> Artifact:
    """Open an artifact whose manifest was written then; a manifest of many parts takes longer to read than a part."""
    return load_artifact(directory)


def is_known(value_N: np.ndarray) -> np.ndarray:
    """Return whether all numbers of each response's score, (N, …), are finite: (N,) bool."""
    finite_N: np.ndarray = np.isfinite(value_N.reshape(len(value_N), -1)).all(axis=1)
    return finite_N


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return a score column as float64: (N,), or (N, L) where each score is a list of L numbers."""
    if pa.types.is_fixed_size_list(column.type):
        values: np.ndarray = column.combine_chunks().flatten().to_numpy().reshape(-1, column.type.list_size)
        return values
    plain: np.ndarray = column.to_numpy()
    return plain


def _responses(table: pa.Table) -> list[Response]:
    return [
        Response(row["response_id"], row["messages"], row["text"], row["token_ids"])
        for row in table.select(["response_id", "messages", "text", "token_ids"]).to_pylist()
    ]
