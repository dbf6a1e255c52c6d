"""A finished run → the reference's and the policy's answers to any prompt, drawn as the run draws them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from can_dist.config import Generate, Model, load_config
from can_dist.errors import DataError
from can_dist.outcomes.certificates import CONFIG
from can_dist.outcomes.certify import check_reference
from can_dist.outcomes.export import find_policy
from can_dist.stages.generate import response_text
from can_dist.stages.train import policy_model
from can_dist.tables.foreign.messages import prompt_id


@dataclass(frozen=True)
class Answers:
    """One prompt and its two answers; ``cut`` names those that ended at ``generate.max_new_tokens``."""

    prompt: str
    reference: str
    policy: str
    cut: tuple[str, ...]


class Chat:
    """The two models of a run, open for prompts.

    A prompt's answer is the first that the run itself draws of it: same temperature, same stream of the run's seed.
    """

    def __init__(self, path: Path) -> None:
        """Open the models at ``path``, a run with one policy, or an artifact of a stage that makes policies.

        Raises:
            DataError: there is no policy, or several, or the configured reference is not what it was trained from.
        """
        from can_dist.modeling.precision import run_precision

        policy, _ = find_policy(path)
        config = load_config(policy.path.parent / CONFIG)
        check_reference(policy, config)
        self.options: Generate = config.generate
        self.seed, self._precision = config.seed, run_precision(config)
        models = {"reference": config.reference, "policy": policy_model(policy, config.reference)}
        self._opened = {role: self._open(model) for role, model in models.items()}

    def _open(self, spec: Model) -> tuple[Any, Any]:
        from can_dist.modeling.formatter import open_formatter
        from can_dist.modeling.loading import load_causal_lm
        from can_dist.modeling.precision import device

        return load_causal_lm(spec, self._precision).eval().to(device()), open_formatter(spec)

    def answer(self, prompt: str) -> Answers:
        """Return the answers to a prompt.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        from can_dist.modeling.loading import context_length
        from can_dist.modeling.sampling import row_seed, sample

        messages = [{"role": "user", "content": prompt}]
        seed = row_seed(self.seed, prompt_id(messages), 0)
        texts, cut = {}, []
        for role, (model, formatter) in self._opened.items():
            ids = formatter.prompt_ids(messages)
            room = context_length(model) - self.options.max_new_tokens
            if len(ids) > room:
                raise DataError(
                    f"the prompt has {len(ids)} tokens, and at most {max(room, 0)} leave room for "
                    f"generate.max_new_tokens = {self.options.max_new_tokens}.",
                    "Shorten it.",
                )
            [(tokens, reason)] = sample(model, formatter.tokenizer, [ids], [seed], self.options, formatter.end_ids)
            texts[role] = response_text(formatter, tokens, self.options)
            cut += [role] if reason == "length" else []
        return Answers(prompt, texts["reference"], texts["policy"], tuple(cut))
