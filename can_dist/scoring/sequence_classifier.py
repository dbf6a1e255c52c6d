"""Hugging Face sequence classifiers as scorers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from can_dist.config import Beaver, MultiHead, SequenceClassifier
from can_dist.modeling.formatter import Formatter
from can_dist.modeling.last_token import LastToken, choose_text_layout, float32_head, pooled, reads_last_token
from can_dist.modeling.loading import (
    context_length,
    device,
    load_sequence_classifier,
    load_tokenizer,
)
from can_dist.modeling.packs import Pack
from can_dist.scoring.protocol import Response
from can_dist.scoring.token_budget import Passes, say
from can_dist.scoring.whole_texts import check_lengths, outputs_of_texts, up_to_padding


class ClassifierScorer:
    """The outputs of a sequence classifier for each text; the texts of a prompt share their beginning."""

    def __init__(self, spec: SequenceClassifier, precision: str) -> None:
        self.spec = spec
        self.where = f"scorer {spec.model!r}"
        self.model = load_sequence_classifier(spec, precision).to(device())
        tokenizer = load_tokenizer(spec)
        self.formatter = Formatter(tokenizer, spec.template)
        # transformers, and so the training, read a text before the padding that its configuration publishes
        self.not_read = None if isinstance(spec, Beaver) else self.model.config.get_text_config().pad_token_id
        # a classifier that pools by itself finds the last token that is not padding by this id
        self.pad_id = tokenizer.pad_token_id if self.not_read is None else self.not_read
        self.model.config.pad_token_id = self.pad_id
        self.max_length = min(spec.max_length or 10**9, context_length(self.model))
        self.head = self._linear_head()
        tell = functools.partial(say, self.where)
        if self.head is None:
            tell("pools by itself; padded batches: slower, and larger in memory")
            layout = "padded"
        else:
            self.read = LastToken(self._body(), "last_hidden_state")
            layout = choose_text_layout(self.read, tell)
        self.passes = Passes(self.where, layout, spec.tokens_per_pass)

    @torch.inference_mode()
    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 scores in order, (R,), or (R, L) of a model with several outputs.

        A text longer than the model's context is refused.
        """
        texts = [self.formatter.full_ids(response.messages, response.text) for response in responses]
        check_lengths(self.where, responses, texts, self.max_length)
        if self.head is not None:
            texts = [up_to_padding(ids, self.not_read) for ids in texts]
        output_RL = outputs_of_texts(self.passes, self._outputs, responses, texts, self.model.device, self.pad_id)
        score_RL: np.ndarray = output_RL.double().numpy()
        return score_RL if isinstance(self.spec, MultiHead) else score_RL[:, 0]

    def _outputs(self, pack: Pack) -> torch.Tensor:
        """Outputs_RL, float32, of the texts of a pack."""
        if self.head is None:
            return pooled(self.model, pack).float()
        return float32_head(self.head, self.read(pack))

    def _body(self) -> torch.nn.Module:
        body: torch.nn.Module = getattr(self.model, self.model.base_model_prefix)
        return body

    def _linear_head(self) -> torch.nn.Linear | None:
        """Return the head if the outputs are what it makes of the last token, and nothing else."""
        if isinstance(self.spec, Beaver):
            return self.model.score_head
        head = getattr(self.model, "score", None)
        is_all = isinstance(head, torch.nn.Linear) and reads_last_token(self.model, self._body(), head, self.pad_id)
        return head if is_all else None
