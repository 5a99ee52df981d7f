"""A resume refuses another tokenizer, template, data set or reward by its content, and says which."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from stable_rlhf.data import encode_prompts
from stable_rlhf.errors import CheckpointError
from stable_rlhf.rewards import RewardFunction, Scorer
from stable_rlhf.training.fingerprints import SameInputs, reward_fingerprint
from tests.tiny_runs import PROMPTS, letters, settings, trainer


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(sum(completion.count(v) for v in "aeiou")) for completion in completions]


def inputs(tokenizer: Any, reward: Any = letters, accept: bool = False, **columns: list[Any]) -> SameInputs:
    data = datasets.Dataset.from_dict({"prompt": PROMPTS, "answer": PROMPTS, **columns})
    encoded = encode_prompts(data, tokenizer, max_prompt_length=9, context_length=None, max_completion_length=4)
    function = RewardFunction(name="letters", function=reward)
    given = [("train_dataset", data, encoded), ("eval_dataset", None, None)]
    return SameInputs(tokenizer, given, Scorer([function]), None, accept)


def test_the_same_inputs_are_accepted(tokenizer) -> None:
    inputs(copy.deepcopy(tokenizer)).load_state_dict(inputs(tokenizer).state_dict())
    inputs(tokenizer, extra=PROMPTS).load_state_dict(inputs(tokenizer).state_dict())  # nobody has read it until now


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"prompt": [*PROMPTS[:-1], "!?"]}, "its column 'prompt' has other values"),
        ({"prompt": PROMPTS[::-1]}, "its column 'prompt' has other values, or another order"),
        ({"answer": [*PROMPTS[:-1], "no"]}, "its column 'answer' has other values"),
        ({"prompt": [*PROMPTS, "more"], "answer": [*PROMPTS, "more"]}, "it has 9 rows, the run had 8"),
    ],
)
def test_other_data_is_named(tokenizer, columns: dict[str, list[str]], fault: str) -> None:
    with pytest.raises(CheckpointError, match=f"^train_dataset: {fault}.*: resume with the data that"):
        inputs(tokenizer, **columns).load_state_dict(inputs(tokenizer).state_dict())


def test_another_tokenizer_or_template_is_named(tokenizer) -> None:
    saved = inputs(tokenizer).state_dict()
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    with pytest.raises(CheckpointError, match="chat template: prompts would read differently"):
        inputs(other).load_state_dict(saved)
    other.add_tokens(["<more>"])
    with pytest.raises(CheckpointError, match=r"^the tokenizer: its vocabulary"):
        inputs(other).load_state_dict(saved)


def test_another_reward_is_named_by_its_code_and_not_by_its_comments(tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"the reward 'letters' is not the one .* reward\.accept_changed=true"):
        inputs(tokenizer, vowels).load_state_dict(inputs(tokenizer).state_dict())

    def one(prompts, completions, **columns):
        return [1.0] * len(prompts)

    first = reward_fingerprint(one)

    def one(prompts, completions, **columns):
        # The same, said at greater length.
        return [1.0] * len(
            prompts,
        )

    assert reward_fingerprint(one) == first is not None
    half = functools.partial(vowels, weight=0.5)
    assert reward_fingerprint(half) != reward_fingerprint(functools.partial(vowels, weight=1.0))
    assert reward_fingerprint(max) is None


def test_a_repaired_reward_is_accepted_where_it_is_set(tokenizer, tmp_path: Path, capsys) -> None:
    def repaired(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return vowels(prompts, completions)

    repaired.__module__, repaired.__qualname__, repaired.__name__ = letters.__module__, "letters", "letters"
    trainer(settings(tmp_path, max_steps=1), tokenizer).train()
    with pytest.raises(CheckpointError, match="its code or its weights differ"):
        trainer(settings(tmp_path, max_steps=2), tokenizer, repaired).train(resume_from_checkpoint=True)
    accepted = settings(tmp_path, max_steps=2, reward={"accept_changed": True})
    trainer(accepted, tokenizer, repaired).train(resume_from_checkpoint=True)
    assert "its code or its weights differ (accepted: reward.accept_changed)" in capsys.readouterr().err


def test_a_partials_arguments_have_one_fingerprint_in_every_process() -> None:
    """Texts have another hash in each process, and so a set another order; functions have another address."""
    code = (
        "import functools\n"
        "from stable_rlhf.training.fingerprints import reward_fingerprint\n"
        "from tests.tiny_runs import letters\n"
        "words = {word: {word + '!', 'b', 'c', 'd'} for word in ('x', 'y')}\n"
        "print(reward_fingerprint(functools.partial(letters, words=words, by=letters, also=[object()])))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["src", "."])},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    by = [reward_fingerprint(functools.partial(letters, words={word}, by=by)) for word, by in
          (("a", letters), ("b", letters), ("a", vowels))]  # fmt: skip
    assert len(set(by)) == 3


def test_digests_tell_data_and_rewards_apart_and_are_unknown_where_a_reward_is(tokenizer) -> None:
    base = inputs(tokenizer).digests()
    assert base == inputs(copy.deepcopy(tokenizer)).digests()
    other_data, other_reward = inputs(tokenizer, answer=PROMPTS[::-1]), inputs(tokenizer, reward=vowels)
    assert [other_data.digests()[name] == base[name] for name in ("data", "reward")] == [False, True]
    assert [other_reward.digests()[name] == base[name] for name in ("data", "reward")] == [True, False]
    assert inputs(tokenizer, reward=len).digests()["reward"] is None


def test_runs_of_other_seeds_hold_out_other_rows_of_the_same_data(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    data = {"train": str(tmp_path / "prompts.jsonl"), "eval_size": 2}
    runs = [
        trainer(settings(tmp_path / str(seed), seed=seed, data=data), tokenizer, letters, train_dataset=None)
        for seed in (0, 1)
    ]
    held_out = [[*run.inputs.data[1][1]["prompt"]] for run in runs]
    assert held_out[0] != held_out[1]
    assert runs[0].inputs.digests() == runs[1].inputs.digests()
