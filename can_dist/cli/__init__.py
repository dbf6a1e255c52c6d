"""The command line. click lives here, and in the launcher's entry point ``train.py``."""

from can_dist.cli.main import cli as cli
from can_dist.cli.main import main as main
