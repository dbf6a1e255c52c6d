"""The whole method as a Ray job.

ray job submit --working-dir . -- python ray_jobs/run.py my.yaml --run /shared/runs/mine
"""

from can_dist.cli import main
from can_dist.cli.job import run

if __name__ == "__main__":
    main(run)
