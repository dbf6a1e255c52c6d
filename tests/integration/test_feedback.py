"""A training that is watched by validation responses, and steered by them: two gloo ranks under ZeRO-3."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_world as tw
import watched_world as ww
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from can_dist.dual import Margin, solve_dual
from can_dist.training.batches import global_batch
from can_dist.training.metrics import training_curve

pytestmark = pytest.mark.slow

TOTAL = 8
KEYS = ("loss", "grad_norm", "eval_loss", "fit_kl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ww.Watching:
    return ww.make_watching(tmp_path_factory.mktemp("watched"))


@pytest.fixture(scope="module")
def undisturbed(world: ww.Watching) -> str:
    spec = world.spec("undisturbed", TOTAL, feedback="validation", checkpoint_every=3)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    return spec


def folder_of(spec: str) -> Path:
    return Path(json.loads(spec)["directory"])


def lines_of(spec: str) -> list[dict[str, Any]]:
    """The lines of estimates, as they are shown to people."""
    lines = [json.loads(line) for line in (folder_of(spec) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "estimate" in line]


def course(spec: str) -> dict[str, Any]:
    curve = training_curve(folder_of(spec))
    return {name: points for name, points in curve.items() if name.startswith("estimate.")}


# ------------------------------------------------------------------------------------ the same by independent code


def gains(rows: list[dict[str, Any]], ratio_N: np.ndarray, name: str) -> float:
    """The average of the unbiased covariance and the jackknifed self-normalised mean, prompt by prompt."""
    size, out = ww.NUM_RESPONSES, []
    for first in range(0, len(rows), size):
        g = np.array([row[name] for row in rows[first : first + size]])
        w = np.exp(ratio_N[first : first + size])
        covariance = size / (size - 1) * ((w * g).mean() - w.mean() * g.mean())
        whole = (w * g).sum() / w.sum()
        without = [(np.delete(w * g, k)).sum() / np.delete(w, k).sum() for k in range(size)]
        out.append((covariance + size * whole - (size - 1) * np.mean(without) - g.mean()) / 2)
    return float(np.mean(out))


def curvature(world: ww.Watching, lam: float) -> float:
    """∇²D of one constraint: the variance of g under softmax((r + λg)/β), over β."""
    size, variances = ww.NUM_RESPONSES, []
    for first in range(0, len(world.train_rows), size):
        rows = world.train_rows[first : first + size]
        r, g = (np.array([row[name] for row in rows]) for name in ("reward", "calm"))
        weight = np.exp((r + lam * g) / tw.BETA)
        weight /= weight.sum()
        variances.append((weight * g**2).sum() - (weight * g).sum() ** 2)
    return float(np.mean(variances)) / tw.BETA


def log_ratios(model: torch.nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:
    refs = [row["logp.reference"] for row in rows]
    return torch.stack(
        [tw.logp_one(model, tw.prompt_tokens(row), row["token_ids"]) - ref for row, ref in zip(rows, refs, strict=True)]
    )


def train_plainly(world: ww.Watching) -> tuple[dict[int, float], dict[int, float], dict[int, float], Any]:
    """Listwise in one process of plain torch, λ moved by hand; returns losses, λ and gains by step, and the weights."""
    examples = [row for row in world.preferences.table.to_pylist() if row["split"] == "train"]
    by_id = {row["response_id"]: row for row in world.train_rows}
    model = AutoModelForCausalLM.from_pretrained(world.reference, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    lam = world.lam["calm"]
    hessian = curvature(world, lam)
    losses, lams, estimates = {}, {}, {}
    for step in range(TOTAL):
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + np.cos(np.pi * step / TOTAL))
        chosen = [examples[index] for index in global_batch(len(examples), 6, 3, step)]
        parts = []
        for example in chosen:
            rows = [by_id[name] for name in example["response_ids"]]
            score = torch.tensor([row["reward"] + lam * row["calm"] for row in rows], dtype=torch.float64)
            target = (score / tw.BETA).softmax(0).float()
            parts.append(-(target * log_ratios(model, rows).log_softmax(0)).sum())
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step + 1] = loss.item()
        done = step + 1
        if done % 2 == 0:
            with torch.no_grad():
                ratio_N = log_ratios(model, world.validation_rows).double().numpy()
            estimates[done], lams[done] = gains(world.validation_rows, ratio_N, "calm"), lam
            if done < TOTAL:
                lam = max(0.0, lam + 0.5 * (ww.MARGINS["calm"] - estimates[done]) / hessian)
    return losses, lams, estimates, model.state_dict()


def test_two_ranks_one_rank_and_plain_torch_steer_alike(world: ww.Watching, undisturbed: str) -> None:
    alone = world.spec("alone", TOTAL, feedback="validation", tokens_per_pack=25)  # responses of a prompt over packs
    assert tw.launch(alone, num_ranks=1).codes == [0]
    losses, lams, estimates, weights = train_plainly(world)
    assert lams[TOTAL] > 1.5 * world.lam["calm"], "λ must move for its course to mean something"
    for spec in (undisturbed, alone):
        metrics = tw.read_metrics(spec)
        metrics.pop(0)
        assert metrics == pytest.approx(losses, rel=1e-4)
        assert tw.read_metrics(spec, "estimate.lam.calm") == pytest.approx(lams, rel=1e-4)
        assert tw.read_metrics(spec, "estimate.gain.calm") == pytest.approx(estimates, rel=1e-3, abs=1e-6)
        model = tw.load_whole(tw.policy_dir(spec))
        for name, expected in weights.items():
            # Adam makes steps of rounding where a gradient is nearly nothing
            torch.testing.assert_close(model.state_dict()[name], expected, atol=5e-5, rtol=1e-3)
        summary = json.loads((folder_of(spec) / "summary.json").read_text())
        assert summary["lam"] == {"calm": pytest.approx(lams[TOTAL], rel=1e-4)}
    assert lines_of(undisturbed)[0]["estimate"].startswith(f"calm {estimates[2]:+.2f} ± ")
    assert (
        f"of +0.60, reward {tw.read_metrics(undisturbed, 'estimate.reward')[2]:+.2f}"
        in lines_of(undisturbed)[0]["estimate"]
    )
    assert "; lambda " in lines_of(undisturbed)[0]["estimate"]
    assert "lambda" not in lines_of(undisturbed)[-1]["estimate"], "nothing is left to be trained with another"


# ------------------------------------------------------------------------------------------------ resumed, and alike


def test_a_killed_training_goes_on_with_its_lambda_and_ends_with_the_same_bytes(
    world: ww.Watching, undisturbed: str
) -> None:
    spec = world.spec("killed", TOTAL, feedback="validation", checkpoint_every=3)
    assert tw.launch(spec, hook="kill:1:7").codes[1] == -9
    at_6 = json.loads((folder_of(spec) / "checkpoints" / "step-000006" / "lam.json").read_text())
    assert at_6["calm"] == tw.read_metrics(undisturbed, "estimate.lam.calm")[8], "λ after the move of step 6"
    resumed = tw.launch(spec)
    assert resumed.codes == [0, 0], resumed.output
    assert "going on from checkpoint step-000006" in resumed.output
    assert tw.policy_bytes(spec) == tw.policy_bytes(undisturbed)
    for key in KEYS:
        assert tw.read_metrics(spec, key) == tw.read_metrics(undisturbed, key)
    assert course(spec) == course(undisturbed)
    assert lines_of(spec) == lines_of(undisturbed)
    assert f"step 8: {lines_of(spec)[-1]['estimate']}" in resumed.output


def test_another_number_of_ranks_goes_on_with_the_same_lambda(world: ww.Watching, undisturbed: str) -> None:
    spec = world.spec("fewer", TOTAL, feedback="validation", checkpoint_every=3)
    assert tw.launch(spec, hook="kill:1:7").codes[1] == -9
    outcome = tw.launch(spec, num_ranks=1)
    assert outcome.codes == [0], outcome.output
    expected = course(undisturbed)
    for name, points in course(spec).items():
        np.testing.assert_allclose(points, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_batches_made_ahead_are_labelled_by_the_lambda_of_their_step(world: ww.Watching, undisturbed: str) -> None:
    spec = world.spec("ahead", TOTAL, feedback="validation", checkpoint_every=3, collate_workers=1)
    outcome = tw.launch(spec, timeout=400)  # every evaluation starts processes of its own
    assert outcome.codes == [0, 0], outcome.output
    assert tw.policy_bytes(spec) == tw.policy_bytes(undisturbed)


def test_watching_changes_no_byte_of_the_policy(world: ww.Watching) -> None:
    watched, plain = world.spec("watching", TOTAL), world.spec("plain", TOTAL, watched=False)
    at_the_end = world.spec("watching at the end", TOTAL, eval_every=TOTAL - 1)
    for spec in (watched, plain, at_the_end):
        outcome = tw.launch(spec)
        assert outcome.codes == [0, 0], outcome.output
        assert tw.policy_bytes(spec) == tw.policy_bytes(watched)
    for key in KEYS:
        assert tw.read_metrics(watched, key) == tw.read_metrics(plain, key)
    assert set(tw.read_metrics(watched, "estimate.lam.calm").values()) == {world.lam["calm"]}
    assert [line["step"] for line in lines_of(watched)] == [2, 4, 6, 8]
    assert [line["step"] for line in lines_of(at_the_end)] == [TOTAL]
    assert lines_of(plain) == []
    assert "lam" not in json.loads((folder_of(watched) / "summary.json").read_text())


# --------------------------------------------------------------------------------------- other losses and constraints


def soft(z: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(gap)
    return -(p * logsigmoid(z) + (1 - p) * logsigmoid(-z))


def regression(z: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    return (z - gap) ** 2


@pytest.mark.parametrize(("labels", "loss_of"), [("soft", soft), ("regression", regression)])
def test_all_pairs_are_labelled_anew_with_two_constraints(tmp_path: Path, labels: str, loss_of: Any) -> None:
    """The last line of losses is that of the last λ, on the policy of the step before: here, of no learning at all."""
    world = ww.make_watching(tmp_path, labels=labels, constraints=("calm", "short"))
    spec = world.spec("steered", 4, feedback="validation", learning_rate=1e-12)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    lam = json.loads((folder_of(spec) / "summary.json").read_text())["lam"]
    # a policy that stays the reference gains nothing, so λ takes half a Newton step for the whole margins
    rows = world.train_rows
    prompts = np.repeat(np.arange(len(rows) // ww.NUM_RESPONSES), ww.NUM_RESPONSES)
    columns = {name: np.array([row[name] for row in rows]) for name in ("reward", "calm", "short")}
    solved = solve_dual(
        columns["reward"], np.stack([columns["calm"], columns["short"]], axis=1), prompts, beta=tw.BETA,
        constraints=[Margin(name, margin=margin) for name, margin in ww.MARGINS.items()],
    )  # fmt: skip
    assert solved.lam == pytest.approx(world.lam)
    assert lam.keys() == world.lam.keys()
    hessian = np.zeros((2, 2))
    for first in range(0, len(rows), ww.NUM_RESPONSES):
        part = slice(first, first + ww.NUM_RESPONSES)
        g = np.stack([columns["calm"][part], columns["short"][part]])
        weight = np.exp((columns["reward"][part] + np.array(list(world.lam.values())) @ g) / tw.BETA)
        weight /= weight.sum()
        mean = g @ weight
        hessian += ((g * weight) @ g.T - np.outer(mean, mean)) / tw.BETA / len(set(prompts))
    step = 0.5 * np.linalg.solve(hessian, list(ww.MARGINS.values()))
    expected = np.array(list(world.lam.values())) + step
    assert (expected > 0).all(), "no constraint is at its bound here"
    np.testing.assert_allclose(list(lam.values()), expected, rtol=1e-4)
    examples = [row for row in world.preferences.table.to_pylist() if row["split"] == "train"]
    by_id = {row["response_id"]: row for row in rows}
    for step_done, its_lam in ((2, world.lam), (3, lam)):
        losses = []
        for index in global_batch(len(examples), 6, 3, step_done - 1):
            responses = [by_id[name] for name in examples[index]["response_ids"]]
            score = [row["reward"] + sum(value * row[name] for name, value in its_lam.items()) for row in responses]
            gaps = torch.tensor([a - b for a, b in combinations(score, 2)])
            losses.append(loss_of(torch.zeros_like(gaps), gaps).mean().item())
        assert tw.read_metrics(spec)[step_done] == pytest.approx(np.mean(losses), rel=1e-4), step_done
