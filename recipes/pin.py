"""Write the commit of every hub model and data set of a recipe into it, as ``revision``.

    python recipes/pin.py recipes/pku_7b/lora.yaml

The recipes come without commits, because they were written where the hub could not be asked, and they refuse to run
without (``pinned: true``). This asks it once; keep the file it leaves, and the run can be repeated. Gated models need
``hf auth login`` first. Comments and the order of keys stay; what is a path here, or has a commit, is left alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from ruamel.yaml import YAML

from can_dist.tables.artifacts import atomic_file

COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_entries(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``'model'`` or ``'source'`` and the group of keys that names one, anchored groups once per use."""
    if isinstance(node, dict):
        # an endpoint's model is whatever its server calls it
        for key in ("model", "source") if not node.keys() & {"url", "base_url"} else ():
            if isinstance(node.get(key), str) and not Path(node[key]).expanduser().exists():
                yield key, node
        for value in node.values():
            yield from hub_entries(value)
    elif isinstance(node, list):
        for value in node:
            yield from hub_entries(value)


def pin(path: Path) -> list[str]:
    """Pin a recipe; return a line for each model and data set."""
    yaml, api, lines = YAML(), HfApi(), []
    yaml.preserve_quotes = True
    yaml.width = 120
    recipe = yaml.load(path.read_text(encoding="utf-8"))
    for key, entry in hub_entries(recipe):
        if not COMMIT.fullmatch(str(entry.get("revision") or "")):
            ask = api.model_info if key == "model" else api.dataset_info
            commit = ask(entry[key], revision=entry.get("revision")).sha
            entry.insert(list(entry).index(key) + 1, "revision", commit)
        lines.append(f"{entry[key]}: {entry['revision']}")
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yaml.dump(recipe, file)
    return list(dict.fromkeys(lines))


def main() -> None:
    """Pin the recipes that are named on the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("recipe", nargs="+", type=Path)
    for path in parser.parse_args().recipe:
        try:
            print("\n".join(pin(path)))
        except (HfHubHTTPError, OSError) as error:
            sys.exit(f"{path}: not changed, the hub did not answer: {error}")


if __name__ == "__main__":
    main()
