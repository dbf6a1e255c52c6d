"""``can-dist certify``: what is sure of a policy, on prompts that nothing else has read."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from can_dist.cli.options import LOCAL_PATH


@click.command()
@click.argument("run_dir", metavar="RUN", type=LOCAL_PATH)
@click.option(
    "--delta",
    type=float,
    help="Joint error of all looks at the sealed prompts: the probability with which a policy that misses a constraint "
    "may be certified. Default: that of the first look, or 0.05.",
)
@click.option("--tolerance", metavar="T", type=float, help="Within this of its number an equality counts as met.")
def certify(run_dir: Path, delta: float | None, tolerance: float | None) -> None:
    """Certify the policy of RUN, a run directory or an artifact in it, on the run's sealed prompts.

    Exit code 0: certified; 4: not certified; 7: not enough prompts.
    """
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.outcomes.certify import EXIT_CODES, run_certificate
        from can_dist.stages.certify import CERTIFICATE, CERTIFICATE_PAGE

        certificate = run_certificate(run_dir, delta=delta, tolerance=tolerance)
        record = certificate.read_json(CERTIFICATE)
    click.echo("\n".join([*record["sentences"], str(certificate.path / CERTIFICATE_PAGE)]))
    sys.exit(EXIT_CODES[record["answer"]])
