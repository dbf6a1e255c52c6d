"""ZeRO-3 where no weight is divided: one hook in place of those of every module.

DeepSpeed hangs hooks on every module, before and after its forward and its backward pass, which gather the module's
weights and let go of them. With one rank, or where all weights are below ``stage3_param_persistence_threshold``, every
rank has them whole between two updates anyway, and for a small model these hooks are most of a step.
"""

from __future__ import annotations

from typing import Any

import torch


def leave_out_hooks(engine: Any, num_ranks: int) -> None:
    """Take the hooks off the modules of an engine that needs none; its weights, gradients and updates are the same."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None or engine.zero_offload_param() is not None:  # ZeRO-2; or weights that are elsewhere meanwhile
        return
    weights = list(engine.module.parameters())
    if num_ranks > 1 and not all(weight.ds_persist for weight in weights):
        return
    offload.destroy()

    @torch.no_grad()
    def gather(*_: Any) -> None:
        """Fetch what an update or a checkpoint has put away; of one rank nothing is copied."""
        away = [weight for weight in weights if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if away:
            away[0].all_gather_coalesced(away).wait()

    engine.module.register_forward_pre_hook(gather)
