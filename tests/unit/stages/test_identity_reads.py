"""No stage reads a key of the configuration that neither its identity nor that of its inputs holds.

Whole runs of a tiny world, in this process: real reading, sampling, scoring, solving, labelling, merging, measuring
and evaluating; only the ranks are replaced, by a file that a training would leave. Every read of a field of the
configuration is recorded with the stage in whose code, or in what it called, the read happens.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import WORDS, small_run
from tiny import make_tiny_lm

from can_dist.config import Config, DataSource, Model, validate_config
from can_dist.config.base import Strict, identity
from can_dist.modeling.loading import model_digest
from can_dist.modeling.policy_probe import PROBE
from can_dist.pipeline import run_pipeline
from can_dist.stages.calibrate import Calibration
from can_dist.stages.ingest import source_identity
from can_dist.tables.artifacts import StageDirectory, canonical_json, flatten, write_json
from can_dist.training import POLICY, SUMMARY
from can_dist.training.engine import TrainSpec
from can_dist.workspace import Workspace

ROOT = Path(__file__).parents[3]
STAGES = ROOT / "can_dist" / "stages"
DS_CONFIG = str(ROOT / "ds_configs" / "zero3_cpu.json")
ALIASES = {"num_samples": "samples", "method": "label"}
# not held by name: how many texts a function is given at once, on which the number of one text must not depend;
# and what `align` makes of a scorer, whose weights, β and scale are held where it scores
NOT_HELD = re.compile(r"score: .*\.batch_size|align: .*\.(model|preferences|calibrate)")
# in an identity when it is given: runs made before it keep their names
HELD_WHEN_GIVEN = [("template_options", {}), ("num_sealed", 0), ("feedback", None), ("kernels", None)]
HELD_WHEN_GIVEN += [("of", "mean"), ("level", None), ("alpha", None), ("others", {}), ("profile", None)]
HELD_WHEN_GIVEN += [("stop", "epochs"), ("tokens_at_once", 32768)]
RECORD = "report.build_report"  # its copy of the whole configuration tells how the run was made; no number is of it


class Reads:
    """What each file of ``stages`` read of one configuration, and the artifacts that it opened."""

    def __init__(self, config: Config) -> None:
        self.fields: dict[str, dict[str, Any]] = defaultdict(dict)
        self.opened: dict[str, list[StageDirectory]] = defaultdict(list)
        self.config, self._paths, self._copies = config, {id(config): ""}, [config]
        self._name(config, "")

    def _name(self, model: Strict, path: str) -> None:
        self._paths[id(model)] = path
        for name in type(model).model_fields:
            value = model.__dict__[name]
            inner = value if isinstance(value, dict) else {"": value}
            for key, item in inner.items():
                if isinstance(item, Strict):
                    self._name(item, ".".join(part for part in (path, name, key) if part))

    def copied(self, model: Strict, copy: Strict) -> None:
        """Count reads of a copy as those of the model."""
        if id(model) in self._paths:
            self._copies.append(copy)  # keeps its id
            self._name(copy, self._paths[id(model)])

    def read(self, model: Strict, name: str, value: Any) -> None:
        """Record the read of a field by the stage that is at work, if one is."""
        field = type(model).model_fields.get(name)
        if field is None or id(model) not in self._paths or isinstance(value, Strict):
            return
        extra = field.json_schema_extra
        if (isinstance(extra, dict) and extra.get("runtime")) or _is_models(value):
            return
        if stage := self._stage():
            self.fields[stage][".".join(part for part in (self._paths[id(model)], name) if part)] = value

    def _stage(self) -> str:
        frame, copies_all = sys._getframe(2), False
        while frame is not None:
            copies_all |= frame.f_code is identity.__code__ and frame.f_locals["model"] is self.config
            if Path(frame.f_code.co_filename).parent == STAGES:
                stage = Path(frame.f_code.co_filename).stem
                return "" if copies_all and f"{stage}.{frame.f_code.co_name}" == RECORD else stage
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    def outside(self) -> list[str]:
        """Return the reads that no identity holds, as 'stage: key = value'."""
        return [
            f"{stage}: {key} = {value!r}"
            for stage, fields in sorted(self.fields.items())
            for key, value in sorted(fields.items())
            if not NOT_HELD.fullmatch(f"{stage}: {key}")
            and (key.rpartition(".")[2], value) not in HELD_WHEN_GIVEN
            and not self._held(key, value, [place for name in _openers(stage) for place in self.opened[name]])
        ]

    def _held(self, key: str, value: Any, places: list[StageDirectory]) -> bool:
        held: set[tuple[str, str]] = set()
        for place in places:
            for item in _identities(place.identity, place.inputs.values()):
                held |= {(path.rsplit(".", 1)[-1], text) for path, text in flatten(item).items()}
                held |= {("", canonical_json(inner)) for inner in _mappings(item)}
        plain = list(value) if isinstance(value, tuple) else value
        name = key.rsplit(".", 1)[-1]
        if {(name, canonical_json(plain)), (ALIASES.get(name, name), canonical_json(plain))} & held:
            return True
        owner: Any = self.config
        for part in key.split(".")[:-1]:
            owner = owner[part] if isinstance(owner, Mapping) else owner.__dict__[part]
        texts = {text for _, text in held}
        if isinstance(owner, Model) and key.endswith((".model", ".revision", ".trust_remote_code")):
            return canonical_json(model_digest(owner)) in texts
        if isinstance(owner, DataSource):
            return canonical_json(source_identity(owner)) in texts
        if key == "train.ds_config":
            return canonical_json(json.loads(Path(value).read_text())) in texts
        return key.endswith(".function") and canonical_json("num_words") in texts


def _is_models(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, Strict) for item in value.values())


def _openers(stage: str) -> list[str]:
    """The files whose artifacts hold what a file reads: a file without artifacts works for those of others."""
    return {
        "report": ["evaluate"],
        "examples": ["label", "human_labels"],
        "ingest": ["ingest", "brought_responses", "profile"],
        "align": ["human_labels", "train"],
        "watch": ["train"],
        "utilities": ["solve"],
    }.get(stage, [stage])


def _identities(own: Mapping[str, Any], inputs: Any) -> Iterator[Mapping[str, Any]]:
    yield own
    for artifact in inputs:
        names = artifact.manifest["inputs"]
        yield from _identities(artifact.manifest["identity"], [artifact.input(name) for name in names])


def _mappings(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)


def watched(config: Config, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Record reads of ``config`` until the end of the test, and run what Ray would in this process."""
    reads = Reads(config)
    copy, open_place = Strict.model_copy, Workspace.open

    def getattribute(self: Strict, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("_") and name in object.__getattribute__(self, "__dict__"):
            reads.read(self, name, value)
        return value

    def model_copy(self: Strict, **options: Any) -> Strict:
        copied = copy(self, **options)
        reads.copied(self, copied)
        return copied

    def opened(self: Workspace, *arguments: Any) -> StageDirectory:
        place = open_place(self, *arguments)
        frame = sys._getframe(1)
        while Path(frame.f_code.co_filename).parent != STAGES:
            frame = frame.f_back  # type: ignore[assignment]
        reads.opened[Path(frame.f_code.co_filename).stem].append(place)
        return place

    def run_shards(self: Workspace, job: Any, shards: Mapping[int, int], work: str) -> None:
        loaded = job.load()
        for shard in shards:
            job.process(loaded, shard)

    monkeypatch.setattr(Strict, "__getattribute__", getattribute, raising=False)
    monkeypatch.setattr(Strict, "model_copy", model_copy)
    monkeypatch.setattr(Workspace, "open", opened)
    monkeypatch.setattr(Workspace, "run_shards", run_shards)
    monkeypatch.setattr("can_dist.stages.calibrate.fit_scale", fitted)
    monkeypatch.setattr("can_dist.stages.train.connect", lambda cluster: None)
    monkeypatch.setattr("can_dist.stages.train.check_room_for_workers", lambda cluster, say: None)
    monkeypatch.setattr("can_dist.stages.train.run_ranks", trained)
    return reads


def trained(work: Workspace, directory: Path, spec: str, lent: Any) -> None:
    """Leave what ranks leave: other weights as the policy."""
    make_tiny_lm(directory / POLICY, WORDS, seed=int(directory.name[-4:], 16))
    write_json(directory / SUMMARY, {"num_steps": 1, "num_examples": 1, "num_tokens": 1})
    write_json(directory / PROBE, {"precision": "fp32", "rows": []})
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 0.7, "reference_loss": 0.6}) + "\n")


def fitted(gap_N: np.ndarray, preferred_N: np.ndarray, prompt_N: np.ndarray, name: str) -> Calibration:
    """Return a scale of weights that order nothing."""
    return Calibration(1.1, 0.1, len(gap_N), len(set(prompt_N.tolist())), 0.9, 0.7, 0.6)


def world(folder: Path, *, profile: bool = False, own_samples: bool = False, **sections: Any) -> Config:
    """Values that no other key has, so that one key's value in an identity does not pass for another's."""
    raw = small_run(folder, **sections)
    pairs = [
        {
            "prompt": f"w{n % 6} w{6 + n % 4}", "response_0": "w1 w2 w3", "response_1": f"w{n % 9} w5",
            "is_response_0_safe": n % 3 > 0, "is_response_1_safe": n % 2 > 0,
            "better_response_id": int(n % 4 == 0), "safer_response_id": int(n % 5 > 1),
        }
        for n in range(60)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"prompt": f"{a} {b}", "responses": [a, b]} for a in WORDS[:6] for b in WORDS[6:10]]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    many = [{"prompt": f"{a} {b}"} for a in WORDS for b in WORDS[:6]]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    (folder / "benign.jsonl").write_text('{"prompt": "w1 w7"}\n{"prompt": "w2 w8"}\n{"prompt": "w3 w9"}\n')
    raw |= {"seed": 7919, "precision": "fp32", "beta": 0.53}
    raw["generate"] |= {"temperature": 0.93, "top_p": 0.97, "max_new_tokens": 6, "stop": ["w11"]}
    raw["generate"] |= {"temperature": 1, "top_p": 1} if own_samples else {}
    raw["evaluate"] = {"num_responses": 3, "num_samples": 5, "benign_prompts": {"source": str(folder / "benign.jsonl")}}
    kinds = [{"prompt": f"w{n} w{n + 2}", "type": "contrast" if n % 2 else "plain"} for n in range(6)]
    (folder / "xstest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kinds))
    if profile:
        raw["evaluate"]["profile"] = {"set": "xstest", **source(folder, "xstest.jsonl")}
    raw["train"] |= {"learning_rate": 0.00123, "max_shard_size_mb": 3777, "weight_decay": 0.0321}
    return validate_config(raw)


def source(folder: Path, name: str) -> dict[str, str]:
    return {"source": str(folder / name)}


CALM = {"kind": "callable", "function": "scorers:num_calm"}
CASES: dict[str, Any] = {
    "mocan": lambda folder: {"solve": {"estimator": "jackknife", "confidence": 0.6}, "label": {"pairs_per_prompt": 3}},
    "mocan, listwise": lambda folder: {"label": {"labels": "listwise", "validation_fraction": 0.11}},
    "mocan, brought": lambda folder: {
        "generate": {"num_responses": 2, "responses": source(folder, "responses.jsonl")},
        "constraints": {"calm": {"scorer": CALM, "margin": 0.05, "of": "cvar", "alpha": 0.77}},
    },
    "mocan, a strength": lambda folder: {
        "strength": 1.53,
        "prompts": {**source(folder, "many.jsonl"), "num_test": 4, "num_validation": 33},
    },
    "mocan, feedback": lambda folder: {
        "train": {"feedback": "validation", "eval_every": 2, "max_steps": 5, "num_epochs": 5, "ds_config": DS_CONFIG},
        "prompts": {**source(folder, "many.jsonl"), "num_test": 4, "num_validation": 34},
    },
    "mocan, a profile": lambda _: {"profile": True},
    "dpo_s": lambda folder: {
        "label": {"preferences": source(folder, "pairs.jsonl"), "human": {"loss": "kto", "desirable_weight": 1.7}},
    },
    "p_sacpo": lambda folder: {
        "p_sacpo": {"q": [0.37]},
        "label": {"preferences": source(folder, "pairs.jsonl")},
        "sacpo": {"first": {"smoothing": 0.07}, "second": {"on_conflict": "drop"}, "beta_over_lambda": 0.041},
    },
    "caid": lambda folder: {"caid": {"rounds": 1, "epochs": 2}},
    "primal_dual": lambda folder: {
        "own_samples": True,
        "primal_dual": {"rounds": 2, "step_size": 0.31},
        "label": {"validation_fraction": 0.21},
    },
    "pecan": lambda folder: {
        "label": {"preferences": source(folder, "pairs.jsonl"), "validation_fraction": 0.43},
        "reward": {"kind": "log_ratio", "beta": 0.19, "criterion": "helpful", "calibrate": True},
        "constraints": {"calm": {"scorer": {"kind": "log_ratio", "beta": 0.23, "criterion": "safe"}, "margin": 0.0}},
    },
}
READERS = {
    "mocan": {"ingest", "generate", "score", "solve", "label", "train", "evaluate", "report"},
    "mocan, listwise": {"label"},
    "mocan, brought": {"brought_responses"},
    "mocan, a strength": {"strength"},
    "mocan, feedback": {"train"},
    "mocan, a profile": {"profile"},
    "dpo_s": {"human_labels"},
    "p_sacpo": {"human_labels", "merge"},
    "caid": {"slack", "trajectory"},
    "primal_dual": {"advantages", "slack", "trajectory"},
    "pecan": {"align", "calibrate"},
}
"""The stages that a case is there for: they must have read something."""


@pytest.mark.parametrize("case", CASES)
def test_every_key_that_a_stage_reads_is_in_its_identity(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world(tmp_path, method=case.split(",")[0], **CASES[case](tmp_path))
    reads = watched(config, monkeypatch)
    run_pipeline(tmp_path / "run", config)
    outside = reads.outside()
    assert not outside, "\n".join(outside)
    assert READERS[case] - {stage for stage in reads.fields if reads.opened.keys() & _openers(stage)} == set()


@pytest.mark.parametrize("key", ["temperature", "stop", "max_new_tokens"])
def test_a_key_that_is_read_and_not_held_is_named(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world(tmp_path)
    reads = watched(config, monkeypatch)
    monkeypatch.setattr(
        "can_dist.stages.generate.identity", lambda options, exclude: identity(options, exclude=[*exclude, key])
    )
    run_pipeline(tmp_path / "run", config, "generate")
    value = getattr(config.generate, key)
    generate = [line for line in reads.outside() if line.startswith("generate: ")]
    assert generate == [f"generate: generate.{key} = {value!r}"]


def test_what_ranks_are_given_is_held() -> None:
    """Ranks read their part of the configuration in processes of their own: all of it comes in this record.

    What watches a training changes nothing of it; what steers it is made of inputs, and of eval_every (below).
    """
    fields = set(TrainSpec.model_fields)
    assert fields == {"directory", "preferences", "hang_timeout_s", "watch"} | {
        "reference", "start", "train", "beta", "seed", "precision"
    }  # fmt: skip
