"""The models of the built-in pair: tokenizer, shapes, sampling, training, sharpening and saving."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from builtin_text import Review
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>")
MAX_POSITIONS = 256
IGNORED = -100  # the label that cross_entropy leaves out
# Steps between two losses on the watched reviews, 8 s of an H100; steps, so that no clock chooses the weights.
LOOK = 250
# The temperature that sharpening builds into the policy. As trained, 6 % of its samples hold a word that is in none of
# the texts, and many lose their thread; at 0.7 it is 1 %, and most read well. 0.65 gains little that a reader sees, and
# the lower, the more alike the samples (distinct-2 .67 as trained, .55 at 0.7). From 0.65 to 1 every VADER bin keeps
# 14 % or more of the samples, so that a reward has as much to tell apart.
SHARPEN = 0.7
log = logging.getLogger("build")

# 4.5 M and 1.4 M parameters: 9 and 3 MB in float16, so that both fit in 16 MB with their tokenizers.
POLICY_SHAPE = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
POLICY_SHAPE |= {"intermediate_size": 640}
REWARD_SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
REWARD_SHAPE |= {"intermediate_size": 384}


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded; a text is encoded as <|bos|> and its tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: Any, shape: dict[str, int], **extra: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **shape,
        **extra,
    )


@torch.inference_mode()
def sample(model: Any, prompts: Tensor, new_tokens: int, *, temperature: float, min_p: float, eos: int) -> Tensor:
    """New tokens, int64 [B, <= new_tokens], after unpadded prompts [B, P]; everything after the first `eos` is `eos`.

    Tokens with less than `min_p` times the largest probability are left out (Nguyen et al. 2024, arXiv 2407.01082);
    0 leaves the distribution whole. The draw is the Gumbel maximum, which needs no sort and no normalisation.
    """
    cache, tokens, made = None, prompts, []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    for step in range(new_tokens):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits = out.logits[:, -1].float().div_(temperature)
        if min_p > 0:
            logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
        noise = torch.empty_like(logits).exponential_().clamp_(min=1e-20).log_()
        tokens = logits.sub_(noise).argmax(-1, keepdim=True)
        tokens.masked_fill_(done[:, None], eos)
        made.append(tokens)
        done |= tokens[:, 0] == eos
        if step % 8 == 7 and bool(done.all()):
            break
    return torch.cat(made, dim=1)


def encode(tokenizer: Any, texts: list[str], ended: list[bool], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [N, L] int32, padded on the right, and the length [N] of each row; `ended` rows end with <|eos|>."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    ids = [e.ids + [EOS] * end for e, end in zip(encodings, ended, strict=True)]
    width = max(len(row) for row in ids)
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in ids], dtype=torch.int32, device=device)
    return tokens, torch.tensor([len(row) for row in ids], device=device)


def encode_reviews(tokenizer: Any, reviews: list[Review], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, L] of whole reviews with <|eos|>, the tokens of each opening [N], the tokens of each row [N].

    Raises ValueError when the tokens of an opening are no prefix of those of its review: `clean` lets no such text by.
    """
    tokens, length = encode(tokenizer, [r.opening + r.continuation for r in reviews], [True] * len(reviews), device)
    names = sorted({r.opening for r in reviews})
    starts = dict(zip(names, (e.ids for e in tokenizer.backend_tokenizer.encode_batch(names)), strict=True))
    for review, row in zip(reviews, tokens.tolist(), strict=True):
        if row[: len(starts[review.opening])] != starts[review.opening]:
            raise ValueError(f"the tokens of {review.opening!r} are no prefix of those with {review.continuation!r}")
    return tokens, torch.tensor([len(starts[r.opening]) for r in reviews], device=device), length


def continuation_loss(model: Any, tokens: Tensor, prompt: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the batch of -log p of the continuation's tokens (<|eos|> included), nats, and the number of tokens.

    Padding stands on the right, so causal attention needs no mask.
    """
    tokens = tokens[:, : int(length.max())].long()
    place = torch.arange(tokens.shape[1], device=tokens.device)
    counted = (place >= prompt[:, None]) & (place < length[:, None])
    labels = tokens.masked_fill(~counted, IGNORED)[:, 1:]
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return loss, counted[:, 1:].sum()


@torch.no_grad()
def mean_loss(model: Any, data: tuple[Tensor, Tensor, Tensor]) -> float:
    """Nats per token of the continuations, over all rows; rows of one length share a batch, which saves padding."""
    order = data[2].argsort()
    data = data[0][order], data[1][order], data[2][order]
    sums = [continuation_loss(model, *(part[i : i + 512] for part in data)) for i in range(0, len(data[0]), 512)]
    return float(sum(loss for loss, _ in sums)) / float(sum(count for _, count in sums))


class Schedule:
    """Warm-up over 2 %, then a cosine to 5 % of the peak, over whichever of seconds and steps runs out first."""

    def __init__(self, optimizer: torch.optim.Optimizer, peak: float, seconds: float, steps: int) -> None:
        self.optimizer, self.peak, self.seconds, self.steps = optimizer, peak, seconds, steps
        self.started, self.step = time.monotonic(), 0

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def advance(self) -> bool:
        """Set the rate of the next step; False when the budget is used up."""
        done = max(self.elapsed() / self.seconds, self.step / self.steps)
        if done >= 1:
            return False
        rate = self.peak * min(1.0, (done + 1e-3) / 0.02) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        return True


def make_optimizer(model: Any, device: torch.device) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


def train_policy(
    tokenizer: Any,
    reviews: list[Review],
    watched: list[Review],
    args: argparse.Namespace,
    device: torch.device,
) -> Any:
    """A policy from scratch; the weights with the least loss on `watched`, looked at every LOOK steps, are kept."""
    data, watch = encode_reviews(tokenizer, reviews, device), encode_reviews(tokenizer, watched, device)
    policy = LlamaForCausalLM(make_config(tokenizer, POLICY_SHAPE)).to(device)
    log.info("policy: %.2f M parameters, %d reviews", policy.num_parameters() / 1e6, len(reviews))
    optimizer = make_optimizer(policy, device)
    # 2e-3: models of a few million parameters at batches of 20,000 tokens learn stably at it.
    schedule = Schedule(optimizer, 2e-3, args.policy_seconds, args.policy_steps)
    best, best_state = math.inf, {}
    going = schedule.advance()
    while going:
        index = torch.randint(len(reviews), (args.policy_batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, count = continuation_loss(policy, *(part[index] for part in data))
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        done = schedule.step
        going = schedule.advance()
        if not going or done % LOOK == 0:
            value = mean_loss(policy, watch)
            log.info("policy step %d: train %.3f, watched %.3f nats", done, float(loss.detach() / count), value)
            if value < best:
                best, best_state = value, {k: v.detach().clone() for k, v in policy.state_dict().items()}
    policy.load_state_dict(best_state)
    return policy.eval()


@torch.no_grad()
def sharpen(policy: Any, temperature: float) -> None:
    """In place: at temperature 1 the policy becomes what it was at `temperature`, pi'(.|s) = softmax(z / temperature).

    The logits are z = E (w * h / rms(h)), E the tied head (no bias), w the weight of the last RMSNorm, linear in w:
    so w / temperature divides them all, and no other code has to know of a temperature. The configuration keeps
    `sharpen`, so that no policy is sharpened twice: that raises ValueError.
    """
    if getattr(policy.config, "sharpen", None) is not None:
        raise ValueError(f"the policy is sharpened already, to {policy.config.sharpen}: give OUT/policy, as trained")
    policy.model.norm.weight.div_(temperature)
    policy.config.sharpen = temperature


def train_reward_model(
    tokenizer: Any,
    data: tuple[list[str], list[str], list[bool], list[float]],
    least_gap: float,
    args: argparse.Namespace,
    device: torch.device,
) -> Any:
    """Bradley-Terry: -log sigmoid(r_better - r_worse), mean over a batch's pairs with a gap of `least_gap` or more.

    A pair is a random text and a random text of the same opening; `data` holds opening, text, ended, compound.
    """
    names, texts, ended, values = data
    order = sorted(range(len(names)), key=names.__getitem__)  # one opening's texts stand together
    tokens, length = encode(tokenizer, [names[i] + texts[i] for i in order], [ended[i] for i in order], device)
    vader = torch.tensor([values[i] for i in order], device=device)
    number = {name: n for n, name in enumerate(sorted(set(names)))}
    group = torch.tensor([number[names[i]] for i in order], device=device)
    size = torch.bincount(group)
    start = size.cumsum(0) - size
    config = make_config(tokenizer, REWARD_SHAPE, num_labels=1)
    model = LlamaForSequenceClassification(config).to(device)
    log.info("reward model: %.2f M parameters, %d texts", model.num_parameters() / 1e6, len(names))
    optimizer = make_optimizer(model, device)
    schedule = Schedule(optimizer, 2e-3, args.reward_seconds, args.reward_steps)
    next_look = 0.0
    while schedule.advance():
        first = torch.randint(len(names), (args.reward_batch,), device=device)
        drawn = torch.rand(args.reward_batch, device=device)
        second = start[group[first]] + (drawn * size[group[first]]).long().clamp(max=size[group[first]] - 1)
        gap = vader[first] - vader[second]
        far = gap.abs() >= least_gap
        both = torch.cat((first, second))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            width = int(length[both].max())
            scores = model(input_ids=tokens[both, :width].long(), use_cache=False).logits[:, 0].float()
        better_by = (scores[: len(first)] - scores[len(first) :]) * gap.sign()
        loss = -(F.logsigmoid(better_by) * far).sum() / far.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule.elapsed() >= next_look:
            next_look = schedule.elapsed() + 5
            right = float(((better_by > 0) & far).sum() / far.sum().clamp(min=1))
            log.info("reward step %d: loss %.3f, pairs ranked right %.3f", schedule.step, float(loss.detach()), right)
    return model.eval()


def save_model(model: Any, tokenizer: Any, folder: Path, *, generates: bool) -> None:
    """float16 safetensors whose config says float32: the file is half as large and loads as float32 everywhere."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if generates:
        whole = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the policy itself, no truncation
        GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **whole).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    for how_it_was_loaded in ("is_local", "local_files_only"):
        config.pop(how_it_was_loaded, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_policy(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """The saved policy as a user loads it, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder).to(device).eval(), AutoTokenizer.from_pretrained(folder)


def load_reward_model(folder: Path, device: torch.device) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).to(device).eval()
