"""What the card reports: samples of the policy, their VADER compound, and the figures measured on saved files."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import torch
from builtin_models import EOS, encode, encode_reviews, mean_loss, sample
from builtin_text import Review, vader_bin, words
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

NEW_TOKENS = 48  # two short sentences and the end of text

_analyzer: SentimentIntensityAnalyzer | None = None


def compound(text: str) -> float:
    """VADER compound, -1 to 1; the lexicon is read once a process."""
    global _analyzer
    if _analyzer is None:
        _analyzer = SentimentIntensityAnalyzer()
    return _analyzer.polarity_scores(text)["compound"]


def bin_shares(reviews: list[Review]) -> str:
    """Shares of the VADER bins and the moments, for the log and the card."""
    values = torch.tensor([r.vader for r in reviews])
    counts = torch.bincount(torch.tensor([vader_bin(r.vader) for r in reviews]), minlength=5) / len(reviews)
    shares = " / ".join(f"{share:.2f}" for share in counts.tolist())
    return f"{shares} (mean {values.mean():.2f}, deviation {values.std():.2f}, n {len(reviews)})"


def policy_reviews(policy: Any, tokenizer: Any, names: list[str], count: int, seed: int) -> list[Review]:
    """`count` samples of the policy at temperature 1 after `names` (in turn), vader 0; batches of one prompt length."""
    generator = random.Random(seed)
    groups: dict[int, list[tuple[str, list[int]]]] = {}
    for name in names:
        row = tokenizer(name)["input_ids"]
        groups.setdefault(len(row), []).append((name, row))
    made = []
    for members in groups.values():
        share = max(2 * len(members), count * len(members) // len(names))
        chosen = [members[i % len(members)] for i in range(share)]
        for first in range(0, share, 4096):
            part = chosen[first : first + 4096]
            prompts = torch.tensor([row for _, row in part], device=policy.device)
            new = sample(policy, prompts, NEW_TOKENS, temperature=1.0, min_p=0.0, eos=EOS).tolist()
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            made += [(name, text) for (name, _), text in zip(part, texts, strict=True)]
    generator.shuffle(made)
    return [Review(opening=name, continuation=text, vader=0.0) for name, text in made]


def with_vader(reviews: list[Review], pool: Any) -> list[Review]:
    """The same reviews with the compound of their continuations filled in."""
    values = pool.map(compound, [r.continuation for r in reviews], chunksize=256)
    return [
        Review(opening=r.opening, continuation=r.continuation, vader=v) for r, v in zip(reviews, values, strict=True)
    ]


def distinct_2(reviews: list[Review]) -> float:
    """Distinct pairs of neighbouring words over all such pairs, of the first 256 continuations together."""
    pieces = [r.continuation.split() for r in reviews[:256]]
    pairs = [pair for p in pieces for pair in pairwise(p)]
    return len(set(pairs)) / max(1, len(pairs))


def odd_words(reviews: list[Review], known: set[str]) -> float:
    """Share of the continuations with a word that is not in `known`: made-up words, a crude sign of unreadable text."""
    return sum(not known.issuperset(words(r.continuation)) for r in reviews) / len(reviews)


def policy_figures(policy: Any, tokenizer: Any, reviews: list[Review]) -> dict[str, float]:
    """Loss of the saved policy on held-out continuations (<|eos|> counts as a token), in nats per token."""
    data = encode_reviews(tokenizer, reviews, policy.device)
    loss = mean_loss(policy, data)
    per_review = float((data[2] - data[1]).float().mean())
    letters = sum(len(r.continuation) for r in reviews) / len(reviews)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_character": loss * per_review / letters / math.log(2),
        "tokens_per_continuation": per_review,
        "loss_reviews": len(reviews),
    }


@torch.no_grad()
def score_texts(reward: Any, tokenizer: Any, reviews: list[Review]) -> Tensor:
    """Rewards [N], float32 on the CPU, of opening + continuation as a user scores them (no <|eos|>)."""
    texts = [r.opening + r.continuation for r in reviews]
    tokens, length = encode(tokenizer, texts, [False] * len(texts), reward.device)
    parts = []
    for i in range(0, len(tokens), 1024):
        width = int(length[i : i + 1024].max())
        parts.append(reward(input_ids=tokens[i : i + 1024, :width].long(), use_cache=False).logits[:, 0].float().cpu())
    return torch.cat(parts)


def reward_figures(reward: Any, tokenizer: Any, pairs: list[tuple[Review, Review]]) -> dict[str, float]:
    """Share of pairs (better, worse) ranked right, with Wilson's 95 % interval."""
    if not pairs:
        raise ValueError("no held-out pair: sample more text (--sample-seconds)")
    better = score_texts(reward, tokenizer, [a for a, _ in pairs])
    worse = score_texts(reward, tokenizer, [b for _, b in pairs])
    n, share, z = len(pairs), float((better > worse).float().mean()), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"accuracy": share, "low": middle - half, "high": middle + half, "pairs": n}
