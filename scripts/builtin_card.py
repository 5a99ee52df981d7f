"""The model card of the built-in pair, written with the measured figures."""
# ruff: noqa: E501 - the names of the figures in the card are longer than the figures

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from builtin_models import SHARPEN

CARD = """---
license: apache-2.0
language: en
---
# The built-in pair: a review writer and its reward model

Two small models for the quickstart and the tests of `stable-rlhf`: they load in a second, train on a CPU and need no network.

| | policy | reward model |
|---|---|---|
| class | `LlamaForCausalLM` | `LlamaForSequenceClassification`, one label |
| parameters | {policy_parameters:,} | {reward_parameters:,} |
| trained by | cross-entropy on continuations | Bradley-Terry on pairs ranked by VADER |

The files are float16 safetensors and load as float32. Both share a byte-level BPE tokenizer; `tokenizer(text)` begins with `<|bos|>`
and adds no `<|eos|>`; the policy ends a review with `<|eos|>`; `<|pad|>` is a token of its own. `prompts.json` holds openings,
`train` and `eval`; no model was trained on a text that begins with an `eval` opening.

## Data
The texts are written by SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), asked for short reviews of everyday things in five tones and
given the opening. Kept: one or two whole sentences, plain characters, no repeated three words, no rare words. The sentiment of a
continuation is its VADER compound (Hutto and Gilbert 2014, MIT), -1 to 1. The policy learns from a balanced subset.
Shares below -0.6 / -0.2 / 0.2 / 0.6 / above:

- as sampled: {natural}
- as trained on: {balanced}
- written by the policy as trained (held-out openings): {trained_vader}
- written by the policy as shipped, sharpened: {policy_vader}

The reward model learns from pairs of texts of one opening, all texts as sampled and {policy_samples:,} samples of the policy as trained;
pairs closer than 0.2 in compound are left out, in training and below. A fifth of its texts are cut short and scored as cut.

## Sharpened
The weight of the policy's last RMSNorm is divided by {sharpen}. The head is tied and has no bias, so this divides every logit: the
policy as shipped, at temperature 1, is the trained one at temperature {sharpen}. It reads better ({odd:.1%} of its samples hold a word
that is in none of the texts, {trained_odd:.1%} before) and fits held-out text worse (below): it is a writer to practise on, no
estimate of the texts' distribution.

## Figures, measured on these files as loaded
- Policy, on {loss_reviews:,} held-out reviews of {tokens_per_continuation:.1f} tokens a continuation: {loss:.3f} nats per token, perplexity {perplexity:.2f},
  {bits_per_character:.3f} bits per character. As trained, before sharpening: {trained_loss:.3f} nats, perplexity {trained_perplexity:.2f}, {trained_bits:.3f} bits.
- Its samples at temperature 1: distinct-2 of 256 {distinct_2:.2f}; {copied:.1%} are texts of the data, word for word; {ended:.1%} end with a
  full sentence within 48 tokens.
- Reward model, pairs ranked as VADER ranks them: {text_accuracy:.1%} of {text_pairs_n:,} pairs of held-out texts as sampled (95 % interval
  {text_low:.1%} to {text_high:.1%}), {own_accuracy:.1%} of {own_pairs_n:,} pairs of the policy's own samples ({own_low:.1%} to {own_high:.1%}).
- Reward of the policy's samples: mean {reward_mean:.2f}, deviation {reward_std:.2f} (the head was scaled to make it 1); correlation with
  VADER {vader_correlation:.2f}, with the number of words {length_correlation:.2f}.

## Limits
Toys. The policy knows only short reviews in English, and says untrue and odd things about them. The reward model imitates a sentiment
lexicon, not people: it likes praise, and a policy trained hard enough on it will pile up praise. Openings in `prompts.json` follow
a few dozen templates. Nothing here should judge real reviews.

## Made by
{commands}

seed {seed}; source temperature {source_temperature}, min-p 0.05.{where}
Training stops by the clock, so another machine gives other weights of the same quality; with `--texts`, `--policy-steps` and `--reward-steps` a build
depends on no clock as long as the seconds suffice.
"""

# What the card prints for a path: paths of the machine that built the pair tell the reader nothing.
PATHS = {"--output": "OUT", "--assets": "ASSETS", "--source": "SMOLLM2_FOLDER", "--texts": "OLD/texts.jsonl.gz"}
PATHS |= {"--policy": "OLD/policy", "--reward-model": "OLD/reward_model"}
SCRIPT = "    python scripts/build_builtin_models.py "


def command_line(argv: list[str]) -> str:
    """The arguments as given, without the paths of one machine; --option=PATH is taken apart first."""
    apart = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return shlex.join(PATHS.get(before, word) for before, word in zip(["", *apart], apart, strict=False))


def write_card(path: Path, figures: dict[str, Any], args: argparse.Namespace, argv: list[str]) -> None:
    """Fill the card; a figure that is missing raises KeyError."""
    text, own, trained = figures["text_pairs"], figures["policy_pairs"], figures["trained"]
    commands, where = [command_line(argv)], ""
    if args.policy is not None:
        commands.insert(0, "--output OLD")
        where = (
            " The first command, on a GPU, wrote the texts and trained; the second, on a CPU, sharpened and measured."
        )
    values = figures | {
        "text_accuracy": text["accuracy"],
        "text_low": text["low"],
        "text_high": text["high"],
        "text_pairs_n": text["pairs"],
        "own_accuracy": own["accuracy"],
        "own_low": own["low"],
        "own_high": own["high"],
        "own_pairs_n": own["pairs"],
        "trained_loss": trained["loss"],
        "trained_perplexity": trained["perplexity"],
        "trained_bits": trained["bits_per_character"],
        "sharpen": SHARPEN,
        "commands": "\n".join(SCRIPT + command for command in commands),
        "where": where,
        "seed": args.seed,
        "source_temperature": args.source_temperature,
        "policy_samples": args.policy_samples,
    }
    path.write_text(CARD.format(**values), encoding="utf-8")
