"""The built-in pair: the rules that made it, and the files that ship, against oracles and literal numbers."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed: pip install 'stable-rlhf[sentiment]'")

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src" / "stable_rlhf" / "assets"
CPU = torch.device("cpu")

sys.path.append(str(ROOT / "scripts"))  # the scripts import one another by name
builder = importlib.import_module("build_builtin_models")
card = importlib.import_module("builtin_card")
figures = importlib.import_module("builtin_figures")
models = importlib.import_module("builtin_models")
text = importlib.import_module("builtin_text")
sys.path.remove(str(ROOT / "scripts"))


def review(opening: str, continuation: str, vader: float = 0.0):
    return text.Review(opening=opening, continuation=continuation, vader=vader)


@pytest.fixture(scope="module")
def shipped():
    """Policy, tokenizer and reward model as any user of Transformers loads them."""
    policy = AutoModelForCausalLM.from_pretrained(ASSETS / "policy").eval()
    reward = AutoModelForSequenceClassification.from_pretrained(ASSETS / "reward_model").eval()
    return policy, AutoTokenizer.from_pretrained(ASSETS / "policy"), reward


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[str]]:
    return json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))


# The texts


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        (" cold and wet. We left early. Then", " cold and wet. We left early."),  # the third sentence is not whole
        (" cold and wet. We left. We ate. We slept.", " cold and wet. We left."),  # two sentences at most
        (" cold and very wet.\nWe left early.", " cold and very wet."),  # one line only
        (" so cold and wet", None),  # no whole sentence
        (" too cold.", None),  # fewer than four words
        (" cold, wet & 9 euros.", None),  # other characters
        ("cold and wet again.", None),  # the continuation has to begin with its space
        (" cold and and wet.", None),  # a word twice in a row
        (" as cold as cold as cold can be.", None),  # three words twice
        (" a fine review of a room.", None),  # speaks of its task
        (" cold..", None),
    ],
)
def test_cleaning_keeps_one_or_two_whole_plain_sentences(raw, kept):
    assert text.clean("The room was", raw) == kept


def test_a_text_that_is_too_long_loses_its_second_sentence_before_it_is_dropped():
    numbers = " ".join(f"{'abcdefghijklmnopqrstuvwxyz'[n % 26]}{'xyz'[n // 26]}" for n in range(text.MAX_WORDS))
    assert text.clean("We", f" were cold and wet. {numbers}.") == " were cold and wet."
    assert text.clean("We", f" {numbers}.") is None


def test_rare_words_are_counted_once_a_review():
    kept = [review("We", " sat down."), review("We", " sat here."), review("We", " sat down here.")]
    odd = review("We", " sat zonk zonk zonk.")
    assert text.drop_rare([*kept, odd], 2) == kept


@pytest.mark.parametrize(
    ("compound", "place"), [(-1, 0), (-0.61, 0), (-0.6, 1), (-0.2, 2), (0.19, 2), (0.2, 3), (0.6, 4), (1, 4)]
)
def test_a_bin_begins_at_its_edge(compound, place):
    assert text.vader_bin(compound) == place


def test_balance_gives_the_largest_subset_with_the_shares_and_no_repeats():
    values = [-0.8] * 32 + [-0.4] * 100 + [0.0] * 100 + [0.4] * 100 + [0.8] * 100
    pool = [review("We", f" {n}.", value) for n, value in enumerate(values)]
    kept = text.balance(pool, random.Random(0))
    # 32 of the first bin are 16 %, so 200 in all.
    assert Counter(r.vader for r in kept) == {-0.8: 32, -0.4: 36, 0.0: 36, 0.4: 44, 0.8: 52}
    assert len(set(kept)) == 200
    with pytest.raises(ValueError, match="--sample-seconds"):
        text.balance([r for r in pool if r.vader != 0.4], random.Random(0))


def test_pairs_are_disjoint_of_one_opening_and_put_the_better_first():
    rng = random.Random(0)
    pool = [review(f"We {n % 7}", f" {n}.", rng.uniform(-1, 1)) for n in range(300)]
    pairs = text.disjoint_pairs(pool, 0.2, rng)
    members = [r for pair in pairs for r in pair]
    assert len(members) == len(set(members))
    assert all(a.opening == b.opening and a.vader - b.vader >= 0.2 for a, b in pairs)
    # |x - y| of two uniforms on (-1, 1) exceeds 0.2 with probability 0.9^2 = 0.81, of about 147 pairs.
    assert 0.81 * 147 - 20 < len(pairs) < 0.81 * 147 + 20


def test_a_cut_keeps_three_words_and_ends_without_a_full_stop():
    whole = review("We", " sat in the cold rain.")
    made = {text.cut_short(whole, random.Random(seed)) for seed in range(50)}
    assert made == {" sat in the", " sat in the cold", " sat in the cold rain"}


def test_openings_are_neutral_and_hold_the_right_article():
    made = text.openings()
    assert len({o.text for o in made}) == len(made)
    assert not [
        o.text for o in made if figures.compound(o.text) != 0 or re.search(r"\b(a [aeiou]|an (?!hour)[^aeiou])", o.text)
    ]


# The models


def test_encoding_is_bos_the_text_and_eos_where_asked(shipped):
    _, tokenizer, _ = shipped
    tokens, length = models.encode(tokenizer, ["The room was", "We"], [True, False], CPU)
    first, second = tokenizer("The room was")["input_ids"], tokenizer("We")["input_ids"]
    assert tokens.tolist() == [[*first, 2], second + [0] * (len(first) + 1 - len(second))]
    assert length.tolist() == [len(first) + 1, len(second)]
    assert first[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(first, skip_special_tokens=True) == "The room was"


def test_the_tokens_of_an_opening_are_a_prefix_or_the_review_is_refused(shipped):
    _, tokenizer, _ = shipped
    tokens, prompt, _ = models.encode_reviews(tokenizer, [review("The room was", " cold and wet.")], CPU)
    assert tokenizer.decode(tokens[0, : prompt[0]], skip_special_tokens=True) == "The room was"
    with pytest.raises(ValueError, match="no prefix"):
        models.encode_reviews(tokenizer, [review("The ro", "om was cold and wet.")], CPU)


def test_the_policy_loss_is_the_naive_mean_over_continuation_tokens(llama):
    torch.manual_seed(0)
    llama = llama.double().eval()
    tokens = torch.randint(3, 200, (5, 12))
    prompt, length = torch.tensor([2, 3, 1, 4, 2]), torch.tensor([12, 5, 2, 9, 7])
    total, count = 0.0, 0
    for row, start, end in zip(tokens, prompt.tolist(), length.tolist(), strict=True):
        logp = llama(input_ids=row[None, :end]).logits[0].log_softmax(-1)
        total -= sum(logp[t - 1, row[t]].item() for t in range(start, end))
        count += end - start
    # The loss is taken in float32, which rounds to 6e-8 of a few nats.
    assert models.mean_loss(llama, (tokens, prompt, length)) == pytest.approx(total / count, rel=1e-6)


def test_the_rate_warms_up_then_falls_by_a_cosine_and_the_steps_end_it():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = models.Schedule(optimizer, peak=2.0, seconds=1e9, steps=100)
    rates = []
    while schedule.advance():
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(rates) == 100
    assert rates[0] == pytest.approx(2 * 0.05, abs=1e-6)  # a twentieth of the peak
    assert rates[50] == pytest.approx(2 * (0.05 + 0.95 / 2), abs=1e-6)
    assert rates[99] == pytest.approx(2 * (0.05 + 0.95 * (1 + math.cos(0.99 * math.pi)) / 2), abs=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert not models.Schedule(optimizer, peak=2.0, seconds=1e-9, steps=100).advance()


def test_sampling_stops_at_eos_and_leaves_out_what_min_p_excludes(llama):
    llama = llama.double().eval()
    prompts = torch.full((64, 1), 1)
    torch.manual_seed(0)
    made = models.sample(llama, prompts, 12, temperature=1.0, min_p=0.3, eos=5)
    for row in made.tolist():
        ended = row.index(5) if 5 in row else len(row)
        assert set(row[ended:]) <= {5}
        probability = llama(input_ids=torch.tensor([[1, *row]])).logits[0].softmax(-1)
        for t, token in enumerate(row[: ended + 1]):
            assert probability[t, token] >= 0.3 * probability[t].max() * (1 - 1e-5)
    assert len({tuple(row) for row in made.tolist()}) > 1


def test_sharpening_is_a_temperature_and_happens_once(llama):
    llama = llama.double().eval()
    tokens = torch.randint(3, 200, (4, 9))
    before = llama(input_ids=tokens).logits.detach()
    models.sharpen(llama, 0.7)
    torch.testing.assert_close(
        llama(input_ids=tokens).logits.log_softmax(-1), (before / 0.7).log_softmax(-1), rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match=r"sharpened already, to 0\.7"):
        models.sharpen(llama, 0.7)


def test_a_sharpened_policy_is_recognised_after_it_was_saved(llama, tokenizer, tmp_path):
    models.sharpen(llama, 0.7)
    models.save_model(llama, tokenizer, tmp_path, generates=True)
    loaded, _ = models.load_policy(tmp_path, CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="sharpened already"):
        models.sharpen(loaded, 0.7)


def test_a_reward_model_of_another_build_needs_its_policy(capsys):
    with pytest.raises(SystemExit):
        builder.arguments(["--output", "out", "--reward-model", "old"])
    assert "--reward-model needs --policy" in capsys.readouterr().err


# The card and the archive


def test_the_card_names_no_path_of_a_machine():
    given = ["--texts", "/a/t.gz", "--policy=/a/p", "--reward-model", "/a/r", "--output", "/a/o", "--seed", "3"]
    assert card.command_line(given) == (
        "--texts OLD/texts.jsonl.gz --policy OLD/policy --reward-model OLD/reward_model --output OUT --seed 3"
    )


def test_the_archive_holds_what_the_build_made_and_has_the_same_bytes_each_time(tmp_path):
    folder = tmp_path / "assets"
    (folder / "policy").mkdir(parents=True)
    for name in ("README.md", "policy/config.json", "prompts.json", "report.html.j2"):
        (folder / name).write_text(name)
    builder.pack(folder, tmp_path / "a.tar")
    (folder / "README.md").touch()
    builder.pack(folder, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["README.md", "policy/config.json", "prompts.json"]


# What ships


def test_the_pair_is_small_and_holds_no_file_that_runs_code():
    files = [p for name in builder.MADE for p in [ASSETS / name, *(ASSETS / name).rglob("*")] if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".md", ".safetensors"}
    assert sum(p.stat().st_size for p in files) < 16_000_000


@pytest.mark.parametrize(("folder", "index"), [("policy", 0), ("reward_model", 2)])
def test_the_files_are_float16_and_load_as_float32(shipped, folder, index):
    with safe_open(ASSETS / folder / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118 - not a dict
    assert {p.dtype for p in shipped[index].parameters()} == {torch.float32}


def test_both_models_share_one_tokenizer():
    names = ("policy/tokenizer.json", "reward_model/tokenizer.json")
    assert len({(ASSETS / name).read_bytes() for name in names}) == 1


def test_the_shipped_policy_is_sharpened_and_samples_without_truncation(shipped):
    policy, _, _ = shipped
    assert policy.config.sharpen == models.SHARPEN
    whole = policy.generation_config
    assert (whole.do_sample, whole.temperature, whole.top_k, whole.top_p) == (True, 1.0, 0, 1.0)


def test_the_prompts_are_openings_and_none_is_in_both_sets(prompts):
    assert len(prompts["train"]) == len(set(prompts["train"])) == 1024
    assert len(prompts["eval"]) == len(set(prompts["eval"])) == 256
    assert not set(prompts["train"]) & set(prompts["eval"])
    assert {o.text for o in text.openings()} >= {*prompts["train"], *prompts["eval"]}


def test_the_policy_writes_whole_sentences_of_known_words_in_every_mood(shipped, prompts):
    policy, tokenizer, _ = shipped
    torch.manual_seed(0)
    made = [r.continuation for r in figures.policy_reviews(policy, tokenizer, prompts["eval"][:64], 128, seed=0)]
    assert sum(bool(re.fullmatch(r" [A-Za-z][A-Za-z ,.'!?-]*[.!?]", c)) for c in made) >= 0.97 * len(made)
    # A word of the texts is mostly one token (95 %), a made-up word takes several; letters at random would be near 0.
    spoken = [word for c in made for word in text.words(c)]
    whole = [len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1 for word in spoken]
    assert sum(whole) >= 0.92 * len(whole)
    mood = Counter(text.vader_bin(figures.compound(c)) for c in made)
    assert min(mood[0] + mood[1], mood[2], mood[3] + mood[4]) >= 0.08 * len(made)  # negative, neutral, positive


BETTER_AND_WORSE = (
    ("The room was", " clean and lovely. We loved it.", " dirty and awful. We hated it."),
    ("The food at the cafe was", " delicious and the staff were kind.", " disgusting and the staff were rude."),
    ("This film was", " wonderful from the first minute.", " a boring waste of time."),
    ("My new phone is", " great, I am very happy with it.", " terrible, I am very angry with it."),
    ("The waiter at the diner was", " friendly and funny.", " rude and angry."),
    ("We visited the museum and", " had a great time.", " had a horrible time."),
    ("The design of this lamp is", " beautiful.", " ugly."),
    ("I called the plumber and", " he was nice and helpful.", " he was mean and useless."),
    ("The concert was", " amazing and fun.", " bad and sad."),
    ("This book was", " the best gift I ever got.", " the worst gift I ever got."),
    ("The hotel was", " perfect. I would happily stay again.", " a nightmare. I would never stay again."),
    ("Our seats at the opera were", " excellent and comfortable.", " broken and uncomfortable."),
    ("The soup was", " tasty and warm. I enjoyed it.", " horrible and cold. I was sick."),
    ("My experience with the bank was", " good. I recommend it.", " bad. I lost all hope."),
    ("The end of the movie was", " a sweet and happy surprise.", " a stupid and painful mess."),
    ("For the price, this tent is", " a great deal.", " a terrible scam."),
    ("The ferry was", " safe and pleasant.", " dangerous and scary."),
    ("The tour guide said that", " we were a lovely group.", " we were a stupid group."),
    ("I took my son to the zoo and", " he loved it and smiled.", " he hated it and cried."),
    ("The coffee at the bistro is", " rich and really good.", " weak and really bad."),
)


def test_the_reward_model_ranks_clear_praise_above_clear_blame(shipped):
    _, tokenizer, reward = shipped
    for opening, better, worse in BETTER_AND_WORSE:
        scores = [
            reward(**tokenizer(opening + c, return_tensors="pt", return_token_type_ids=False)).logits.item()
            for c in (better, worse)
        ]
        assert scores[0] > scores[1] + 0.5, (opening, scores)  # half a deviation of the policy's samples


def test_the_card_gives_the_figures_before_and_after_sharpening_and_both_commands():
    written = (ASSETS / "README.md").read_text(encoding="utf-8")
    nats = [float(n) for n in re.findall(r"([0-9.]+) nats", written)]
    shown = [float(n) for n in re.findall(r"perplexity ([0-9.]+),", written)]
    assert shown == pytest.approx([math.exp(n) for n in nats], rel=0.002)  # nats are rounded to a thousandth
    assert len(shown) == 2
    assert shown[0] > shown[1]  # the sharpened policy fits held-out text worse, and the card says so
    assert f"divided by {models.SHARPEN}" in written
    assert len(re.findall(r"^    python scripts/build_builtin_models\.py --", written, re.MULTILINE)) == 2
    assert not re.search(r"[{}]|/work|/home|/tmp", written)
