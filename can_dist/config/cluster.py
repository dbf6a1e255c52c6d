"""The resources of a run, and its waiting times."""

from __future__ import annotations

from typing import Literal

from can_dist.config.base import Strict, runtime


class Cluster(Strict):
    """The resources of a run; none of these keys changes a result."""

    address: str | None = runtime(None, "Ray address; default: RAY_ADDRESS, else a local Ray is started.")
    num_actors: int = runtime(2, "Ray actors that generate and score; on CPUs at most so many.", ge=1)
    cpus_per_actor: float = runtime(1, "CPUs of each actor.", gt=0)
    gpus_per_actor: float = runtime(0, "GPUs of each actor.", ge=0)
    score_cache: bool = runtime(False, "Keep scores in ~/.cache/can_dist and score no text twice, in any run.")
    num_workers: int = runtime(2, "DeepSpeed ranks.", ge=1)
    cpus_per_worker: float = runtime(1, "CPUs of each rank.", gt=0)
    gpus_per_worker: float = runtime(0, "GPUs of each rank (0 or 1).", ge=0, le=1)
    shard_attempts: int = runtime(3, "Times a shard is tried before the stage fails.", ge=1)
    first_deadline_s: float = runtime(3600, "Seconds to open the models, and for a shard while none is done.", gt=0)
    min_deadline_s: float = runtime(600, "Seconds a shard may take at least, and 10 times the median shard.", gt=0)
    max_quarantine: int = runtime(0, "Responses that a scorer may leave out, because they end its actors.", ge=0)
    on_nonfinite: Literal["fail", "quarantine"] = runtime("fail", "A NaN or infinite score; quarantine: see above.")
    max_failures: int = runtime(1, "Restarts of the training group before the run fails.", ge=0)
    hang_timeout_s: float = runtime(1800, "Seconds without progress after which training ends, naming the rank.", gt=0)
    stop_grace_s: float = runtime(20, "Seconds that training may take to commit when it is told to stop.", gt=0)
    wait_resources_s: float = runtime(300, "Seconds to wait for the resources asked for.", gt=0)
