"""ln π(y|x) of responses as a score column, so that training never holds a reference model."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from can_dist.errors import DataError
from can_dist.modeling.formatter import open_formatter
from can_dist.modeling.loading import context_length, load_causal_lm
from can_dist.modeling.logprobs import ResponseModel, choose_layout
from can_dist.modeling.packs import make_pack
from can_dist.modeling.policy_probe import check_probe
from can_dist.modeling.precision import device
from can_dist.scoring.protocol import LogProb, Response
from can_dist.scoring.token_budget import Passes, say, to_device


class LogProbScorer:
    """Sums of token log-probabilities over exactly the tokens that were sampled (the response's ``token_ids``)."""

    def __init__(self, spec: LogProb, precision: str) -> None:
        self.spec = spec.model
        lm = load_causal_lm(self.spec, precision, spec.quantize).eval().to(device())
        check_probe(lm, self.spec.model, precision)
        self.model = ResponseModel(lm).eval()
        self.formatter = open_formatter(self.spec)
        owner = f"model {self.spec.model!r}"
        layout = choose_layout(self.model, self.model, functools.partial(say, owner))
        self.passes = Passes(owner, layout, spec.tokens_per_pass)

    @torch.inference_mode()
    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 sums in nats, one per response, in order; the responses to a prompt share its computation."""
        prompts = [tuple(self.formatter.prompt_ids(response.messages)) for response in responses]
        sizes = [(len(prompt), len(r.token_ids)) for prompt, r in zip(prompts, responses, strict=True)]
        longest = context_length(self.model.lm)
        for response, size in zip(responses, sizes, strict=True):
            if sum(size) > longest:
                raise DataError(
                    f"model {self.spec.model!r}: response {response.response_id!r} has {sum(size)} tokens with its "
                    f"prompt, the model's context is {longest}."
                )

        def forward(pack: Sequence[Sequence[int]]) -> torch.Tensor:
            groups = [(prompts[rows[0]], [responses[row].token_ids for row in rows]) for rows in pack]
            logp_R: torch.Tensor = self.model(to_device(make_pack(groups, self.passes.layout), self.model.lm.device))
            return logp_R

        logp: np.ndarray = self.passes.run(prompts, sizes, forward).double().numpy()
        return logp
