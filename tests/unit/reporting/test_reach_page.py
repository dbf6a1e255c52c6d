"""The page of what a run reaches: whole in one file, its script allowed by its digest, hostile names as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from policy_world import estimate

from can_dist.cli import cli
from can_dist.cli.text import reach_text
from can_dist.errors import ConfigError
from can_dist.measuring.ray import columns_of
from can_dist.measuring.reach import ray_reach
from can_dist.reporting.reach_page import render_reach

HOSTILE = "a</script><script>alert(1)</script>"
MARGINS = np.linspace(0.0, 0.6, 7).tolist()


def record(name: str = "a", *, basis: bool = True) -> dict[str, Any]:
    ray = columns_of(ray_reach(estimate(0.25), "a", MARGINS))
    ray["improvement"] = {name: ray["improvement"]["a"]}
    dual = {"reward_improvement": [0.1] * 5, "kl": [0.0, 0.1, 0.2, 0.3, 0.4]}
    curve = {"asked": 0.4, "margin": MARGINS, "dual": dual, "ray": ray, "basis": ray if basis else None}
    return {
        "format_version": 1,
        "run": "runs/my run",
        "num_prompts": 200,
        "constraints": {name: curve},
    }


def test_page_is_whole_and_its_script_is_the_one_that_is_allowed() -> None:
    page = render_reach(record())
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "http://" not in page
    assert "https://" not in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    (rows,) = json.loads(data)
    assert [row["margin"] for row in rows] == ["+0", "+0.1", "+0.2", "+0.3", "+0.4", "+0.5", "+0.6"]
    asked = rows[4]
    assert asked["command"] == "can-dist export policy 'runs/my run' --margin a=0.4 --out a-0.4"
    assert asked["cells"] == ["0.16", "0.256", "0.16", "0.256", "0.1", "0.4"], "0.1 · 1.6, and 0.1 · 1.6²"
    assert rows[6]["cells"][-2:] == ["–", "–"], "nothing attains it"
    assert 'max="6" value="4"' in page, "it begins at the margin asked"
    assert "refuses a margin where it did not" in page


def test_hostile_names_stay_text() -> None:
    page = render_reach(record(HOSTILE))
    assert page.count("<script") == 2
    assert "alert(1)</script>" not in page


def test_a_run_without_a_basis_has_its_ray() -> None:
    page = render_reach(record(basis=False))
    assert "a strength of the run's one" in page.replace("&#39;", "'")
    assert "mixture of the basis" not in page
    text = reach_text(record(basis=False))
    assert "ray KL" in text
    assert "basis" not in text
    assert "basis KL" in reach_text(record())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frontier", "absent", "--realised"], "absent is no run directory"),
        (["frontier", "--realised"], "nothing is no run directory"),
        (["frontier", ".", "--realised", "--beta", "1"], "leave out --beta"),
        (["frontier", ".", "--report", "page.html"], "Give it with --realised"),
    ],
)
def test_commands_that_cannot_be_meant(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
