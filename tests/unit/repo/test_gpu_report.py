"""The sections of the GPU script: time boxes, lines, and the numbers that are read from a training's record."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_report
import gpu_sections as gpu
import pytest
import train_vs_trl
from gpu_sections import LARGE, MEDIUM, ON_CPU, Section
from train_job import LEARNING_RATE, Job
from train_ours import train_options


def record(side: str = "ours", wall: float = 2.0, **changes: Any) -> dict[str, Any]:
    """What ``train_side.py`` writes on a GPU."""
    job = {"side": side, "work": "hh-like", "model": "", "lora": False, "tokens_per_pack": 16384, "micro_batch": 8}
    job |= {"kernels": None}
    return {
        "job": {**job, "strategy": "sequential", "device": "cuda", **changes.pop("job", {})},
        "pairs": 4,
        "scaled_to_fit": 0,
        "seconds": {"reference": [1.0, 9.0], "train": [wall, 9.0], "whole": [5.0, 20.0]},
        "step_seconds": [wall / 2, wall / 2],
        "shared_tokens": 1000,
        "unshared_tokens": 1500,
        "target_tokens": 400,
        "targets_seen": 400,
        "peak_mb": 1.0,
        "loaded_model_mb": None,
        "peak_device_mb": 100.0,
        "planned_mb": 110.0,
        "first_loss": math.log(2),
        "losses": [0.7, 0.6],
        **changes,
    }


def section(tmp_path: Path, code: str) -> Section:
    output = tmp_path / "result.json"
    command = [sys.executable, "-c", f"from pathlib import Path; out = Path({str(output)!r})\n{code}"]
    return Section("some", 60, command, output, gpu_report.READERS["json"])


def test_a_section_leaves_its_result(tmp_path: Path) -> None:
    line = gpu.run(section(tmp_path, "out.write_text('{\"x\": 1}')"), 60, tmp_path / "log")
    assert (line["section"], line["status"], line["result"]) == ("some", "ok", {"x": 1})
    assert "log" not in line


def test_a_section_that_is_late_is_stopped_and_leaves_what_it_had(tmp_path: Path) -> None:
    code = "import subprocess, sys\nout.write_text('{\"x\": 1}'); print('half', flush=True)\n"
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    line = gpu.run(section(tmp_path, code), 2, tmp_path / "log")
    assert line["status"] == "stopped after 2 s"
    assert line["seconds"] < 10
    assert line["result"] == {"x": 1}
    assert line["log"] == "half\n"


def test_a_section_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    line = gpu.run(section(tmp_path, "raise SystemExit('typing error')"), 60, tmp_path / "log")
    assert line["status"] == "exit code 1"
    assert line["log"] == "typing error\n"
    assert "result" not in line


def test_a_section_without_time_is_not_begun(tmp_path: Path) -> None:
    line = gpu.run(section(tmp_path, "out.write_text('{}')"), 0.5, tmp_path / "log")
    assert line["status"] == "no time left"
    assert not (tmp_path / "result.json").exists()


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    for number in range(2):
        gpu.append(tmp_path / "lines", {"section": number})
        assert json.loads((tmp_path / "lines").read_text().splitlines()[-1]) == {"section": number}


@pytest.mark.parametrize("setup", [LARGE, MEDIUM, ON_CPU], ids=lambda setup: setup.large)
def test_every_device_is_asked_the_same_sections(setup: gpu.Setup, tmp_path: Path) -> None:
    names = [section.name for section in gpu.sections(setup, tmp_path)]
    assert names == [section.name for section in gpu.sections(ON_CPU, tmp_path)]
    jobs = [*gpu.large_jobs(setup, tmp_path), *gpu.trl_jobs(setup, tmp_path), *gpu.small_jobs(setup, tmp_path)]
    assert all(isinstance(job, Job) for job in jobs)
    peers = [job for job in jobs if job.side == "trl"]
    assert {job.micro_batch for job in peers} >= set(setup.micro_batches)
    if setup.device == "cuda":
        assert max(job.micro_batch for job in peers) == 32, "TRL's best is among 8 to 32 there"


@pytest.mark.parametrize("installed", [True, False])
def test_liger_is_tried_beside_the_largest_packs_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: object() if installed else None)
    plain, *others = gpu.pack_jobs(LARGE, tmp_path)
    tried = [job for job in others if job.kernels == "liger"]
    assert tried == ([replace(plain, kernels="liger", profile=False)] if installed else [])
    assert train_options(tried[0] if tried else plain).kernels == ("liger" if installed else None)
    assert all(job.kernels is None for job in gpu.pack_jobs(ON_CPU, tmp_path))


@pytest.mark.parametrize("setup", [LARGE, MEDIUM], ids=lambda setup: setup.large)
def test_the_time_boxes_leave_the_last_section_its_own(setup: gpu.Setup, tmp_path: Path) -> None:
    boxes = sum(section.box_s for section in gpu.sections(setup, tmp_path))
    assert gpu.START_S + boxes + gpu.SPARE_S <= gpu.LIMIT_S <= 9 * 60


@pytest.mark.parametrize(
    ("built", "path", "told"),
    [
        ("'13.0'", True, "torch 2.15.0, built for CUDA 13.0, sees no GPU here, though nvidia-smi is there; nothing"),
        ("None", True, "torch 2.15.0, built without CUDA, sees no GPU here, though nvidia-smi is there; nothing"),
        ("None", False, "torch 2.15.0 sees no GPU here; nothing was measured. To check the script itself: "),
        ("", False, f"{sys.executable} has no torch: name a Python that has one, as in make gpu PYTHON=.venv/bin/pyth"),
    ],
)
def test_a_machine_that_cannot_be_measured_says_why(built: str, path: bool, told: str, tmp_path: Path) -> None:
    torch, smi = tmp_path / "torch.py", tmp_path / "bin" / "nvidia-smi"
    cuda = f"class cuda:\n    is_available = staticmethod(lambda: False)\nclass version:\n    cuda = {built}\n"
    torch.write_text(f"__version__ = '2.15.0'\n{cuda}" if built else "raise ModuleNotFoundError('torch')")
    smi.parent.mkdir()
    if path:
        smi.write_text("#!/bin/sh\n")
        smi.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_sections.py", "--output", str(tmp_path / "results")],
        cwd=Path(__file__).parents[3],
        env={"PATH": str(smi.parent), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(f"gpu.sh: {told}"), done.stdout + done.stderr
    assert done.returncode == 6
    assert not (tmp_path / "results").exists()


def test_a_gpu_is_trained_at_a_rate_at_which_bf16_losses_can_be_compared() -> None:
    assert LEARNING_RATE == {"cpu": 2e-5, "cuda": 1e-6}
    assert max(train_vs_trl.MICRO_BATCHES["cuda"]) == 32


def test_the_plan_stands_beside_the_peak() -> None:
    assert gpu_report.training({**record(), "job": {**record()["job"], "lora": True}})["plan_over_peak"] == 1.1
    assert gpu_report.training({**record(peak_device_mb=None), "planned_mb": None})["plan_over_peak"] is None


def test_mfu_counts_every_weight_once_per_token_that_has_to_be_seen(tmp_path: Path) -> None:
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 3, "vocab_size": 50}))
    done = record(job={"model": str(tmp_path)})
    body = 3 * (8 * 8 + 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16)  # queries, output, keys and values, MLP
    flops = 6 * (body * 1000 + 8 * 50 * 400)
    assert gpu_report.model_flops(done) == flops
    numbers = gpu_report.training(done, "NVIDIA H200")
    assert numbers["mfu_on_shared_tokens"] == pytest.approx(flops / 2.0 / 989e12)
    assert gpu_report.training(done, "some other")["mfu_on_shared_tokens"] is None


def test_turns_are_read_by_work_with_trls_best() -> None:
    slow, fast = record("trl", 8.0), record("trl", 5.0, job={"micro_batch": 16, "strategy": "group_by_length"})
    row = gpu_report.turns([record(), slow, fast, record(wall=4.0), fast])
    assert row["ours_seconds"] == 4.0, "the median of 1 + 2 and 1 + 4 seconds"
    assert row["trl_best_micro_batch"] == 16
    assert row["faster"] == 6.0 / 4.0
    assert row["agreement"] == {"same_tokens": True, "loss_of_a_step": 0.0, "first_loss_from_ln2": 0.0}


def test_only_the_run_in_our_order_has_the_same_steps() -> None:
    other = record("trl", losses=[0.9, 0.1], job={"micro_batch": 16, "strategy": "group_by_length"})
    ordered = record("trl", losses=[0.7, 0.65])
    assert gpu_report.turns([record(), ordered, other])["agreement"]["loss_of_a_step"] == pytest.approx(0.05)


def test_a_stop_in_the_first_turn_leaves_ours(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text(json.dumps(record(job={"lora": True})) + "\n" + '{"job": {"si')
    assert gpu_report.read_turns(lines)["works"] == {"hh-like": {"ours_seconds": 3.0, "rounds": 1}}


def test_the_table_of_a_gpu_shows_wall_seconds_and_its_name() -> None:
    ours, peer = [record()], [record("trl", 5.0)]
    row = train_vs_trl.summarize("hh-like", ours, peer)
    row |= {"trl_micro_batch": 8, "agreement": {"loss_of_a_step": 1e-3}, "trl_zero3": row}
    machine = {"date": "2026-11-28", "cpu": "x", "gpu": "NVIDIA H200", "load_average": 1.0, "cores": 16}
    about = {**machine, "torch": "2.11.0", "deepspeed": "0.19.8", "trl": "1.16.0"}
    common = {"batch_size": 64, "rounds": 1, "context": 2048, "tokens_per_pack": 16384}
    text = train_vs_trl.table(
        {"machine": about, "device": "cuda", "model": "random-7b", "pairs": 4, "rows": [row], **common}
    )
    assert "NVIDIA H200, bf16" in text
    assert "| **faster, wall** | CPU |" in text
    assert "| hh-like | 1.50 | 3.0 | 6.0 (8) | **2.00×** | 1.00× |" in text
