"""A preference table over a tiny model, and real ranks that train on it (gloo, ZeRO-3): for all of training.

The ranks are forked from a server that has imported torch, DeepSpeed and transformers, so that a two-rank training
costs seconds. They meet through the same environment variables that a launcher sets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tiny import SPECIAL_TOKENS, make_tiny_lm
from transformers import AutoModelForCausalLM

from can_dist.config import Model
from can_dist.config.sections import Train
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import PREFERENCES

ROOT = Path(__file__).parents[3]
WORDS = [f"w{i}" for i in range(20)]
USER, ASSISTANT, END = (SPECIAL_TOKENS.index(token) for token in ("<user>", "<assistant>", "</s>"))
BETA = 0.5


def token_ids(words: list[str]) -> list[int]:
    return [len(SPECIAL_TOKENS) + WORDS.index(word) for word in words]


def make_rows(num_train: int = 22, num_validation: int = 11, seed: int = 0) -> list[dict]:
    """Pairs of random words, all of different lengths; reference log-probabilities are filled in later."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(num_train + num_validation):
        prompt, a, b = (random.choice(WORDS, size=size).tolist() for size in random.integers(1, 9, size=3))
        gap = float(random.normal())
        p = 1 / (1 + np.exp(-gap))
        rows.append(
            {
                "example_id": f"pair-{index}",
                "prompt_id": f"prompt-{index}",
                "split": "train" if index < num_train else "validation",
                "messages": [{"role": "user", "content": " ".join(prompt)}],
                "response_ids": [f"prompt-{index}/{side}" for side in "ab"],
                "texts": [" ".join(words) for words in (a, b)],
                "token_ids": [[*token_ids(words), END] for words in (a, b)],
                "scores": [gap, 0.0],
                "target": [p, 1 - p],
                "weight": 1.0,
            }
        )
    return rows


def prompt_tokens(row: dict) -> list[int]:
    return [USER, *token_ids(row["messages"][0]["content"].split()), ASSISTANT]


def pairs_of_rank(rows: list[dict], chosen: list[int], rank: int, num_ranks: int = 2) -> list[int]:
    """Return which of the chosen rows a rank learns from."""
    from can_dist.training.batches import Example, rank_packs

    pairs = [Example(str(i), prompt_tokens(rows[i]), rows[i]["token_ids"], [], [], 1.0) for i in chosen]
    slots = [slot for pack in rank_packs(pairs, 10**9, rank, num_ranks) for slot in pack]
    return [int(slot.example.example_id) for slot in slots if slot.share]


def logp_one(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """ln π(response | prompt) of one sequence, alone and unpadded, token by token."""
    ids = torch.tensor([[*prompt, *response]])
    logp_TV = model(ids).logits[0].log_softmax(dim=-1)
    return sum(logp_TV[len(prompt) + t - 1, token] for t, token in enumerate(response))


@torch.no_grad()
def fill_reference(rows: list[dict], model_dir: Path, dtype: torch.dtype = torch.float64) -> list[dict]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    for row in rows:
        row["logp_ref"] = [logp_one(model, prompt_tokens(row), tokens).item() for tokens in row["token_ids"]]
    return rows


def write_preferences(run_dir: Path, rows: list[dict], loss: str = "sigmoid") -> Artifact:
    stage = open_stage(run_dir, "label", "preferences", {"rows": json.dumps(rows), "loss": loss}, {})
    if stage.finished:
        return stage.finished
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=PREFERENCES))
    splits = {split: sum(row["split"] == split for row in rows) for split in ("train", "validation")}
    return stage.commit([], info={"loss": loss, "splits": splits})


@dataclass
class World:
    """A reference model, its preference rows, and where trainings go."""

    root: Path
    reference: Path
    rows: list[dict]

    def spec(
        self,
        name: str,
        rows: list[dict] | None = None,
        precision: str = "fp32",
        loss: str = "sigmoid",
        start: Path | None = None,
        hang_timeout_s: float = 600.0,
        template: str | None = None,
        **train: object,
    ) -> str:
        """Return the JSON of a ``TrainSpec`` in the directory ``name``."""
        from can_dist.training.engine import TrainSpec

        directory = self.root / name
        directory.mkdir(exist_ok=True)
        options = {
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "num_epochs": 2,
            "batch_size": 9,
            "tokens_per_pack": 40,
            "weight_decay": 0.01,
            "log_every": 1,
            "eval_every": 3,
            "ds_config": str(ROOT / "ds_configs" / "zero3_cpu.json"),
            **train,
        }
        return TrainSpec(
            directory=directory,
            preferences=write_preferences(self.root, self.rows if rows is None else rows, loss).path,
            reference=Model(model=str(self.reference), template=template),
            start=Model(model=str(start or self.reference), template=template),
            train=Train(**options),
            beta=BETA,
            seed=3,
            precision=precision,
            hang_timeout_s=hang_timeout_s,
        ).model_dump_json()


def make_world(root: Path) -> World:
    reference = make_tiny_lm(root / "reference", WORDS)
    return World(root, reference, fill_reference(make_rows(), reference))


@dataclass
class Outcome:
    """What became of the ranks of a launch."""

    codes: list[int]
    output: str
    seconds: float


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(
    spec: str, num_ranks: int = 2, hook: str = "", timeout: float = 300, last_spec: str = "", port: int = 0
) -> Outcome:
    """Train on ``num_ranks`` forked processes, the last of them by ``last_spec`` if given.

    ``hook`` makes a rank fail: 'kill:RANK:STEP', 'raise:RANK:STEP', 'freeze:RANK:STEP', 'sleep:RANK:STEP',
    'term:RANK:STEP', or 'nan_gradient'; 'kill_writing:RANK:STEP' in the middle of its file of a checkpoint,
    'kill_export' in the middle of the policy, 'file_size:RANK:STEP:BYTES' leaves it room for so much in the checkpoint
    of a step, 'export_size:FILE:BYTES' in a file of the policy. 'twin' starts rank 0 twice, 'lonely' waits seconds for
    ranks that do not come, 'preferences:DIRECTORY' gives the last rank others than the path says.

    'gradients:FILE:HEAD_BYTES' keeps the gradients of the first step, 'gradients:FILE:HEAD_BYTES:padded' those of plain
    padded batches, 'states:FILE' the optimizer's states at the start of the loop. 'memory:FILE'
    writes the peak of each rank to FILE0, FILE1, ...
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_world_preload"])
    port = port or free_port()
    directory = Path(json.loads(spec)["directory"])
    fork_server = context.Process(target=int)  # its imports are no part of the time that the ranks have
    fork_server.start()
    fork_server.join()
    start = time.monotonic()
    logs = [directory / f"rank{rank}.log" for rank in range(num_ranks)]
    processes = [
        context.Process(target=run_rank, args=(rank, num_ranks, port, its_spec, hook, str(logs[rank])))
        for rank, its_spec in enumerate([*[spec] * (num_ranks - 1), last_spec or spec])
    ]
    for process in processes:
        process.start()
    frozen = processes[int(hook.split(":")[1])] if hook.startswith("freeze") else None
    for process in processes:
        if process is not frozen:
            process.join(max(1.0, timeout - (time.monotonic() - start)))
    if frozen:
        frozen.kill()
        frozen.join()
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    output = "".join(log.read_text(encoding="utf-8") for log in logs)
    assert not hung, f"{len(hung)} rank(s) hung for {timeout} s:\n{output}"
    return Outcome([process.exitcode for process in processes], output, time.monotonic() - start)


def run_rank(rank: int, num_ranks: int, port: int, spec: str, hook: str, log: str) -> None:
    """Be one rank: what ``can_dist.train`` does between a launcher and the engine."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {
        "RANK": "0" if hook == "twin" else str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from can_dist.errors import CanDistError, Interrupted
    from can_dist.training import engine

    _install(hook, rank)
    try:
        engine.train_worker(spec)
    except (CanDistError, Interrupted) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _install(hook: str, rank: int) -> None:
    from can_dist.training import engine, export, objective, ranks

    kind, *arguments = hook.split(":")
    signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}
    if kind in (*signals, "raise", "sleep") and rank == int(arguments[0]):
        plain_step = engine._Loop.step

        def step_or_fail(loop: engine._Loop, step: int) -> bool:
            if step == int(arguments[1]):
                if kind == "raise":
                    raise RuntimeError("out of memory, say")
                if kind == "sleep":
                    time.sleep(600)
                if kind == "freeze":
                    time.sleep(3)  # longer than a tick of the heartbeat, as steps of real models are
                os.kill(os.getpid(), signals[kind])
            return plain_step(loop, step)

        engine._Loop.step = step_or_fail
    if kind in ("kill_writing", "file_size") and rank == int(arguments[0]):
        _fail_writing(kind, *map(int, arguments[1:]))
    if kind == "export_size" and rank == 0:
        _fail_exporting(arguments[0], int(arguments[1]))
    if kind == "kill_export" and rank == 0:
        export.check_shapes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if kind in ("twin", "lonely"):
        ranks.BACKSTOP_S = 0.0
    if kind == "preferences" and rank == 1:
        plain_load = engine.load_artifact
        engine.load_artifact = lambda _: plain_load(Path(arguments[0]))
    if kind == "states":
        _keep_states(Path(arguments[0]))
    if kind == "memory":
        _measure_memory(Path(f"{arguments[0]}{rank}"))
    if kind == "gradients":
        _keep_gradients(Path(arguments[0]), int(arguments[1]), *arguments[2:])
    if kind == "nan_gradient" and rank == 1:
        plain_ratios = objective.log_ratios

        def poisoned(*inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
            ratio, is_real = plain_ratios(*inputs)
            if ratio.requires_grad:
                ratio.register_hook(lambda gradient: gradient * float("nan"))
            return ratio, is_real

        objective.log_ratios = poisoned


def _fail_writing(kind: str, step: int, limit: int = 0) -> None:
    """Kill this rank within its file of a checkpoint, or let the disk be full after ``limit`` bytes of it."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    plain_save = TorchCheckpointEngine.save

    def save(writer: TorchCheckpointEngine, state_dict: object, path: str) -> None:
        if f"step-{step:06d}" not in path or "optim_states" not in path:
            plain_save(writer, state_dict, path)
        elif kind == "kill_writing":
            plain_save(writer, state_dict, path)
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            with _room_for(limit):
                plain_save(writer, state_dict, path)

    TorchCheckpointEngine.save = save


@contextmanager
def _room_for(limit: int) -> Iterator[None]:
    """Let the disk be full after ``limit`` bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _fail_exporting(name: str, limit: int) -> None:
    """Let the disk be full after ``limit`` bytes of one file of the policy: its weights, or what lies beside them."""
    from can_dist.training import export

    plain_save, plain_settings = export.save_file, export._write_settings

    def save_file(tensors: object, path: Path, metadata: object) -> None:
        with _room_for(limit) if path.name == name else nullcontext():
            plain_save(tensors, path, metadata)

    def write_settings(module: object, tokenizer: object, out: Path) -> None:
        with _room_for(limit) if name == "tokenizer.json" else nullcontext():
            plain_settings(module, tokenizer, out)

    export.save_file, export._write_settings = save_file, write_settings


def _keep_states(file: Path) -> None:
    """Write every trained weight and both moments of Adam, whole and in fp32, as the loop finds them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from safetensors.torch import save_file

    from can_dist.training import engine

    plain_run = engine._Loop.run

    def run(loop: engine._Loop, first: int, total: int) -> int:
        states = {}
        for name, p in loop.engine.module.lm.named_parameters():
            if p.requires_grad:
                states[name] = safe_get_full_fp32_param(p).clone()
                for moment in ("exp_avg", "exp_avg_sq"):
                    states[f"{name}.{moment}"] = safe_get_full_optimizer_state(p, moment).clone()
        if torch.distributed.get_rank() == 0:
            save_file(states, file)
        return plain_run(loop, first, total)

    engine._Loop.run = run


def _kibibytes(field: str) -> int:
    """Return a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _measure_memory(file: Path) -> None:
    """Write the highest memory of training, in bytes above what the process has before the model is loaded.

    Pages of files are left out: they are the code of libraries, which is read in when it first runs.
    """
    import ctypes

    from can_dist.training import engine

    # freed blocks go back to the system at once: what is measured is what lives, not what the C library keeps
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    before = []
    plain_build, plain_initialize = engine._build_model, engine._initialize

    def build(*inputs: object) -> object:
        before.append(_kibibytes("RssAnon"))
        return plain_build(*inputs)

    def initialize(*inputs: object) -> object:
        wrapped = plain_initialize(*inputs)
        before.append(_kibibytes("RssAnon"))
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: loading is not the peak
        return wrapped

    def export(*_: object) -> None:
        highest = _kibibytes("VmHWM") - _kibibytes("RssFile") - _kibibytes("RssShmem")
        file.write_text(json.dumps({"peak": 1024 * (highest - before[0]), "start": 1024 * (before[1] - before[0])}))

    engine._build_model, engine._initialize, engine.export_policy = build, initialize, export


def _keep_gradients(file: Path, head_bytes: int, layout: str = "") -> None:
    """Write the gradients that DeepSpeed has before its first update, whole and unclipped."""
    from deepspeed.utils import safe_get_full_grad
    from safetensors.torch import save_file

    from can_dist.modeling import logprobs
    from can_dist.training import engine

    logprobs.HEAD_BYTES = head_bytes
    if layout:
        engine._layout = lambda _: (layout, "as the test says")
    plain_initialize = engine._initialize

    def initialize(*inputs: object) -> object:
        wrapped = plain_initialize(*inputs)
        plain_step = wrapped.step

        def step() -> None:
            trained = {name: p for name, p in wrapped.module.lm.named_parameters() if p.requires_grad}
            gradients = {name: safe_get_full_grad(p).clone() for name, p in trained.items()}
            if torch.distributed.get_rank() == 0 and not file.exists():
                save_file(gradients, file)
            plain_step()

        wrapped.step = step
        return wrapped

    engine._initialize = initialize


def read_metrics(spec: str, key: str = "loss") -> dict[int, float]:
    """Return {step: value} of a metric."""
    path = Path(json.loads(spec)["directory"]) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def policy_dir(spec: str) -> Path:
    return Path(json.loads(spec)["directory"]) / "policy"


def policy_bytes(spec: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(policy_dir(spec).iterdir())}


def load_whole(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load an exported policy as a user would; nothing missing, nothing left over, no adapters."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not any("lora" in name for name, _ in model.named_parameters())
    return model.eval()
