"""``can-dist files``: what travels with the package beside its code, listed and copied."""

from __future__ import annotations

from pathlib import Path

import click

from can_dist.cli.options import LOCAL_PATH
from can_dist.config.shipped import FOLDERS, shipped_names, shipped_root
from can_dist.errors import ConfigError


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--to", "directory", default=".", type=LOCAL_PATH, help="Where to; default: here.")
def files(names: tuple[str, ...], directory: Path) -> None:
    """List the files that come with can-dist, or copy those of each NAME (a file or a folder) to where you are.

    Recipes and DeepSpeed files need no copy: `can-dist run pku_7b/lora`, `ds_config: zero3_bf16`.
    """
    if not names:
        click.echo("\n".join(name for folder in FOLDERS for name in shipped_names(folder)))
        return
    for name in copy_shipped(names, directory):
        click.echo(str(directory / name))


def copy_shipped(names: tuple[str, ...], directory: Path) -> list[str]:
    """Copy shipped files to the same names below a directory; return the names.

    Raises:
        ConfigError: there is no such file, or another one is there already; nothing is copied then.
    """
    from can_dist.tables.artifacts import write_text

    everything = [name for folder in FOLDERS for name in shipped_names(folder)]
    chosen: list[str] = []
    for name in names:
        whole = name.rstrip("/")
        named = [file for file in everything if file == whole or file.startswith(f"{whole}/")]
        if not named:
            raise ConfigError(
                f"{name}: no file or folder of this name comes with can-dist.", "`can-dist files` lists all."
            )
        chosen += named
    chosen = list(dict.fromkeys(chosen))
    texts = {name: (shipped_root() / name).read_text(encoding="utf-8") for name in chosen}
    for name, text in texts.items():
        there = directory / name
        if there.exists() and not (there.is_file() and there.read_bytes() == text.encode()):
            raise ConfigError(
                f"{there}: is there already and is another. Nothing was copied.", "Move it, or give --to."
            )
    try:
        for name in chosen:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(directory / name, text)
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot be written to ({error}).", "Give --to a directory that you may write to."
        ) from None
    return chosen
