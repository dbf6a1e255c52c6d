"""ln π(y|x) of responses as a score column, so that training never holds a reference model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from can_dist.config import Model
from can_dist.errors import DataError
from can_dist.modeling.formatter import Formatter
from can_dist.modeling.loading import context_length, device, load_causal_lm, load_tokenizer
from can_dist.modeling.logprobs import response_logp
from can_dist.scoring.protocol import Response

BATCH_SIZE = 16


class LogProbScorer:
    """Sums of token log-probabilities over exactly the tokens that were sampled (the response's ``token_ids``)."""

    def __init__(self, spec: Model, precision: str) -> None:
        self.spec = spec
        self.model = load_causal_lm(spec, precision).eval().to(device())
        self.formatter = Formatter(load_tokenizer(spec), spec.template)

    @torch.inference_mode()
    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 sums in nats, one per response, in order."""
        prompts = [self.formatter.prompt_ids(response.messages) for response in responses]
        lengths = [len(p) + len(r.token_ids) for p, r in zip(prompts, responses, strict=True)]
        longest = context_length(self.model)
        for response, length in zip(responses, lengths, strict=True):
            if length > longest:
                raise DataError(
                    f"model {self.spec.model!r}: response {response.response_id!r} has {length} tokens with its "
                    f"prompt, the model's context is {longest}."
                )
        order = sorted(range(len(responses)), key=lambda row: (lengths[row], row))
        logp = np.empty(len(responses), dtype=np.float64)
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            batch = response_logp(
                self.model, [prompts[i] for i in rows], [responses[i].token_ids for i in rows], self.model.device
            )
            logp[rows] = batch.double().cpu().numpy()
        return logp
