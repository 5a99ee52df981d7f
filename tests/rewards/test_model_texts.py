"""The tokens that a reward model reads: one BOS, the end token where it is wanted, ids that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import LlamaForCausalLM

from stable_rlhf.config import RewardConfig
from stable_rlhf.errors import ConfigError, Exit, RewardError, RewardInputError
from stable_rlhf.rewards import make_scorer, resolve_reward
from stable_rlhf.rewards.model import RewardModel
from tests.rewards.test_scorer import CHAT, END, WORDS, named, score, tiny_config, tiny_model, word_tokenizer

BOS, PAD = WORDS.index("<s>"), WORDS.index("<unk>")
TEMPLATE = "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def encoded(prompt: Any, completion: str, *, bos: bool = True, template: str | None = TEMPLATE, **settings: Any) -> Any:
    tokenizer = word_tokenizer(bos=bos)
    tokenizer.chat_template = template
    return RewardModel(tiny_model(), tokenizer, **settings).encode([prompt], [completion])[0]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (CHAT, "c", "<s> user a b assistant c"),
        (CHAT, "c d e f g h i j a", "<s> d e f g h i j a"),  # 9 tokens and a BOS; cut to 9 in all
        ("a b c ", "d", "<s> a b c d"),
        ("a b c d e ", "f g h i j", "<s> c d e f g h i j"),
        ("<s> a ", "b", "<s> a b"),  # has a BOS already, and the tokenizer adds one
    ],
)
def test_a_text_has_one_bos_and_keeps_it_when_it_is_cut(prompt: Any, completion: str, expected: str) -> None:
    assert encoded(prompt, completion, max_length=9) == ids(expected)


def test_the_tokens_that_a_tokenizer_adds_at_both_ends_stay_when_a_text_is_cut() -> None:
    tokenizer = word_tokenizer()
    pieces = processors.TemplateProcessing(
        single="<s> <unk> $A </s>", special_tokens=[("<s>", 1), ("<unk>", 0), ("</s>", 2)]
    )
    tokenizer.backend_tokenizer.post_processor = pieces
    for append_eos in (False, True):
        model = RewardModel(tiny_model(), tokenizer, max_length=6, append_eos=append_eos)
        tail = "c d e </s>" if not append_eos else "d e </s>"
        assert model.encode(["a b "], ["c d e"])[0] == ids(f"<s> <unk> {tail}")


def test_a_text_without_bos_gets_none() -> None:
    assert encoded("a b ", "c", bos=False, max_length=2) == ids("b c")
    assert encoded(CHAT, "c", bos=False, template=TEMPLATE.removeprefix("<s> ")) == ids("user a b assistant c")


def test_where_there_is_room_for_one_token_it_is_the_last() -> None:
    assert encoded(CHAT, "c", max_length=1) == ids("c")
    assert encoded("a b ", "c", max_length=2) == ids("<s> c")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("c", "<s> a b c </s>"), ("c </s>", "<s> a b c </s>"), ("c d e f", "<s> c d e f </s>")],
)
def test_append_eos_ends_every_text_once_and_within_the_length(completion: str, expected: str) -> None:
    assert encoded("a b ", completion, append_eos=True, max_length=6) == ids(expected)


@torch.no_grad()
def last_token_score(model: Any, tokens: list[int]) -> float:
    """The oracle: the head on the state of the last token, of one unpadded sequence."""
    state = model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
    return float(sum(a * b for a, b in zip(state.tolist(), model.score.weight[0].tolist(), strict=True)))


def test_an_appended_end_token_is_the_one_that_is_read_though_it_is_the_pad_token() -> None:
    model, tokenizer = tiny_model(), word_tokenizer()
    texts = ["a", "b c d", "e f", "g"]
    expected = [last_token_score(model, [*ids(text), END]) for text in texts]
    for batch_size in (1, 4):
        scores = RewardModel(model, tokenizer, append_eos=True, batch_size=batch_size)(texts, [""] * 4)
        assert scores == pytest.approx(expected, abs=1e-5)
    assert RewardModel(tiny_model(), tokenizer)(texts, [""] * 4) != pytest.approx(expected, abs=1e-2)


def test_append_eos_needs_an_end_token() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RewardInputError, match=r"reward\.append_eos=true, but its tokenizer has no end token"):
        RewardModel(tiny_model(pad_token_id=PAD), tokenizer, append_eos=True)


@pytest.mark.parametrize("pad", [len(WORDS), len(WORDS) + 7, -1])
def test_a_pad_id_without_an_embedding_changes_no_score(pad: int) -> None:
    """The model as it was trained reads the last token, whichever it is: also an end token, and the ids near 0."""
    model, tokenizer = tiny_model(), word_tokenizer()
    model.config.pad_token_id = pad
    texts = ["a", "b c d <unk>", "e f </s>", "<s>", "g <s> h"]
    expected = [last_token_score(model, ids(text)) for text in texts]
    for batch_size in (1, 2, 5):
        scores = RewardModel(model, tokenizer, batch_size=batch_size)(texts, [""] * 5)
        assert scores == pytest.approx(expected, abs=1e-5)


def test_a_token_without_an_embedding_is_named_with_its_sample() -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(RewardError, match=rf"sample 2 has the token 'new', id {len(WORDS)}, but the model has"):
        RewardModel(tiny_model(), tokenizer)(["a ", "b "], ["c", "new"])


def test_a_template_that_refuses_a_chat_is_an_error_with_sample_and_remedy() -> None:
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    model = resolve_reward(tiny_model(), tokenizer=tokenizer, name="judge")
    with pytest.raises(
        RewardError, match=r"judge: its chat template refuses sample 1 \(TemplateError: no system role\).*Give prompts"
    ):
        score([model], prompts=[CHAT], completions=["c"], ended=[True])


def test_settings_that_no_reward_reads_are_refused() -> None:
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"reward\.append_eos=True: has no effect unless one of the rewards is a"):
        make_scorer(RewardConfig(append_eos=True), len, None, device)
    with pytest.raises(ConfigError, match=r"reward\.skip_special_tokens=False: has no effect unless"):
        make_scorer(RewardConfig(skip_special_tokens=False), tiny_model(), [word_tokenizer()], device)


def test_the_settings_of_texts_reach_the_rewards() -> None:
    settings = RewardConfig(append_eos=True, skip_special_tokens=False)
    scorer = make_scorer(settings, [tiny_model(), len], [word_tokenizer(), None], torch.device("cpu"))
    model, function = scorer.functions
    assert model.function.encode(["a "], ["b"]) == [ids("a b </s>")]
    assert (model.special_tokens, function.special_tokens, scorer.special_tokens) == (False, True, True)


# -- loading --------------------------------------------------------------------------------------------------------


def base_model(folder: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, num_labels: int = 1, save_head: bool = True) -> Any:
    """A LoRA reward model as TRL's RewardTrainer saves it; returns the model itself, not merged."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(2)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    kind = {"task_type": "SEQ_CLS"} if save_head else {}
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **kind))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    lora.save_pretrained(folder)
    return lora.eval()


def test_an_adapter_is_merged_and_scores_as_it_did_when_it_was_saved(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    trained = adapter(base, tmp_path / "adapter")
    texts, empty = ["a b ", "c d e ", "f "], ["g", "h i", "j"]
    expected = RewardModel(trained, word_tokenizer())(texts, empty)
    reward = resolve_reward(tmp_path / "adapter")
    assert reward.name == "adapter"
    assert not any("lora" in name for name, _ in reward.function.model.named_modules())
    assert reward.function(texts, empty) == pytest.approx(expected, abs=1e-5)
    with trained.disable_adapter():
        assert RewardModel(trained, word_tokenizer())(texts, empty) != pytest.approx(expected, abs=1e-3)


def test_an_adapter_that_cannot_be_a_reward_is_refused_by_a_sentence(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter(base, tmp_path / "headless", save_head=False)
    with pytest.raises(RewardInputError, match=r"'.*headless' lacks 1 weights \(score\.weight\)") as caught:
        resolve_reward(tmp_path / "headless")
    assert caught.value.exit_code == Exit.BAD_INPUT
    adapter(base, tmp_path / "two", num_labels=2)
    with pytest.raises(RewardInputError, match=r"two' could not be loaded: RuntimeError: Error.*size mismatch"):
        resolve_reward(tmp_path / "two")
    adapter(base, tmp_path / "lost")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(RewardInputError, match=r"'.*lost' is an adapter of '.*base', which could not be loaded: "):
        resolve_reward(tmp_path / "lost")
    (tmp_path / "lost" / "adapter_model.safetensors").rename(tmp_path / "lost" / "adapter_model.bin")
    with pytest.raises(RewardInputError, match=r"is an adapter without adapter_model\.safetensors"):
        resolve_reward(tmp_path / "lost")


def test_what_stands_in_the_way_of_loading_is_a_sentence_and_not_a_traceback(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(RewardInputError, match=r"needs its tokenizer, which could not be loaded from '.*Save it next"):
        resolve_reward(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RewardInputError, match=r"could not be loaded: SafetensorError: .*A reward is"):
        resolve_reward(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(RewardInputError, match=r"could not be loaded: .*A reward is"):
        resolve_reward(tmp_path / "model")


def test_a_model_object_takes_the_tokenizer_of_the_folder_it_came_from(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    tiny_model().save_pretrained(tmp_path / "judge")
    word_tokenizer().save_pretrained(tmp_path / "judge")
    reward = resolve_reward(LlamaForSequenceClassification.from_pretrained(tmp_path / "judge"))
    assert reward.name == "judge"
    assert reward.function(["a "], ["b"]) == resolve_reward(tmp_path / "judge").function(["a "], ["b"])


def test_a_script_that_exits_when_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "exits_at_import.py").write_text("raise SystemExit(2)\n")
    with pytest.raises(RewardInputError, match=r"importing 'exits_at_import' .* failed: SystemExit: 2"):
        resolve_reward("exits_at_import:f")


# -- errors while scoring -------------------------------------------------------------------------------------------


def test_an_error_names_the_line_of_the_function() -> None:
    import json

    def reads(prompts, completions):
        return [json.loads(text) for text in completions]

    line = reads.__code__.co_firstlineno + 1
    with pytest.raises(
        RewardError, match=rf"'reads' raised JSONDecodeError: .* in test_model_texts\.py, line {line} on"
    ):
        score(named(reads=reads))


def test_an_exit_a_group_and_a_cancellation_are_errors_of_the_reward() -> None:
    import asyncio

    def leaves(prompts, completions):
        raise SystemExit(3)

    async def groups(prompts, completions):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fails())

    async def fails() -> None:
        raise ConnectionError("refused")

    async def cancels(prompts, completions):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="'leaves' raised SystemExit: '3'"):
        score(named(leaves=leaves))
    with pytest.raises(RewardError, match="'groups' raised ConnectionError: 'refused'"):
        score(named(groups=groups))
    with pytest.raises(RewardError, match="'cancels' was cancelled"):
        score(named(cancels=cancels))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([10**400, 1], r"returned 1000.* for sample 1"),
        (torch.empty(2, device="meta"), r"raised NotImplementedError"),
        (iter([1, 2]), r"returned a list_iterator"),
        ({"a": 1, "b": 2}, r"returned a dict"),
        ("12", r"returned a str"),
        ([[1], [2]], r"returned \[1\] for sample 1"),
    ],
)
def test_more_answers_that_are_no_scores_are_refused(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=rf"'f' {message}"):
        score(named(f=lambda prompts, completions: values))
