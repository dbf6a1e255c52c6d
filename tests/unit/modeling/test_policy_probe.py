"""F45: who opens a policy compares it with what the engine that trained it computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_lm

from can_dist.config import Model
from can_dist.errors import DataError
from can_dist.modeling.loading import load_causal_lm
from can_dist.modeling.logprobs import ResponseModel, response_logp
from can_dist.modeling.policy_probe import PROBE, check_probe, write_probe

GROUPS = [([2, 5, 6, 3], [[7, 8, 4]]), ([2, 9, 3], [[4]]), ([2, 8, 3], [[10, 11, 12, 13, 4]]), ([2, 5, 3], [[]])]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy's directory with the probe beside it, as packs compute it."""
    directory = make_tiny_lm(tmp_path / "policy", [f"w{i}" for i in range(12)])
    model = ResponseModel(load_causal_lm(Model(model=str(directory)), "fp32")).eval()
    with torch.no_grad():
        logp_R = [float(response_logp(model, [group], "shared", "cpu")) for group in GROUPS]
    assert logp_R[3] == 0 > max(logp_R[:3])
    write_probe(tmp_path, GROUPS, logp_R, "fp32")
    return directory


def opened(policy: Path) -> torch.nn.Module:
    return load_causal_lm(Model(model=str(policy)), "fp32").eval()


def test_f45_the_policy_itself_is_let_through_and_so_is_a_model_without_probe(policy: Path) -> None:
    model = opened(policy)
    check_probe(model, str(policy), "fp32")
    check_probe(model.bfloat16(), str(policy), "bf16")
    (policy.parent / PROBE).unlink()
    check_probe(model, str(policy), "fp32")
    check_probe(model, "owner/name-on-the-hub", "fp32")


def test_f45_a_tensor_under_anothers_name_is_seen_and_both_values_told(policy: Path) -> None:
    model = opened(policy)
    one, other = (layer.mlp.up_proj for layer in model.model.layers)
    one.weight, other.weight = other.weight, one.weight
    with pytest.raises(DataError) as refused:
        check_probe(model, str(policy), "fp32")
    message = str(refused.value)
    assert message.startswith(f"{policy}: not the policy that was trained: its log-probabilities of 4 responses are ")
    found, expected = (
        [float(number) for number in re.findall(r"-?\d+\.\d{4}", part)]
        for part in message.split("the engine that trained it computed")
    )
    assert len(found) == len(expected) == 4
    assert found != expected
    assert f"delete {policy.parent} and run again" in message


def test_f45_a_model_that_is_not_finite_is_refused(policy: Path) -> None:
    model = opened(policy)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"are nan, nan, nan, 0\.0000 nats"):
        check_probe(model, str(policy), "fp32")


@pytest.mark.parametrize("content", ["{", "[]", '{"precision": "fp32", "rows": [{"logp": -1.0}]}'])
def test_f45_a_damaged_probe_is_an_error_of_its_file(policy: Path, content: str) -> None:
    (policy.parent / PROBE).write_text(content)
    with pytest.raises(DataError, match=f"{PROBE}: damaged, not what a training wrote. Delete {policy.parent} and run"):
        check_probe(opened(policy), str(policy), "fp32")
