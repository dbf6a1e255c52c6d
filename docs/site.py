"""What mkdocs is told: pages made from code and from files outside ``docs``, and links that leave ``docs``."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from can_dist.config import Config
from can_dist.config.describe import Key, describe_keys

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.plugins.site")  # a warning here ends a strict build
OUTSIDE = {
    "README.md": "repository/readme.md",
    "SECURITY.md": "repository/security.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "CHANGELOG.md": "repository/changelog.md",
    "ray_jobs/README.md": "repository/ray_jobs.md",
    "ds_configs/README.md": "repository/ds_configs.md",
    "recipes/README.md": "repository/recipes.md",
    "docs/quickstart.ipynb": "quickstart.md",
}
"""Files that become pages, by their path in the repository."""
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(^```[\s\S]*?^```$|(?<=\n\n) {4}.*(?:\n+ {4}.*)*|`[^`\n]*`)", re.MULTILINE)
"""Code: between fences, indented after an empty line, or in a line."""
HYPHENED = re.compile(r"<[^>]*>|(?<![^\s>])(?P<word>[^\s<>]{0,30}-[^\s<>]{0,30})(?![^\s<])")
"""A tag, or a word with a hyphen that is short enough for a line."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {place: (ROOT / source).read_text(encoding="utf-8") for source, place in OUTSIDE.items()}
    made["reference/commands.md"] = commands_page()
    made["reference/configuration.md"] = configuration_page()
    made["quickstart.md"] = notebook_page(ROOT / "docs" / "quickstart.ipynb")
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    files.remove(files.get_file_from_path("quickstart.ipynb"))  # type: ignore[arg-type]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Point links at the pages of the site; a file that is no page is named, if it exists, without a link."""
    here = page.file.src_uri
    source = next((outside for outside, place in OUTSIDE.items() if place == here), f"docs/{here}")

    def follow(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is not None:
            return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor})"
        if not (ROOT / path).exists():
            LOG.warning("%s: links to %s, which does not exist", source, target)
        return text if posixpath.basename(path) in text else f"{text} (`{path}`)"

    # the star of λ* is no emphasis, which Python's Markdown takes it for
    parts = CODE.split(LINK.sub(follow, markdown))
    return "".join(part if n % 2 else re.sub(r"(?<=[λπθ])\*", "&#42;", part) for n, part in enumerate(parts))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Keep options and names in one piece where code wraps: browsers would break them after a hyphen."""

    def kept(match: re.Match[str]) -> str:
        return match[0] if match["word"] is None else f'<span class="word">{match[0]}</span>'

    return re.sub(r"(?s)<code>.*?</code>", lambda code: HYPHENED.sub(kept, code[0]), html)


def commands_page() -> str:
    """Return the help of every command."""
    from can_dist.cli import cli

    parts = ["# Commands\n\nWhat `can-dist VERB --help` prints.\n"]

    def describe(command: click.Command, path: list[str], level: int) -> None:
        context = click.Context(command, info_name=" ".join(path), max_content_width=80, terminal_width=80)
        parts.append(f"{'#' * level} {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                describe(command.commands[name], [*path, name], level + 1)

    describe(cli, ["can-dist"], 2)
    return "\n".join(parts)


def configuration_page() -> str:
    """Return every key of the configuration under a heading of its own, which the search and links reach."""
    parts = [
        "# Configuration\n\nEvery key with its type, default and meaning, as `can-dist config --schema` prints them. A "
        "group that is one of several kinds has the keys of its kind."
    ]
    groups: dict[str, list[str]] = {"At the top": []}
    keys_of = keys_by_name(Config)
    for name, keys in keys_of.items():
        is_single = "." not in name and not keys[0].type.startswith("group")
        groups.setdefault("At the top" if is_single else name.partition(".")[0], []).append(name)
    for group, names in groups.items():
        parts += [f"## {group}", *(_key(name, keys_of[name]) for name in names)]
    return "\n\n".join(parts)


def _key(name: str, keys: list[Key]) -> str:
    parts = [f"### `{name}`"]
    for key in keys:
        kinds = f" (kind {key.kind})" if key.kind else ""
        runtime = " Changing it recomputes nothing." if key.runtime else ""
        parts.append(f"{key.type}; {key.default}{kinds}  \n{key.description}{runtime}".replace("<", "&lt;"))
    return "\n\n".join(parts)


def keys_by_name(model: type[Config]) -> dict[str, list[Key]]:
    """Return the keys of a name, once for each that differs in more than its kind, whose kinds are then all named."""
    keys: dict[str, list[Key]] = {}
    for key in describe_keys(model):
        same = keys.setdefault(key.name, [])
        place = next((n for n, other in enumerate(same) if other._replace(kind="") == key._replace(kind="")), None)
        if place is None:
            same.append(key)
        elif key.kind not in same[place].kind.split(", "):
            same[place] = key._replace(kind=f"{same[place].kind}, {key.kind}")
    return keys


def notebook_page(path: Path) -> str:
    """Return an executed notebook as Markdown: its text, its code, and the text and pictures that it gave."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_shown(output) for output in cell.get("outputs", [])]
    return "\n\n".join(part for part in parts if part)


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/svg+xml" in data:
        picture = "".join(data["image/svg+xml"])
        return f'<div class="notebook-figure">{picture[picture.index("<svg") :]}</div>'
    if "text/html" in data:
        return re.sub(r"\n\s*", "", re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL))
    text = "".join(output.get("text", data.get("text/plain", [])))
    return f"```console\n{text.rstrip()}\n```" if text.strip() else ""
