"""``can-dist export``: a policy, its adapter, or the preferences, for use outside of a run."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from can_dist.cli.options import LOCAL_PATH, check_output
from can_dist.errors import ConfigError
from can_dist.tables.urls import is_remote

RUN = click.argument("run_dir", metavar="RUN", type=LOCAL_PATH)
OUT = click.option("--out", required=True, type=LOCAL_PATH, help="What to write; must not exist.")
OUT_OR_URL = click.option(
    "--out", required=True, metavar="PATH|URL", help="A new directory, or a URL of an object store such as s3://b/name."
)
STRENGTH = click.option(
    "--strength", metavar="A", type=float, help="θ_ref + A·(θ − θ_ref) instead: 1 is as trained, needs no training."
)
PUSH = click.option("--push", metavar="USER/NAME", help="Upload it to this private repository of the hub as well.")


@click.group()
def export() -> None:
    """Take a policy, its adapter, the preferences or λ* out of RUN, a run directory or an artifact in it."""


@export.command()
@RUN
@OUT_OR_URL
@click.option("--max-shard-size-mb", type=click.IntRange(min=1), help="Largest file of weights; default: as trained.")
@click.option(
    "--margin", "margins", multiple=True, metavar="[NAME=]B", help="Meet this margin instead, without training."
)
@STRENGTH
@click.option("--require-certificate", is_flag=True, help="Write nothing unless 'can-dist certify' certified it.")
@PUSH
def policy(
    run_dir: Path,
    out: str,
    max_shard_size_mb: int | None,
    margins: tuple[str, ...],
    strength: float | None,
    require_certificate: bool,
    push: str | None,
) -> None:
    """Write the whole policy, adapters merged, with its model card: a directory that transformers and vLLM load."""
    if require_certificate and (margins or strength is not None):
        raise ConfigError(
            "--require-certificate: another strength is another policy, which nothing was measured of.",
            "Leave out --margin and --strength.",
        )
    _write(
        run_dir,
        out,
        adapter=False,
        max_shard_mb=max_shard_size_mb,
        push=push,
        strength=strength,
        margins=margins,
        certified=require_certificate,
    )


@export.command()
@RUN
@OUT_OR_URL
@STRENGTH
@PUSH
def adapter(run_dir: Path, out: str, strength: float | None, push: str | None) -> None:
    """Write the LoRA adapter alone, with its model card: a directory that peft and vLLM load over the base model."""
    _write(run_dir, out, adapter=True, max_shard_mb=None, push=push, strength=strength)


@export.command()
@RUN
@OUT
@click.option("--split", type=click.Choice(["train", "validation"]), default="train", show_default=True)
def preferences(run_dir: Path, out: Path, split: str) -> None:
    """Write the labelled preferences as Parquet in TRL's conversational format."""
    from can_dist.outcomes.export import export_preferences

    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: expected a name that ends in .parquet.")
    check_output("--out", str(out))
    counts = export_preferences(run_dir, out, split=split)
    click.echo(f"{out}: {counts['rows']} rows, {counts['undecided']} undecided pairs left out.")


@export.command()
@RUN
@OUT
@click.option(
    "--for", "tool", required=True, type=click.Choice(["trl", "openrlhf", "verl"]), help="The trainer that reads them."
)
def weights(run_dir: Path, out: Path, tool: str) -> None:
    """Write λ* as reward weights, with β and what else a trainer of online RL has to set, into a new directory."""
    with contextlib.redirect_stdout(sys.stderr):
        from can_dist.outcomes.weights import export_weights

        made, beta = export_weights(run_dir, out, tool=tool)
    terms = ", ".join(f"{name} {value:.6g}" for name, value in made.items())
    click.echo(f"can-dist: weights {terms}; β {beta:g}", err=True)
    click.echo(str(out))


def _write(run_dir: Path, out: str, *, push: str | None, **options: Any) -> None:
    """Write a policy or an adapter to a path; or to a URL, by way of a temporary directory of this machine."""
    if not is_remote(out):
        _export(run_dir, Path(out), push=push, **options)
        return
    from can_dist.tables.remote import check_absent, put_directory

    if push is not None:
        raise ConfigError("--push uploads to the hub, --out with a URL to an object store.", "Leave out one.")
    check_absent(out)
    with tempfile.TemporaryDirectory(prefix="can_dist-export-") as scratch:
        built = Path(scratch) / "policy"
        _export(run_dir, built, push=None, shown=out, **options)
        put_directory(built, out)
    click.echo(out)


def _export(
    run_dir: Path,
    out: Path,
    *,
    adapter: bool,
    max_shard_mb: int | None,
    push: str | None,
    strength: float | None,
    margins: tuple[str, ...] = (),
    certified: bool = False,
    shown: str = "",
) -> None:
    """Write a policy or an adapter; print its path, unless it is on its way to ``shown``."""
    sentences: tuple[str, ...] = ()
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.outcomes import export, mixture, stretch

        if strength is None and not margins:
            written = export.export_policy(
                run_dir, out, adapter=adapter, max_shard_mb=max_shard_mb, certified=certified
            )
        elif margins and mixture.has_basis(run_dir):
            exported = mixture.export_mixture(
                run_dir, out, margins=dict(map(_margin, margins)), max_shard_mb=max_shard_mb
            )
            written, sentences = exported.path, exported.sentences
        else:
            demanded = dict(map(_margin, margins))
            largest = max_shard_mb or stretch.SHARD_MB
            exported = stretch.export_strength(
                run_dir, out, strength=strength, margins=demanded, adapter=adapter, max_shard_mb=largest
            )
            written, sentences = exported.path, (f"strength {exported.alpha:.4g}", *exported.sentences)
        destination = str(written) if push is None else export.push(written, push)
    for sentence in sentences:
        click.echo(f"can-dist: {sentence}", err=True)
    if not shown:
        click.echo(destination)


def _margin(text: str) -> tuple[str, float]:
    """Return the name, '' where there is none, and the value of NAME=B or B."""
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--margin {text}: expected a number, or NAME=number.") from None
