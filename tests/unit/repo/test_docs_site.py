"""The pages of the docs site: their blocks run, in order, as a reader would type them.

``bash`` and ``python`` blocks run here; ``yaml`` blocks are valid; ``console`` blocks start trainings or clusters, so
their commands are only parsed, by the very parsers that would run them.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.config import Config, validate_config
from can_dist.config.describe import describe_keys
from can_dist.config.yaml_files import merge, parse_yaml
from can_dist.train import train

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = ["index.md", "start.md", "installation.md", "concepts.md", "comparison.md", "faq.md", "reference/python.md"]
PAGES += sorted(str(path.relative_to(DOCS)) for path in (DOCS / "howto").glob("*.md"))
BASE: dict[str, Any] = {
    "prompts": {"source": "prompts.jsonl", "num_validation": 0},
    "strength": 1,
    "reference": {"model": "./reference"},
    "reward": {"kind": "callable", "function": "scorers:num_words"},
    "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 1.0}},
}
PROJECT = "can-dist"
IMAGES = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def blocks(page: str) -> list[tuple[str, str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines(code: str) -> list[list[str]]:
    return [shlex.split(line) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


# the blocks of scorers.md are parts of a configuration; test_scorer_docs.py has them
CONFIGURED = [
    page
    for page in sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    if page != "scorers.md" and any(language == "yaml" for language, _ in blocks(page))
]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there: dict[str, Any] = {}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page, "exec"), there)
        for words in lines(code) if language == "bash" else []:
            assert words[0] == "can-dist", f"{page}: a bash block runs can-dist only"
            done = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            written = [words[index + 1] for index, word in enumerate(words) if word in ("--plot", "--report")]
            assert all((tmp_path / name).stat().st_size > 1000 for name in written)


@pytest.mark.parametrize("page", CONFIGURED)
def test_configurations_of_a_page_are_valid(page: str) -> None:
    for code in [code for language, code in blocks(page) if language == "yaml"]:
        given = parse_yaml(code, page)
        base = {
            name: value for name, value in BASE.items() if name not in ("reward", "constraints") or name not in given
        }
        validate_config(merge(base, given))


@pytest.mark.parametrize("page", [page for page in PAGES if any(language == "console" for language, _ in blocks(page))])
def test_commands_of_a_page_parse(page: str) -> None:
    for code in [code for language, code in blocks(page) if language == "console"]:
        for words in lines(code):
            if words[0] == "make":
                assert set(words[1:]) <= TARGETS
            elif words[0] == "can-dist":
                command, rest = cli.commands[words[1]], words[2:]
                if words[1] == "export":
                    command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined]
                command.make_context(words[1], rest)
            elif words[0] == "deepspeed":
                train.make_context("train", words[words.index("can_dist.train") + 1 :])
            elif words[0] == "docker":
                assert words[words.index("--target") + 1] in IMAGES
            else:
                assert words[0] == "ray" or words == ["pip", "install", PROJECT]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert [str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if str(p.relative_to(DOCS)) not in navigation] == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_files_that_a_page_names_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|benchmarks|recipes|can_dist|ray_jobs)/[\w./-]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_python_page_has_every_public_name() -> None:
    import can_dist

    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference" / "python.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(can_dist.__all__) - {"PlottedFrontier"} <= {name.rpartition(".")[2] for name in shown}


@pytest.fixture
def site() -> Any:
    """What mkdocs is told."""
    pytest.importorskip("mkdocs", reason="extra [docs]: mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site.py")
    assert spec is not None
    assert spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    return site


def test_the_star_of_a_letter_is_kept_in_code_of_every_kind(site: Any) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="concepts.md"))
    code = "\n\n    λ* ← [λ* − η]\n\n    θ*\n\n```text\nλ*\n```\n`π*`"
    assert site.on_page_markdown(f"λ* of{code} and π*", page, None, None) == f"λ&#42; of{code} and π&#42;"


def test_every_key_has_a_heading_once_and_each_of_its_meanings(site: Any) -> None:
    text = site.configuration_page()
    headings = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    keys = list(describe_keys(Config))
    assert len(headings) == len(set(headings))
    assert set(headings) == {key.name for key in keys}
    assert not [key for key in keys if key.description.replace("<", "&lt;") not in text]
    cost = text[text.index("### `reward.sign`") :].partition("\n### ")[0]
    assert "(kind sequence_classifier, " in cost, "kinds with the same key share a line"
    assert cost.count("-1 for a cost model") == 1


def test_an_option_is_one_word_where_code_wraps(site: Any) -> None:
    html = '<p>a-b</p><pre><code><span id="a-b">can-dist run --until x</span> -- &lt;a-b&gt;</code></pre>'
    shown = site.on_page_content(html, None, None, None)
    word = '<span class="word">{}</span>'.format
    code = f'<span id="a-b">{word("can-dist")} run {word("--until")} x</span> {word("--")} {word("&lt;a-b&gt;")}'
    assert shown == f"<p>a-b</p><pre><code>{code}</code></pre>"
