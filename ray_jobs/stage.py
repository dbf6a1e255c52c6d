"""One stage as a Ray job, and before it what it needs and is not finished.

ray job submit --working-dir . -- python ray_jobs/stage.py generate my.yaml --run /shared/runs/mine
"""

from can_dist.cli import main
from can_dist.cli.job import stage

if __name__ == "__main__":
    main(stage)
