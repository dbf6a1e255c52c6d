"""Which layout a model computes right, found by numbers: a few sequences alone against the same in packs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from can_dist.modeling.attention import Attention
from can_dist.modeling.packs import LAYOUTS, Group, Pack
from can_dist.modeling.segments import noting_windows

Forward = Callable[[Pack], torch.Tensor]
MakePack = Callable[[Sequence[Group], str], Pack]


def values_alone(forward: Forward, make: MakePack, groups: Sequence[Group], weight: torch.Tensor) -> torch.Tensor:
    """Return the values of every sequence by a pass of its own, (R, …) float32, on the device of ``weight``."""
    passes = [make([(prompt, [response])], "padded") for prompt, responses in groups for response in responses]
    return torch.cat([forward(pack.to(weight.device)) for pack in passes]).float()


def exact_layout(
    forward: Forward,
    make: MakePack,
    groups: Sequence[Group],
    weight: torch.Tensor,
    alone_R: torch.Tensor,
    tolerance: float,
    values: str,
    say: Callable[[str], None],
) -> tuple[str, str]:
    """Find the best layout whose values are those of each sequence alone.

    Args:
        forward: The model.
        make: Makes a pack of groups in a layout.
        groups: What to compute.
        weight: A weight of the model, for its device.
        alone_R: What the model computes for each sequence alone, (R, …) float32.
        tolerance: Of the norm of the difference.
        values: What the values are called in messages.
        say: Is told when padded batches are not exact either.

    Returns:
        The layout, and the sentence that announces it: what is computed, by which attention, and why not better.

    Raises:
        EnvironmentProblem: When a kernel does not take our arguments: that is no reason to compute more slowly.
    """
    reasons = []
    for layout in LAYOUTS[:-1]:
        pack = make(groups, layout).to(weight.device)
        try:
            with noting_windows() as masked:
                error = float((forward(pack).float() - alone_R).norm())
        except TypeError as refused:  # of the model itself: its forward does not take what the attention needs
            reasons.append(f"attention by segments is not possible: {refused}")
            break
        assert pack.segments is not None
        # the probe is shorter than most windows, so that numbers do not show those that the attention knows nothing of
        pack.segments.not_taken.update(f"a window of {size} tokens" for size in masked - pack.segments.windows)
        if error <= tolerance and not pack.segments.not_taken:
            return layout, "; ".join([*reasons, announcement(layout, pack.segments.kernels)])
        why = ", ".join(sorted(pack.segments.not_taken)) or f"{values} off by {error:.2g}"
        reasons.append(f"{layout} packs are not exact for this model ({why})")
    error = float((forward(make(groups, "padded").to(weight.device)).float() - alone_R).norm())
    if error > tolerance:
        say(f"warning: padded batches are not exact either ({values} off by {error:.2g}): company changes a text")
    return "padded", "; ".join([*reasons, "padded batches: slower, and larger in memory"])


def announcement(layout: str, kernels: Collection[Attention]) -> str:
    """Say what a layout other than 'padded' does, and by which attention."""
    computed = "packs that share prompts" if layout == "shared" else "packs of separate sequences"
    return ", ".join([computed, *sorted(map(str, kernels))])


def floating_weight(model: torch.nn.Module) -> torch.Tensor:
    """Return a weight that tells the device and the precision of a model."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def probe_groups(vocab_size: int, avoid: int | None = None) -> list[Group]:
    """Two prompts with responses of different lengths, in which every leak of a layout shows; ``avoid`` is a token."""
    tokens = [token for token in ((17 * number + 5) % vocab_size for number in range(48)) if token != avoid]
    return [(tokens[:5], [tokens[5:9], tokens[9:12]]), (tokens[12:15], [tokens[15:17], tokens[17:22], tokens[22:23]])]
