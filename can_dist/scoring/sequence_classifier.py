"""Hugging Face sequence classifiers as scorers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from can_dist.config import Beaver, MultiHead, SequenceClassifier
from can_dist.errors import DataError
from can_dist.modeling.classifiers import check_pair_is_chosen, check_sequence_classifier, load_sequence_classifier
from can_dist.modeling.formatter import Message, open_formatter
from can_dist.modeling.last_token import LastToken, choose_text_layout, float32_head, pooled, reads_last_token
from can_dist.modeling.loading import check_vocabulary, context_length, load_tokenizer
from can_dist.modeling.packs import Pack
from can_dist.modeling.precision import device
from can_dist.scoring.fitted import check_fitted
from can_dist.scoring.protocol import Response
from can_dist.scoring.token_budget import Passes, say
from can_dist.scoring.whole_texts import check_lengths, outputs_of_texts, up_to_padding

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


class ClassifierScorer:
    """The outputs of a sequence classifier for each text; the texts of a prompt share their beginning."""

    def __init__(self, spec: SequenceClassifier, precision: str) -> None:
        check_pair_is_chosen(spec)
        self.spec = spec
        self.where = f"scorer {spec.model!r}"
        tell = functools.partial(say, self.where)
        self.model = load_sequence_classifier(spec, precision, tell).to(device())
        self.tokenizer = load_tokenizer(spec)
        self.formatter = None if spec.text_pair else open_formatter(spec)
        # transformers, and so the training, read a text before the padding that its configuration publishes
        self.not_read = None if isinstance(spec, Beaver) else self.model.config.get_text_config().pad_token_id
        # a classifier that pools by itself finds the last token that is not padding by this id
        self.pad_id = self.tokenizer.pad_token_id if self.not_read is None else self.not_read
        self.model.config.pad_token_id = self.pad_id
        self.max_length = min(spec.max_length or 10**9, context_length(self.model))
        self.head = None if spec.text_pair else self._linear_head()
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
        output_RL = self._outputs_of_texts(responses) if self.formatter else self._outputs_of_pairs(responses)
        score_RL: np.ndarray = output_RL.double().numpy()
        return score_RL if isinstance(self.spec, MultiHead) else score_RL[:, 0]

    def _outputs_of_texts(self, responses: Sequence[Response]) -> torch.Tensor:
        assert self.formatter is not None
        texts = [self.formatter.full_ids(response.messages, response.text) for response in responses]
        check_lengths(self.where, responses, texts, self.max_length)
        if self.head is not None:
            texts = [up_to_padding(ids, self.not_read) for ids in texts]
        return outputs_of_texts(self.passes, self._outputs, responses, texts, self.model.device, self.pad_id)

    def _outputs_of_pairs(self, responses: Sequence[Response]) -> torch.Tensor:
        """Return the outputs (R, L) of ``tokenizer(prompt, response)``, with its token types."""
        pairs = [pair_of_texts(self.tokenizer, self.spec, r.messages, r.text) for r in responses]
        texts: list[list[int]] = [pair["input_ids"] for pair in pairs]
        check_lengths(self.where, responses, texts, self.max_length)

        def forward(pack: Sequence[Sequence[int]]) -> torch.Tensor:
            rows = [row for group in pack for row in group]
            pad_ids = {"input_ids": self.pad_id} | {name: 0 for name in pairs[0] if name != "input_ids"}
            inputs = {
                name: pad_sequence([torch.tensor(pairs[row][name]) for row in rows], True, pad_id).to(self.model.device)
                for name, pad_id in pad_ids.items()
            }
            outputs_RL: torch.Tensor = self.model(**inputs).logits.float()
            return outputs_RL

        return self.passes.run(range(len(texts)), [(0, len(ids)) for ids in texts], forward)

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
            head: torch.nn.Linear | None = self.model.score_head
            return head
        head = getattr(self.model, "score", None)
        is_all = isinstance(head, torch.nn.Linear) and reads_last_token(self.model, self._body(), head, self.pad_id)
        return head if is_all else None


def pair_of_texts(
    tokenizer: PreTrainedTokenizerBase, spec: SequenceClassifier, messages: Sequence[Message], text: str
) -> BatchEncoding:
    """Return what a model that reads question and answer as two texts is given, as its makers' cards write it.

    Raises:
        DataError: The conversation is not one turn of the user.
    """
    if [message["role"] for message in messages] != ["user"]:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"scorer {spec.model!r}: a conversation of {roles} is no single question, which text_pair reads.",
            "Use a model with a chat template, or single-turn prompts.",
        )
    return tokenizer(messages[0]["content"], text)


def check_classifier(spec: SequenceClassifier) -> None:
    """Raise what opening a classifier would raise, as far as its weights are not needed, and where it is no good."""
    check_fitted(spec)
    check_sequence_classifier(spec)
    check_vocabulary(spec)
    check_pair_is_chosen(spec)
    if not spec.text_pair:
        open_formatter(spec)


def text_of_classifier(spec: SequenceClassifier) -> Callable[[Sequence[Message], str], str]:
    """Return what writes a conversation with its response as a classifier reads it."""
    if spec.text_pair:
        tokenizer = load_tokenizer(spec)
        return lambda messages, text: str(tokenizer.decode(pair_of_texts(tokenizer, spec, messages, text)["input_ids"]))
    return open_formatter(spec).full_text
