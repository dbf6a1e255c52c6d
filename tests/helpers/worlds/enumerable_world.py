"""A world small enough to enumerate (3 prompts, 64 responses): for what real trainings should end at.

Everything a trained policy should be is known in closed form here, by code that shares nothing with the product.
"""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq, minimize
from scipy.special import expit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "abcdefgh"  # the whole vocabulary, the end token among it: 64 responses have all the probability
# two words: after one, "a" and "a a" look the same to attention, and π* could not be represented
PROMPTS = ["a b", "c d", "e f"]
RESPONSES = [" ".join(pair) for pair in product(WORDS, repeat=2)]


def _table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(PROMPTS), len(RESPONSES)))


REWARD_PK = _table(1)
HARMLESS_PK = 0.6 * _table(2) - 0.5 * REWARD_PK
HONEST_PK = 0.6 * _table(3) - 0.3 * REWARD_PK + 0.3 * HARMLESS_PK


def _look_up(table: np.ndarray, conversations: list, responses: list) -> list[float]:
    return [
        float(table[PROMPTS.index(messages[-1]["content"]), RESPONSES.index(text)])
        for messages, text in zip(conversations, responses, strict=True)
    ]


def reward(conversations: list, responses: list) -> list[float]:
    return _look_up(REWARD_PK, conversations, responses)


def harmless(conversations: list, responses: list) -> list[float]:
    return _look_up(HARMLESS_PK, conversations, responses)


def honest(conversations: list, responses: list) -> list[float]:
    return _look_up(HONEST_PK, conversations, responses)


def make_reference(directory: Path) -> Path:
    """Save a 2-layer, 64-wide Llama over the 8 words, wide enough at random that π_ref is far from uniform."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="h"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="h", pad_token="h").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.08,
        eos_token_id=7,
        pad_token_id=7,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@torch.no_grad()
def probabilities(directory: Path) -> np.ndarray:
    """Return π(y|x) of all responses to all prompts, (3, 64) float64, straight from the model's logits."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    out = np.empty((len(PROMPTS), len(RESPONSES)))
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[WORDS.index(w) for w in f"{prompt} {text}".split()] for text in RESPONSES])
        logp = model(ids).logits.log_softmax(dim=-1)
        first, second = logp[:, 1].gather(1, ids[:, 2:3]), logp[:, 2].gather(1, ids[:, 3:4])
        out[row] = (first + second).squeeze(1).exp().numpy()
    return out


def optimal_policy(ref_PK: np.ndarray, utilities: list[np.ndarray], margins: list[float], beta: float):
    """Return (λ*, π*) from the closed form, with λ* by a bracketing root or a bounded quasi-Newton search."""

    def tilted(lam: np.ndarray) -> np.ndarray:
        score = (REWARD_PK + sum(l_j * g for l_j, g in zip(lam, utilities, strict=True))) / beta
        weight = ref_PK * np.exp(score - score.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True)

    def slack(lam: np.ndarray) -> np.ndarray:
        policy = tilted(lam)
        return np.array(
            [((policy - ref_PK) * g).sum(axis=1).mean() - b for g, b in zip(utilities, margins, strict=True)]
        )

    def dual(lam: np.ndarray) -> float:
        score = (REWARD_PK + sum(l_j * g for l_j, g in zip(lam, utilities, strict=True))) / beta
        free = beta * np.log((ref_PK * np.exp(score)).sum(axis=1)).mean()
        centres = [(ref_PK * g).sum(axis=1).mean() for g in utilities]
        return free - sum(l_j * (c + b) for l_j, c, b in zip(lam, centres, margins, strict=True))

    if len(utilities) == 1:
        lam = np.array([brentq(lambda x: slack(np.array([x]))[0], 0, 50, xtol=1e-12)])
    else:
        start = np.ones(len(utilities))
        options = {"ftol": 1e-15, "gtol": 1e-10}
        lam = minimize(dual, start, jac=slack, bounds=[(0, None)] * len(start), method="L-BFGS-B", options=options).x
    return lam, tilted(lam)


def people_policy(
    ref_PK: np.ndarray, row_V: np.ndarray, a_V: np.ndarray, b_V: np.ndarray, p_V: np.ndarray, beta: float
) -> np.ndarray:
    """Return π_ref exp(r̂/β)/Z with r̂ the Bradley–Terry rewards that fit P(a ≻ b) = p of the V pairs best."""

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        reward_PK = flat.reshape(ref_PK.shape)
        gap_V = reward_PK[row_V, a_V] - reward_PK[row_V, b_V]
        value = (np.logaddexp(0, gap_V) - p_V * gap_V).sum()
        slope_PK, slope_V = np.zeros_like(ref_PK), expit(gap_V) - p_V
        np.add.at(slope_PK, (row_V, a_V), slope_V)
        np.add.at(slope_PK, (row_V, b_V), -slope_V)
        return value, slope_PK.ravel()

    fitted = minimize(loss, np.zeros(ref_PK.size), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8})
    weight_PK = ref_PK * np.exp(fitted.x.reshape(ref_PK.shape) / beta)
    return weight_PK / weight_PK.sum(axis=1, keepdims=True)


def kl(policy_PK: np.ndarray, other_PK: np.ndarray) -> float:
    """Mean over prompts of KL(policy‖other), nats."""
    return float((policy_PK * np.log(policy_PK / other_PK)).sum(axis=1).mean())


def gain(policy_PK: np.ndarray, ref_PK: np.ndarray, utility_PK: np.ndarray) -> float:
    """Exact improvement of a utility's mean."""
    return float(((policy_PK - ref_PK) * utility_PK).sum(axis=1).mean())
