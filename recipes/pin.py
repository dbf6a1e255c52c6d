"""Write the commit of every hub model and data set of a recipe into it, as ``revision``, where it has none.

    python recipes/pin.py recipes/pku_7b/lora.yaml
    python recipes/pin.py recipes/pku_7b/lora.yaml --update    # today's commits in place of those it has

A recipe that says ``pinned: true`` refuses to run while one is missing. This asks the hub once; keep the file it
leaves, and the run can be repeated. Gated models need ``hf auth login`` first. Comments and the order of keys stay;
what is a path here or beside the recipe is left alone, and so, without ``--update``, is what has a commit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from ruamel.yaml import YAML

from can_dist.tables.artifacts import atomic_file

COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_entries(node: Any, directory: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``'model'`` or ``'source'`` and the group of keys that names one, anchored groups once per use.

    Args:
        node: A recipe, or a part of it.
        directory: The recipe's own, where a relative path may lead as well.
    """
    if isinstance(node, dict):
        # an endpoint's model is whatever its server calls it
        for key in ("model", "source") if not node.keys() & {"url", "base_url"} else ():
            if isinstance(node.get(key), str):
                path = Path(node[key]).expanduser()
                if not path.exists() and not (directory / path).exists():
                    yield key, node
        for value in node.values():
            yield from hub_entries(value, directory)
    elif isinstance(node, list):
        for value in node:
            yield from hub_entries(value, directory)


def pin(path: Path, *, update: bool = False) -> list[str]:
    """Pin a recipe; return a line for each model and data set, with the commit it had if that was kept or replaced."""
    yaml, api = YAML(), HfApi()
    yaml.preserve_quotes = True
    yaml.width = 120
    recipe = yaml.load(path.read_text(encoding="utf-8"))
    lines: list[str] = []
    asked: dict[tuple[str, str, str | None], str] = {}
    changed = False
    for key, entry in {(key, id(entry)): (key, entry) for key, entry in hub_entries(recipe, path.parent)}.values():
        name, before = entry[key], entry.get("revision")
        has_commit = bool(COMMIT.fullmatch(str(before or "")))
        if has_commit and not update:
            lines.append(f"{name}: {before} (kept)")
            continue
        ask = api.model_info if key == "model" else api.dataset_info
        branch = None if has_commit else before
        if (key, name, branch) not in asked:
            asked[key, name, branch] = ask(name, revision=branch).sha
        commit = asked[key, name, branch]
        if commit != before:
            changed = True
            # a key that is there keeps its place and its comment
            if "revision" in entry:
                entry["revision"] = commit
            else:
                entry.insert(list(entry).index(key) + 1, "revision", commit)
        lines.append(f"{name}: {commit}" + (f" (was {before})" if before not in (None, commit) else ""))
    if changed:
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            yaml.dump(recipe, file)
    return list(dict.fromkeys(lines))


def main() -> None:
    """Pin the recipes that are named on the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("recipe", nargs="+", type=Path)
    parser.add_argument("--update", action="store_true", help="ask for today's commit of what has one too")
    given = parser.parse_args()
    for path in given.recipe:
        try:
            print("\n".join(pin(path, update=given.update)))
        except (HTTPError, OSError) as error:
            sys.exit(f"{path}: not changed, the hub did not answer: {error}")


if __name__ == "__main__":
    main()
