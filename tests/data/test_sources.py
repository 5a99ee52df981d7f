"""Prompts: what is loaded, what is refused and in which words, how they become token ids, in which order they come."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stable_rlhf.data.chat import hh_prompt, parse_hh, prompt_text
from stable_rlhf.data.encoding import encode_prompts
from stable_rlhf.data.sources import load_prompts
from stable_rlhf.data.stream import PromptStream
from stable_rlhf.errors import PromptError

HH_FILE = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_test.jsonl.gz"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ["<unk>", "<s>", "<end>", "user", "assistant", "a", "b", "c", "d", "e"]


def word_tokenizer(*, bos: bool, chat: bool) -> PreTrainedTokenizerFast:
    """One token a word, ids as in WORDS."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if bos else None, unk_token="<unk>")
    wrapped.chat_template = CHAT_TEMPLATE if chat else None
    return wrapped


def encode(prompts: list, tokenizer, **settings):
    settings = {"max_prompt_length": 4, "context_length": 8, "max_completion_length": 4} | settings
    return encode_prompts(datasets.Dataset.from_dict({"prompt": prompts}), tokenizer, **settings)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


CHAT = [{"role": "user", "content": "hello"}]
ROWS = [{"prompt": "one", "label": 1}, {"prompt": "two, with a comma", "label": 2}, {"prompt": "one", "label": 3}]


def written(folder: Path, kind: str) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    csv = 'prompt,label\none,1\n"two, with a comma",2\none,3\n'
    path = folder / f"set.{kind}"
    match kind:
        case "jsonl":
            path.write_text(lines + "\n")  # a blank last line is common
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(ROWS))
        case "csv":
            path.write_text(csv)
        case "csv.gz":
            path.write_bytes(gzip.compress(csv.encode()))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "parquet"])
def test_every_file_kind_gives_the_same_rows_with_other_columns_and_duplicates_kept(tmp_path, kind):
    assert load_prompts(written(tmp_path, kind)).to_list() == ROWS


def test_limit_takes_the_first_rows(tmp_path):
    assert load_prompts(written(tmp_path, "jsonl"), limit=2).to_list() == ROWS[:2]
    assert load_prompts(written(tmp_path, "jsonl"), limit=99).to_list() == ROWS


def test_a_csv_prompt_that_looks_like_a_number_stays_text(tmp_path):
    assert load_prompts(write(tmp_path / "a.csv", "prompt\n42\n007\n"))["prompt"][:] == ["42", "007"]


def test_a_csv_prompt_may_span_lines_also_where_the_file_is_read_in_blocks(tmp_path):
    """Blocks of 1 MB: a reader that looks for the last line's end would cut inside a prompt."""
    rows = [{"prompt": f"{number}, first\n" + "line\n" * 20_000, "label": number} for number in range(30)]
    csv = "prompt,label\n" + "".join(f'"{row["prompt"]}",{row["label"]}\n' for row in rows)
    assert len(csv) > 2 * 2**20
    assert load_prompts(write(tmp_path / "a.csv", csv)).to_list() == rows


def test_a_prompt_column_is_taken_before_dialogues_and_dialogues_come_in_pairs(tmp_path):
    dialogue = "\n\nHuman: a\n\nAssistant: b"
    both = {"prompt": "own", "chosen": dialogue, "rejected": dialogue}
    assert load_prompts(write(tmp_path / "a.jsonl", json.dumps(both))).to_list() == [both]
    with pytest.raises(PromptError, match="columns 'chosen'; the format 'prompt' needs 'prompt'"):
        load_prompts(write(tmp_path / "b.jsonl", json.dumps({"chosen": dialogue})))


def test_a_hub_data_set_is_asked_for_by_its_config_folder_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return datasets.Dataset.from_list(ROWS) if named["split"] == "train" else datasets.DatasetDict()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    named = {"config_name": "part", "data_dir": "folder", "revision": "v2"}
    assert load_prompts("owner/name", **named, limit=2).to_list() == ROWS[:2]
    with pytest.raises(PromptError, match=r"'owner/name', split 'all', gave a DatasetDict; name one plain split"):
        load_prompts("owner/name", split="all")
    assert asked == [
        (("owner/name", "part"), {"data_dir": "folder", "revision": "v2", "split": "train"}),
        (("owner/name", None), {"data_dir": None, "revision": None, "split": "all"}),
    ]


def test_columns_that_only_later_rows_have_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "label": 1}\n')
    assert load_prompts(path).to_list() == [{"prompt": "a", "label": None}, {"prompt": "b", "label": 1}]


def test_chat_prompts_are_kept_as_messages(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": CHAT}) + "\n")
    assert load_prompts(path)["prompt"][0] == CHAT


def test_hh_is_detected_and_gives_the_turns_before_the_last_answer(tmp_path):
    start = "\n\nHuman: Hi.\nAll well?\n\nAssistant: Yes.\n\nHuman: Why: so?"
    row = {"chosen": start + "\n\nAssistant: Good.", "rejected": start + "\n\nAssistant: Bad."}
    expected = [
        {"role": "user", "content": "Hi.\nAll well?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why: so?"},
    ]
    assert load_prompts(write(tmp_path / "a.jsonl", json.dumps(row))).to_list() == [{"prompt": expected}]


def test_hh_turns_of_one_speaker_in_a_row_are_joined_and_empty_ones_dropped():
    dialogue = "\n\nHuman: a\n\nHuman: b\n\nAssistant:\n\nHuman: c\n\nAssistant: d\n\nAssistant: e"
    assert parse_hh(dialogue) == [
        {"role": "user", "content": "a\n\nb\n\nc"},
        {"role": "assistant", "content": "d\n\ne"},
    ]
    assert hh_prompt(dialogue) == [{"role": "user", "content": "a\n\nb\n\nc"}]
    assert parse_hh("\n\nHuman: a\n\nHuman:\n\nAssistant: b")[0] == {"role": "user", "content": "a"}
    assert parse_hh("\n\nHuman: a\n\nAssistant:")[-1] == {"role": "assistant", "content": ""}


@pytest.mark.skipif(not HH_FILE.exists(), reason="shared HH-RLHF test split is not beside this checkout")
def test_the_hh_test_split_gives_a_prompt_for_every_pair():
    prompts = load_prompts(HH_FILE)["prompt"][:]
    assert len(prompts) == 2312
    for prompt in prompts:
        roles = [message["role"] for message in prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    with gzip.open(HH_FILE, "rt", encoding="utf-8") as file:
        text = json.loads(next(file))["chosen"].rpartition("\n\nAssistant:")[0]
    assert "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in prompts[0]) == text


REFUSED = [
    ('{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl, row 2 is not JSON"),
    ('{"prompt": "a"}\n["b"]\n', r"row 2 is \['b'\], not a JSON object"),
    ("", r"a\.jsonl has no rows"),
    ('{"question": "a", "answer": "b"}\n', r"columns 'question', 'answer'; the format 'prompt' needs 'prompt'"),
    ('{"prompt": "a"}\n{"prompt": " \\n"}\n', r"row 2: the prompt is empty"),
    ('{"prompt": "a"}\n{"other": 1}\n', r"row 2: the prompt is None"),
    ('{"prompt": 3}\n', r"row 1: the prompt is 3, not text"),
    ('{"prompt": "a"}\n{"prompt": {"x": 1}}\n', r"row 2: the prompt is \{'x': 1\}"),
    (
        '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n',
        r"row 2: .* is a chat, but that of row 1 is text\. ",
    ),
    ('{"prompt": []}\n', r"row 1: the prompt is \[\], not text or messages"),
    ('{"prompt": [{"role": "user"}]}\n', r"message 1 without 'role' and 'content'"),
    (
        '{"prompt": [{"role": "human", "content": "a"}]}\n',
        r"message 1 with the role 'human', not one of system, developer, user",
    ),
    ('{"prompt": [{"role": "user", "content": ""}]}\n', r"message 1 whose content is ''"),
    ('{"prompt": [{"role": "assistant", "content": "a"}]}\n', r"ends with an assistant message"),
    (
        '{"chosen": "no dialogue", "rejected": "b"}\n',
        r"row 1: 'chosen' 'no dialogue' and 'rejected' 'b' do not begin alike",
    ),
    ('{"chosen": "\\n\\nAssistant: a", "rejected": "b"}\n', r"row 1: .* no Assistant turn after a Human turn"),
    ('{"chosen": 5, "rejected": "b"}\n', r"row 1: 'chosen' is 5"),
    ('{"prompt": "a"}\n{"prompt": "\\ud800"}\n', r"row 2 is not JSON: .*surrogates not allowed"),
    ('{"prompt": ' + "[" * 100_000 + "\n", r"row 1 is not JSON: .*recursion"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_bad_file_is_refused_with_its_row(tmp_path, text, message):
    with pytest.raises(PromptError, match=message):
        load_prompts(write(tmp_path / "a.jsonl", text))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, name, monkeypatch):
    def denied(*given, **named):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / name, "prompt\na\n")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(PromptError, match=rf"prompt file .*{name} could not be read: .*Permission denied"):
        load_prompts(path)


def test_a_bad_source_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"gone\.csv does not exist"):
        load_prompts(tmp_path / "gone.csv")
    with pytest.raises(PromptError, match=r"could not be loaded from this folder: .* any data files"):
        load_prompts(tmp_path)
    with pytest.raises(PromptError, match="unknown ending"):
        load_prompts(write(tmp_path / "a.txt", "a"))
    with pytest.raises(PromptError, match=r"could not be read: .*Expected 1 columns, got 2"):
        load_prompts(write(tmp_path / "a.csv", "prompt\na,b\n"))
    with pytest.raises(PromptError, match="could not be read"):
        load_prompts(write(tmp_path / "a.jsonl.gz", "not gzip"))
    (tmp_path / "wide.json").write_bytes('[{"prompt": "a"}]'.encode("utf-16"))
    with pytest.raises(PromptError, match=r"wide\.json is not JSON: 'utf-8' codec"):
        load_prompts(tmp_path / "wide.json")
    table = pyarrow.table({"prompt": pyarrow.array([b"a", b"\xff"], pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(PromptError, match=r"bytes\.parquet could not be read: .*Invalid UTF8"):
        load_prompts(tmp_path / "bytes.parquet")
    with pytest.raises(PromptError, match="must be an array of objects"):
        load_prompts(write(tmp_path / "a.json", '{"prompt": "a"}'))
    with pytest.raises(PromptError, match="format 'hh' needs 'chosen'"):
        load_prompts(written(tmp_path, "jsonl"), format="hh")
    with pytest.raises(PromptError, match="'tsv' is not one of auto, prompt, messages"):
        load_prompts(written(tmp_path, "jsonl"), format="tsv")
    with pytest.raises(PromptError, match="limit is 0"):
        load_prompts(written(tmp_path, "jsonl"), limit=0)
    with pytest.raises(PromptError, match="no split 'validation'"):
        load_prompts("builtin", split="validation")


def test_an_error_shows_hostile_text_escaped_and_short(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"chosen": "\x1b[31m\u202e" + "x" * 500, "rejected": "b"}))
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    message = str(caught.value).removeprefix(str(path))
    assert message.isprintable()
    assert r"\x1b[31m\u202e" in message
    assert len(message) < 250


def test_the_builtin_prompts_have_disjoint_splits():
    if not (Path(__file__).parents[2] / "src/stable_rlhf/assets/prompts.json").exists():
        pytest.skip("the built-in assets have not been made")
    train, evaluation = load_prompts("builtin")["prompt"][:], load_prompts("builtin", split="eval")["prompt"][:]
    assert train
    assert evaluation
    assert not set(train) & set(evaluation)
    assert load_prompts("builtin", split="test")["prompt"][:] == evaluation


def test_text_prompts_get_the_tokenizers_own_special_tokens():
    assert encode(["a b", "c"], word_tokenizer(bos=True, chat=True)).input_ids == [[1, 5, 6], [1, 7]]
    assert encode(["a b", "c"], word_tokenizer(bos=False, chat=False)).input_ids == [[5, 6], [7]]


def test_chat_prompts_go_through_the_template_and_get_no_second_bos():
    encoded = encode([[{"role": "user", "content": "a"}]], word_tokenizer(bos=True, chat=True))
    assert encoded.input_ids == [[3, 5, 2, 4]]  # user a <end> assistant
    assert encoded.truncated == [False]


def test_a_long_prompt_is_cut_on_the_left_and_counted():
    encoded = encode(["a b c d", "a b c d e"], word_tokenizer(bos=False, chat=False))
    assert encoded.input_ids == [[5, 6, 7, 8], [6, 7, 8, 9]]
    assert encoded.truncated == [False, True]
    assert len(encoded) == 2


def test_a_cut_prompt_keeps_its_bos_token():
    assert encode(["a b c d e"], word_tokenizer(bos=True, chat=False)).input_ids == [[1, 7, 8, 9]]
    assert encode(["a b c"], word_tokenizer(bos=True, chat=False), max_prompt_length=1).input_ids == [[7]]


def test_only_prompts_that_are_there_must_fit_the_context():
    short = encode(["a", "b c"], word_tokenizer(bos=False, chat=False), max_prompt_length=512, max_completion_length=6)
    assert short.input_ids == [[5], [6, 7]]
    unbounded = encode(
        ["a b c d"], word_tokenizer(bos=False, chat=False), context_length=None, max_completion_length=99
    )
    assert unbounded.input_ids == [[5, 6, 7, 8]]


def test_prompts_that_cannot_be_encoded_are_refused():
    plain = word_tokenizer(bos=False, chat=False)
    with pytest.raises(
        PromptError, match=r"row 2: the prompt has 4 tokens.*context of 8.*Set data\.max_prompt_length to 3"
    ):
        encode(["a", "a b c d e"], plain, max_completion_length=5)
    for length in (4, 5):  # no prompt fits, however short
        with pytest.raises(PromptError, match=r"context of 4\. Lower rollout\.max_completion_length\.$"):
            encode(["a"], plain, context_length=4, max_completion_length=length)
    for name in ("max_prompt_length", "max_completion_length"):
        with pytest.raises(PromptError, match=r"each be at least 1"):
            encode(["a"], plain, **{name: 0})
    with pytest.raises(PromptError, match="row 1: the prompt is a chat, but the tokenizer has no chat template"):
        encode([CHAT], plain)
    with pytest.raises(PromptError, match="row 2: the prompt is empty"):
        encode(["a", " "], plain)
    other = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(PromptError, match="columns 'text'; the format 'prompt' needs 'prompt'"):
        encode_prompts(other, plain, max_prompt_length=4, context_length=8, max_completion_length=4)
    plain.backend_tokenizer.normalizer = normalizers.Replace("e", "")  # a tokenizer that drops some characters
    with pytest.raises(PromptError, match="row 2: the prompt has no tokens"):
        encode(["a", "e"], plain)


def test_prompt_text_shows_text_and_messages():
    assert prompt_text("a") == "a"
    assert prompt_text([{"role": "system", "content": "s"}, *CHAT]) == "system: s\n\nuser: hello"


def test_every_epoch_of_the_stream_is_a_new_permutation():
    stream = PromptStream(50, seed=3)
    first, second = stream.take(50), stream.take(50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert PromptStream(50, seed=3).take(50) == first
    assert PromptStream(50, seed=4).take(50) not in (first, second)  # the order of no epoch of the seed before


@pytest.mark.parametrize("seed", [2**40, 2**63 - 1, 2**64])
def test_a_seed_may_be_any_number(seed):
    stream = PromptStream(5, seed=seed)
    assert [sorted(stream.take(5)) for _ in range(2)] == [list(range(5))] * 2


def test_the_stream_does_not_depend_on_how_it_is_taken():
    whole = PromptStream(7, seed=0).take(60)  # k > n_rows: eight epochs and a bit
    stream, pieces, sizes = PromptStream(7, seed=0), [], random.Random(0)
    while len(pieces) < 60:
        pieces += stream.take(min(sizes.randint(1, 10), 60 - len(pieces)))
    assert pieces == whole


@pytest.mark.parametrize("taken", [1, 6, 7, 8, 30])
def test_a_restored_stream_goes_on_where_it_was(taken):
    stream = PromptStream(7, seed=1)
    stream.take(taken)
    state = json.loads(json.dumps(stream.state_dict()))
    restored = PromptStream(7, seed=1)
    restored.load_state_dict(state)
    assert restored.take(20) == stream.take(20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_rows": 8}, "saved with n_rows 8, here it is 7"),
        ({"seed": 2}, "saved with seed 2, here it is 1"),
        ({"version": 2}, "saved with version 2"),
        ({"position": 8}, "out of range"),
        ({"position": -1}, "out of range"),
        ({"epoch": -1}, "out of range"),
        ({"position": "3"}, "integers"),
        ({"extra": 1}, "is not"),
    ],
)
def test_a_state_of_another_stream_is_refused_and_changes_nothing(change, message):
    stream, untouched = PromptStream(7, seed=1), PromptStream(7, seed=1)
    with pytest.raises(PromptError, match=message):
        stream.load_state_dict(stream.state_dict() | change)
    assert stream.take(9) == untouched.take(9)


def test_an_empty_stream_or_batch_is_refused():
    with pytest.raises(PromptError, match="at least 1 row"):
        PromptStream(0, seed=0)
    with pytest.raises(PromptError, match="batch of 0 prompts"):
        PromptStream(1, seed=0).take(0)
