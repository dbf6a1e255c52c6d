"""``python -m can_dist.cli`` is the command ``can-dist``."""

from can_dist.cli.main import main

main()
