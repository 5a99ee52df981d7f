"""Scoring: what reward functions receive, how their answers become scores, and which answers are refused."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from stable_rlhf.errors import Exit, RewardError, RewardInputError
from stable_rlhf.rewards.functions import RewardFunction, resolve_reward
from stable_rlhf.rewards.model import RewardModel
from stable_rlhf.rewards.scorer import Scorer

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghij", "Human:", "Assistant:", "user", "assistant"]
END = WORDS.index("</s>")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
CHAT = [{"role": "user", "content": "a b"}]


def named(**functions) -> list[RewardFunction]:
    return [RewardFunction(name=name, function=function) for name, function in functions.items()]


def score(functions, prompts=("a", "b"), completions=("x", "yy"), columns=None, ended=(True, True), **settings):
    return Scorer(functions, **settings).score(list(prompts), list(completions), columns or {}, list(ended))


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def word_tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, ids as in WORDS; the pad token is the end token."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = CHAT_TEMPLATE if chat else None
    return wrapped


def tiny_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": END, "pad_token_id": END, "num_labels": 1}
    # The initial weights are large enough that every token moves the score.
    limits = {"max_position_embeddings": 12, "initializer_range": 0.5}
    return LlamaConfig(**(sizes | settings | limits | changes))


def tiny_model(**changes) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_config(**changes))


@torch.no_grad()
def alone(model, ids: list[int]) -> float:
    """The oracle: the head applied to the last state before the end tokens, of one unpadded sequence."""
    last = max(index for index, token in enumerate(ids) if token != END)
    state = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, last]
    return float(sum(a * b for a, b in zip(state.tolist(), model.score.weight[0].tolist(), strict=True)))


def test_functions_receive_texts_and_columns_by_name():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0, 1.0]

    score(named(spy=spy), columns={"label": [3, 4]})
    assert seen == {"prompts": ["a", "b"], "completions": ["x", "yy"], "label": [3, 4]}


def test_chat_prompts_come_with_chat_completions():
    seen = {}

    def spy(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [0.0]

    score(named(spy=spy), prompts=[CHAT], completions=["x"], ended=[True])
    assert seen == {"prompts": [CHAT], "completions": [[{"role": "assistant", "content": "x"}]]}


def test_total_is_the_weighted_sum_minus_the_penalty_of_unfinished_samples():
    functions = named(length=length, constant=lambda prompts, completions: [10.0, 20.0])
    scores = score(functions, ended=[True, False], weights=[2.0, 0.5], missing_eos_penalty=1.5)
    assert scores.total == [2 * 1 + 0.5 * 10, 2 * 2 + 0.5 * 20 - 1.5]
    assert scores.valid == [True, True]
    assert scores.per_function == {"length": [1.0, 2.0], "constant": [10.0, 20.0]}


def test_a_function_that_returns_none_leaves_a_sample_to_the_others():
    functions = named(length=length, some=lambda prompts, completions: [None, 5])
    scores = score(functions, completions=("xyz", "yy"), ended=[False, True], missing_eos_penalty=1.0)
    assert scores.total == [3 - 1, 2 + 5]
    assert scores.valid == [True, True]
    assert scores.per_function["some"] == [None, 5.0]


def test_a_sample_that_no_function_scores_is_invalid_and_has_no_penalty():
    functions = named(first=lambda prompts, completions: [None, 3], second=lambda prompts, completions: [None, None])
    scores = score(functions, ended=[False, False], missing_eos_penalty=1.0)
    assert (scores.total, scores.valid) == ([0.0, 2.0], [False, True])


def test_a_sample_scored_only_with_weight_0_has_the_reward_0():
    functions = named(watched=lambda prompts, completions: [7, 7], some=lambda prompts, completions: [None, 5])
    scores = score(functions, weights=[0.0, 1.0])
    assert (scores.total, scores.valid) == ([0.0, 5.0], [True, True])


def test_a_batch_without_any_score_is_an_error():
    functions = named(first=lambda prompts, completions: [None, None], second=lambda prompts, completions: [None] * 2)
    with pytest.raises(RewardError, match=r"none of 2 samples was scored by any reward \(first, second\)"):
        score(functions)


@pytest.mark.parametrize(
    "values", [(1, 2.0), [True, 2], np.array([1, 2]), torch.tensor([1.0, 2.0]), [np.float32(1), torch.tensor(2)]]
)
def test_numbers_of_every_usual_kind_are_accepted(values):
    assert score(named(f=lambda prompts, completions: values)).total == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"'f' returned 1 scores; it must return a list of 2 scores"),
        (3.0, r"'f' returned a float; it must return a list"),
        (None, r"'f' returned None"),
        ([1.0, math.nan], r"'f' returned nan for sample 2, whose prompt is 'b'"),
        ([1.0, -1.1e30], r"'f' returned -1\.1e\+30 for sample 2, .* at most 1e30 in size"),
        ([-math.inf, 1.0], r"'f' returned -inf for sample 1, whose prompt is 'a'"),
        ([1.0, "2"], r"'f' returned '2' for sample 2"),
        ([1.0, [2.0]], r"'f' returned \[2\.0\] for sample 2"),
    ],
)
def test_answers_that_are_no_scores_are_refused(values, message):
    with pytest.raises(RewardError, match=message):
        score(named(f=lambda prompts, completions: values))


def test_a_function_that_raises_is_named_with_its_prompt_and_cause():
    def broken(prompts, completions):
        raise KeyError("gold")

    with pytest.raises(RewardError, match=r"'broken' raised KeyError: .*gold.* on 2 samples, .* '\\x1b\[2Ja") as caught:
        score(named(broken=broken), prompts=["\x1b[2Ja" + "b" * 5000, "b"])
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 350


def test_a_function_that_loads_its_model_only_when_called_fails_as_a_reward_not_as_a_setting():
    """Training has begun by then, so that the exit code is the one after which a run can be resumed."""

    def late(prompts, completions):
        resolve_reward("tests.no_such:f")

    with pytest.raises(RewardError, match=r"importing 'tests\.no_such'") as caught:
        score(named(late=late))
    assert not isinstance(caught.value, RewardInputError)
    assert caught.value.exit_code == Exit.REWARD


ASKS = "asks for 'answer', which is no column of the data set"


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda prompts, completions: [0, 0], r"'f' does not take 'label', which is a column .* with \*\*columns"),
        (lambda completions, **columns: [0, 0], None),
        (lambda completions, label: [0, 0], r"'f' does not take 'prompts', which is an argument of every reward: "),
        (lambda prompts, completions, answer, **columns: [0, 0], rf"'f' {ASKS}: .* it has 'label'\. Add the column"),
        (lambda prompts, completions, *, labels, **columns: [0, 0], r"'labels', which .* \(did you mean 'label'\?\)"),
        (lambda prompts, completions, answer=None, **columns: [0, 0], None),
        (functools.partial(lambda answer, prompts, completions, **columns: [0, 0], answer=3), None),
        (
            lambda prompts, completions, **columns: columns["answer"],
            r"KeyError: .* columns \('label'\), and re",
        ),
    ],
)
def test_a_function_and_a_data_set_that_do_not_fit_are_told_what_is_missing_where(function, sentence):
    """Before the first step too, unless only the call shows it."""
    scorer = Scorer(named(f=function))
    if sentence is None:
        scorer.check_columns(["label"])
        assert score(named(f=function), columns={"label": [1, 2]}).total == [0, 0]
        return
    with pytest.raises(RewardError, match=sentence) as caught:
        score(named(f=function), columns={"label": [1, 2]})
    if "KeyError" not in sentence:
        with pytest.raises(RewardInputError) as early:
            scorer.check_columns(["label"])
        assert str(early.value) == str(caught.value)


def test_a_decorator_may_add_what_a_function_asks_for():
    def answered(prompts, completions, answer):
        return [float(answer)] * len(prompts)

    @functools.wraps(answered)
    def wrapped(prompts, completions, **columns):
        return answered(prompts, completions, answer=7)

    Scorer(named(f=wrapped)).check_columns([])
    assert score(named(f=wrapped)).total == [7, 7]


def test_a_function_that_changes_its_arguments_does_not_change_the_next_one():
    def greedy(prompts, completions, label):
        prompts.clear(), completions.clear(), label.clear()
        return [0, 0]

    functions = named(greedy=greedy, length=lambda prompts, completions, label: [len(c) for c in completions])
    assert score(functions, columns={"label": [1, 2]}).per_function["length"] == [1.0, 2.0]


def test_async_functions_run_at_the_same_time_and_keep_their_place():
    meeting = {}

    async def first(prompts, completions):
        meeting["event"] = asyncio.Event()
        await asyncio.wait_for(meeting["event"].wait(), timeout=10)  # only the second function sets it
        return [1, 1]

    class Second:
        async def __call__(self, prompts, completions):
            meeting["event"].set()
            return [3, 3]

    functions = named(first=first, plain=lambda prompts, completions: [2, 2], second=Second())
    scores = score(functions, weights=[1, 10, 100])
    assert scores.total == [321.0, 321.0]
    assert list(scores.per_function) == ["first", "plain", "second"]


def test_async_functions_work_inside_a_running_loop():
    async def constant(prompts, completions):
        await asyncio.sleep(0)
        return [1, 2]

    async def notebook():
        return score(named(constant=functools.partial(constant))).total

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_an_async_function_that_raises_is_named():
    async def server(prompts, completions):
        raise ConnectionError("refused")

    with pytest.raises(RewardError, match=r"'server' raised ConnectionError: 'refused'") as caught:
        score([*named(length=length), *named(server=server)])
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_equal_names_get_a_number():
    functions = [*named(f=length), *named(f=length), *named(f=length)]
    assert Scorer(functions).names == ["f", "f-2", "f-3"]
    assert score(functions).total == [3.0, 6.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0, 2.0]}, r"reward\.weights must be 1 finite numbers, one for each reward; got \[1\.0, 2\.0\]"),
        ({"weights": [math.nan]}, r"reward\.weights"),
        ({"missing_eos_penalty": -1.0}, r"reward\.missing_eos_penalty must be finite and at least 0, got -1\.0"),
        ({"missing_eos_penalty": math.inf}, r"reward\.missing_eos_penalty"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(RewardError, match=message):
        Scorer(named(length=length), **settings)


def test_calls_that_cannot_be_meant_are_refused():
    with pytest.raises(RewardError, match="no reward function"):
        Scorer([])
    with pytest.raises(ValueError, match=r"2 prompts to score, but \{'completions': 1\}"):
        score(named(length=length), completions=["x"])
    with pytest.raises(ValueError, match=r"'label': 3"):
        score(named(length=length), columns={"label": [1, 2, 3]})
    with pytest.raises(ValueError, match="0 prompts"):
        score(named(length=length), prompts=[], completions=[], ended=[])
    with pytest.raises(RewardError, match="column 'completions' has the name of a reward argument"):
        score(named(length=length), columns={"completions": ["", ""]})


def test_a_callable_is_named_after_itself():
    assert resolve_reward(length).name == "length"
    assert resolve_reward(length, name="size").name == "size"
    assert resolve_reward(functools.partial(functools.partial(length))).name == "length"


def test_an_import_path_is_imported_from_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("LIMIT = 3\ndef brevity(prompts, completions):\n    return [7.0, 8.0]\n")
    (tmp_path / "broken_rewards.py").write_text("import there_is_no_such_module\n")
    reward = resolve_reward("my_rewards:brevity")
    assert reward.name == "brevity"
    assert score([reward]).total == [7.0, 8.0]
    with pytest.raises(RewardError, match="'my_rewards' has no 'length'"):
        resolve_reward("my_rewards:length")
    with pytest.raises(RewardError, match="is an int, which cannot be called"):
        resolve_reward("my_rewards:LIMIT")
    with pytest.raises(RewardError, match=r"importing 'broken_rewards' .*No module named 'there_is_no_such_module'"):
        resolve_reward("broken_rewards:f")
    with pytest.raises(RewardError, match=r"importing 'missing_rewards' .*No module named 'missing_rewards'"):
        resolve_reward("missing_rewards:f")


def test_a_spec_that_is_nothing_known_is_refused():
    for spec in (3, None, "", ["a"]):
        with pytest.raises(RewardError, match="neither a callable, a model, a name nor a path"):
            resolve_reward(spec)


def samples(count: int) -> tuple[list[str], list[str]]:
    """Random texts of 1 to 12 words; every third ends with the end token, which is also the pad token."""
    draw = random.Random(0)
    prompts = [" ".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) + " " for _ in range(count)]
    completions = [" ".join(draw.choices("abcdefghij", k=draw.randint(1, 4))) + " </s>" * (i % 3) for i in range(count)]
    return prompts, completions


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_score_depends_on_its_own_text_only(batch_size):
    model, tokenizer = tiny_model(), word_tokenizer()
    prompts, completions = samples(10)
    expected = [alone(model, tokenizer(p + c)["input_ids"]) for p, c in zip(prompts, completions, strict=True)]
    scores = RewardModel(model, tokenizer, batch_size=batch_size)(prompts, completions)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 2) for value in scores}) == 10
    back = RewardModel(model, tokenizer, batch_size=batch_size)(prompts[::-1], completions[::-1])
    assert back == pytest.approx(expected[::-1], abs=1e-5)


def test_a_tokenizer_that_pads_otherwise_than_the_model_changes_nothing():
    model, tokenizer = tiny_model(), word_tokenizer()
    prompts, completions = samples(10)
    expected = RewardModel(model, tokenizer)(prompts, completions)
    tokenizer.pad_token, tokenizer.padding_side = "j", "left"
    assert RewardModel(model, tokenizer)(prompts, completions) == pytest.approx(expected, abs=1e-5)


def test_a_model_without_pad_token_gets_the_tokenizers():
    model, reference = tiny_model(pad_token_id=None), tiny_model()
    prompts, completions = samples(10)
    expected = RewardModel(reference, word_tokenizer())(prompts, completions)
    assert RewardModel(model, word_tokenizer())(prompts, completions) == pytest.approx(expected, abs=1e-5)
    bare = word_tokenizer()
    bare.pad_token = bare.eos_token = None
    with pytest.raises(RewardError, match="neither model nor tokenizer has a pad"):
        RewardModel(tiny_model(pad_token_id=None), bare)


def test_dropout_is_off():
    model = tiny_model(attention_dropout=0.5).train()
    reward = RewardModel(model, word_tokenizer())
    assert reward(["a b"], [" c d"]) == reward(["a b"], [" c d"])


def test_samples_are_read_as_the_documentation_says():
    human, answer, user, assistant = map(WORDS.index, ("Human:", "Assistant:", "user", "assistant"))
    templated = RewardModel(tiny_model(), word_tokenizer(bos=True, chat=True))
    plain = RewardModel(tiny_model(), word_tokenizer(bos=True))
    assert templated.encode(["a b"], [" c"]) == plain.encode(["a b"], [" c"]) == [[1, 3, 4, 5]]
    for completion in ("c", [{"role": "assistant", "content": "c"}]):
        assert templated.encode([CHAT], [completion]) == [[user, 3, 4, END, assistant, 5, END]]  # no second BOS
        assert plain.encode([CHAT], [completion]) == [[1, human, 3, 4, answer, 5]]


def test_long_samples_are_cut_on_the_left_and_keep_their_special_tokens():
    assert RewardModel(tiny_model(), word_tokenizer(), max_length=3).encode(["a b c "], ["d e"]) == [[5, 6, 7]]
    assert RewardModel(tiny_model(), word_tokenizer(bos=True), max_length=3).encode(["a b c "], ["d e"]) == [[1, 6, 7]]
    limited = RewardModel(tiny_model(), word_tokenizer()).encode(["a " * 20], ["b"])
    assert limited == [[3] * 11 + [4]]  # 12 is the model's own limit


def test_the_callers_tokenizer_is_left_as_it_was():
    tokenizer = word_tokenizer()
    tokenizer.truncation_side = "right"
    RewardModel(tiny_model(), tokenizer, max_length=2)(["a b c"], ["d"])
    assert tokenizer.truncation_side == "right"
    assert tokenizer("a b c d")["input_ids"] == [3, 4, 5, 6]


def test_an_empty_sample_is_refused():
    with pytest.raises(RewardError, match="sample 2 has no tokens"):
        RewardModel(tiny_model(), word_tokenizer())(["a", ""], ["b", ""])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-reward"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_a_saved_model_scores_as_before(saved):
    reward = resolve_reward(saved)
    prompts, completions = samples(6)
    assert reward.name == "tiny-reward"
    assert reward.function(prompts, completions) == RewardModel(tiny_model(), word_tokenizer())(prompts, completions)
    assert not any(parameter.requires_grad for parameter in reward.function.model.parameters())


def test_a_bfloat16_model_gives_scores_that_are_not_rounded_to_bfloat16(saved):
    reward = resolve_reward(saved, dtype=torch.bfloat16, batch_size=1).function
    prompts, completions = samples(10)
    expected = [alone(reward.model, ids) for ids in reward.encode(prompts, completions)]
    assert reward.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert reward(prompts, completions) == pytest.approx(expected, abs=1e-5)


def test_a_model_instance_needs_its_tokenizer():
    with pytest.raises(RewardError, match=r"LlamaForSequenceClassification needs its tokenizer"):
        resolve_reward(tiny_model())
    reward = resolve_reward(tiny_model(), tokenizer=word_tokenizer())
    assert reward.name == "LlamaForSequenceClassification"
    assert reward.function(["a"], [" b"]) == pytest.approx([alone(tiny_model(), [3, 4])], abs=1e-5)


def test_a_head_that_is_not_in_the_checkpoint_is_an_error(tmp_path):
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"lacks 1 weights \(score\.weight\): they would be random"):
        resolve_reward(tmp_path)


def test_a_model_with_several_outputs_is_refused(tmp_path):
    LlamaForCausalLM(tiny_config(num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"\(LlamaForCausalLM\) has 2 outputs, not num_labels=1"):
        resolve_reward(tmp_path)
    with pytest.raises(RewardError, match="has 3 outputs"):
        resolve_reward(tiny_model(num_labels=3), tokenizer=word_tokenizer())


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"could not be loaded: .*safetensors"):
        resolve_reward(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RewardError, match=r"could not be loaded: .*A reward is a sequence-classification model"):
        resolve_reward(tmp_path / "gone")


def test_a_long_log_is_copied_with_the_trainers_state_and_stays_apart() -> None:
    state = SimpleNamespace(log_history=[{"reward": 1.0}], stateful={"a": [1]})
    seen: list[Any] = []

    def changes(prompts, completions, trainer_state, **columns):
        seen.append(trainer_state)
        trainer_state.log_history[0]["reward"] = 2.0
        trainer_state.log_history.append({})
        trainer_state.stateful["a"].append(2)
        return [0.0] * len(prompts)

    scorer = Scorer([resolve_reward(changes)], trainer_state=lambda: state)
    scorer.score(["a"], ["b"], {}, [True])
    assert seen[0].log_history == [{"reward": 2.0}, {}]
    assert state == SimpleNamespace(log_history=[{"reward": 1.0}], stateful={"a": [1]})


def test_a_column_that_cannot_be_copied_is_named() -> None:
    scorer = Scorer([resolve_reward(lambda prompts, completions, **columns: [0.0])])
    with pytest.raises(RewardError, match=r"^the data set's column 'file' cannot be copied .*TypeError: cannot pickle"):
        scorer.score(["a"], ["b"], {"file": [threading.Lock()]}, [True])


@pytest.mark.parametrize("weights", [[1e300], [-2.0]])
def test_a_weighted_sum_has_the_bound_of_a_score(weights: list[float]) -> None:
    scorer = Scorer([resolve_reward(lambda prompts, completions, **columns: [1e30])], weights)
    with pytest.raises(RewardError, match=r"^a weighted sum of scores is .* in size, more than 1e\+30: lower reward\."):
        scorer.score(["a"], ["b"], {}, [True])
