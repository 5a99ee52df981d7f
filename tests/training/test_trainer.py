"""SAFETrainer through its public words: what a run leaves behind, what a reward is given, callbacks, evaluation."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
)

from stable_rlhf import Config, ConfigError
from stable_rlhf.config.loading import load_config
from stable_rlhf.runs.names import METRICS
from tests.tiny_runs import PROMPTS, finished, letters, policy, rows, settings, trainer

HELD_OUT = [{"prompt": f"held out {i}"} for i in range(11)]


# -- what a run leaves behind -------------------------------------------------------------------------------------


def test_metrics_have_documented_names_alone_and_count_steps_and_prompts(tokenizer, tmp_path: Path) -> None:
    run = finished(settings(tmp_path / "run"), tokenizer)
    found = rows(run.run_dir)
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    assert [row["episode"] for row in found] == [8, 16, 24, 32]
    assert set().union(*found) - METRICS.keys() == {"rewards/letters/mean"}
    missing = METRICS.keys() - found[0].keys()
    # `safe` has no KL in the loss, its one head has no gap to another, one reward has nobody to disagree with, and one
    # completion a prompt is no group.
    elsewhere = {"loss/kl_avg", "reward/disagreement", "safe/head_gap", "frac_reward_zero_std"}
    assert missing == {"rewards/<name>/mean", "user/<name>"} | elsewhere
    for row in found:
        assert row["objective/rlhf_reward"] == pytest.approx(
            row["objective/scores"] + row["objective/non_score_reward"]
        )
        assert row["rewards/letters/mean"] == row["objective/scores"]
        assert (row["lr"], row["lr_critic"]) == (1e-2, 1e-3)


def test_the_first_minibatch_of_a_run_has_ratio_one(tokenizer, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", optim={"num_iterations": 1, "num_mini_batches": 1})
    for row in rows(finished(config, tokenizer).run_dir):
        assert (row["val/ratio"], row["val/ratio_var"], row["policy/approxkl_avg"]) == (1.0, 0.0, 0.0)
        assert row["policy/clipfrac_avg"] == 0.0


@pytest.mark.parametrize("preset", ["safe", "paper", "ppo-adaptive", "safe-gate"])
def test_config_yaml_is_complete_and_gives_the_same_settings_again(tokenizer, tmp_path: Path, preset: str) -> None:
    config = settings(tmp_path / "run", preset, max_steps=1, critic={"lam": 0.9}, seed=7)
    run = finished(config, tokenizer)
    loaded = load_config(["--config", str(run.run_dir / "config.yaml")])
    given = run.args.to_dict()
    assert loaded.to_dict() == given
    assert Config.from_preset(preset, seed=7, critic={"lam": 0.9}).critic == loaded.critic


@pytest.mark.parametrize("adapter", [False, True])
def test_the_final_folder_loads_without_this_package_and_is_the_trained_policy(
    tokenizer, tmp_path: Path, adapter
) -> None:
    base = policy(tokenizer)
    base.save_pretrained(tmp_path / "base")
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    config = settings(tmp_path / "run", max_steps=2)
    run = finished(config, tokenizer, model=base, peft_config=peft_config)
    final, ids = run.run_dir / "final", torch.tensor([[70, 80, 90, 100]])
    if adapter:
        untrained: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded: Any = PeftModel.from_pretrained(untrained, final)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        expected = run.model.policy(input_ids=ids).logits
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
    assert (start - expected).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(final)("hello")["input_ids"] == tokenizer("hello")["input_ids"]
    heads = load_file(final / "value_heads.safetensors")
    assert heads.keys() == {name for name in run.model.trained_state() if "heads." in name}
    assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in heads.items())
    elsewhere = run.save_model(tmp_path / "copy")
    assert load_file(elsewhere / "value_heads.safetensors").keys() == heads.keys()


def test_completions_are_stored_every_so_many_steps_with_skipped_rows_without_a_score(
    tokenizer, tmp_path: Path
) -> None:
    def some(prompts, completions, **columns):
        return [
            None if prompt == "hello" else score
            for prompt, score in zip(prompts, letters(prompts, completions), strict=True)
        ]

    run = finished(settings(tmp_path / "run", log={"completions_steps": 3}), tokenizer, some)
    files = sorted((run.run_dir / "completions").iterdir())
    assert [file.name for file in files] == ["step-000000.parquet", "step-000003.parquet"]
    table = pq.read_table(files[1])
    assert table.column_names == ["prompt", "completion", "score", "length", "kl"]
    stored, row = table.to_pylist(), rows(run.run_dir)[3]
    assert sorted(entry["prompt"] for entry in stored) == sorted(PROMPTS)
    assert [entry["prompt"] for entry in stored if entry["score"] is None] == ["hello"]
    scored = [entry for entry in stored if entry["score"] is not None]
    assert row["completions/skipped"] == 1
    assert row["objective/scores"] == pytest.approx(sum(entry["score"] for entry in scored) / 7)
    tokens = sum(entry["length"] for entry in scored)
    assert row["objective/kl"] == pytest.approx(
        sum(entry["kl"] * entry["length"] for entry in scored) / tokens, abs=1e-6
    )


def test_a_second_run_into_the_same_folder_is_refused(tokenizer, tmp_path: Path) -> None:
    run = finished(settings(tmp_path / "run", max_steps=1), tokenizer)
    before = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"output_dir=.*holds a run already; resume it with train.resume_from"):
        trainer(settings(tmp_path / "run", max_steps=1, seed=3), tokenizer).train()
    assert {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()} == before


# -- the same run, whatever should not matter ---------------------------------------------------------------------


def test_pad_equal_to_eos_gives_the_same_run_as_a_pad_of_its_own(tokenizer, tmp_path: Path) -> None:
    shared = copy.deepcopy(tokenizer)
    shared.pad_token = shared.eos_token
    first, second = (
        finished(settings(tmp_path / name), one, processing_class=one)
        for name, one in (("own", tokenizer), ("shared", shared))
    )
    assert first.sampler.pad_token_id != second.sampler.pad_token_id == tokenizer.eos_token_id
    assert (first.run_dir / "metrics.jsonl").read_bytes() == (second.run_dir / "metrics.jsonl").read_bytes()
    assert 0 < rows(first.run_dir)[0]["completions/clipped_ratio"] < 1  # some rows were padded, some were not


def test_scaling_and_shifting_the_reward_changes_nothing_but_its_own_figures(tokenizer, tmp_path: Path) -> None:
    def scaled(prompts, completions, **columns):
        return [8 * score + 16 for score in letters(prompts, completions)]

    def tenfold(prompts, completions, **columns):
        return [10 * score + 5 for score in letters(prompts, completions)]

    own = {"objective/scores", "objective/scores_std", "objective/rlhf_reward", "objective/non_score_reward"}
    own |= {"safe/reward_mean", "safe/reward_std"}
    factor = {scaled: 8, tenfold: 10}
    runs = {
        function: rows(finished(settings(tmp_path / function.__name__, max_steps=3), tokenizer, function).run_dir)
        for function in (letters, scaled, tenfold)
    }
    assert runs[letters][2]["safe/kl_coef"] != runs[letters][0]["safe/kl_coef"]  # there were decisions to take
    for function in (scaled, tenfold):
        for plain, other in zip(runs[letters], runs[function], strict=True):
            same = {name for name in plain if name not in own and not name.startswith("rewards/")}
            for name in same:
                expected = plain[name] if isinstance(plain[name], str | None) else pytest.approx(plain[name], abs=1e-4)
                assert other[name] == expected, name
            assert other["objective/scores"] != plain["objective/scores"]
            penalty = factor[function] * plain["objective/non_score_reward"]
            assert other["objective/non_score_reward"] == pytest.approx(penalty, rel=1e-3, abs=1e-6)
            assert other["objective/rlhf_reward"] == pytest.approx(other["objective/scores"] + penalty, rel=1e-3)


def test_evaluation_changes_no_row_and_is_on_prompts_that_are_not_trained_on(tokenizer, tmp_path: Path) -> None:
    trained: set[str] = set()

    def by_chance(prompts, completions, **columns):
        trained.update(prompts)
        return [score + random.random() for score in letters(prompts, completions)]

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(40)))

    config = settings(tmp_path / "with", data={"train": str(file), "eval_size": 8})
    measured = trainer(config, tokenizer, by_chance, train_dataset=None)
    data = measured.train_dataset
    # It draws between the making and the training of the other, which has no part in its seed either.
    without = finished(settings(tmp_path / "without"), tokenizer, by_chance, train_dataset=data)
    trained.clear()
    result = measured.train()
    held_out = measured.eval_dataset["prompt"]
    assert len(set(held_out)) == 8
    assert set(held_out).isdisjoint(measured.train_dataset["prompt"])
    assert trained == set(held_out) | set(measured.train_dataset["prompt"])
    assert (measured.run_dir / "metrics.jsonl").read_bytes() == (without.run_dir / "metrics.jsonl").read_bytes()
    assert not (without.run_dir / "evaluation.json").exists()
    assert result == json.loads((measured.run_dir / "evaluation.json").read_text())


def test_evaluation_json_has_the_figures_of_the_held_out_completions(tokenizer, tmp_path: Path) -> None:
    moves = {"preview": False}  # so far that k1, which has noise, shows it
    run = trainer(settings(tmp_path / "run", optim=moves), tokenizer, eval_dataset=HELD_OUT)  # batches of 8 and 3
    result = run.train()
    assert result.keys() == {"before", "after", "samples"}
    for side in ("before", "after"):
        figures = result[side]
        rewards = [sample[f"reward_{side}"] for sample in result["samples"]]
        texts = [sample[side] for sample in result["samples"]]
        assert rewards == letters([], texts)
        mean = sum(rewards) / 11
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 10)
        assert figures["reward"] == pytest.approx(mean)
        assert figures["reward_se"] == pytest.approx(deviation / math.sqrt(11))
        assert figures["prompts"] == 11
        assert 0 < figures["distinct_2"] <= 1
    assert [sample["prompt"] for sample in result["samples"]] == [row["prompt"] for row in HELD_OUT]
    assert result["before"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert result["after"]["kl"] > 1e-3
    assert run.evaluate() == result["after"]  # the same draws again


def test_a_single_held_out_prompt_has_no_standard_error(tokenizer, tmp_path: Path) -> None:
    result = trainer(settings(tmp_path / "run", max_steps=1), tokenizer, eval_dataset=HELD_OUT[:1]).train()
    assert result["before"]["reward_se"] is None
    json.loads((tmp_path / "run" / "evaluation.json").read_text(), parse_constant=pytest.fail)


def test_evaluating_without_held_out_prompts_says_what_to_set(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^evaluate\(\) needs .*: give eval_dataset, or name data\.train with data\.eval_size above 0$",
    ):
        trainer(settings(tmp_path / "run"), tokenizer).evaluate()


# -- settings of the loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.0, 0.5, 1.0, 1.0]), ("linear", [0.0, 0.5, 1.0, 0.5]), ("cosine", [0.0, 0.5, 1.0, 0.5])],
)
def test_both_learning_rates_warm_up_and_follow_the_schedule(
    tokenizer, tmp_path, schedule: str, expected: list
) -> None:
    optim = {"lr_scheduler_type": schedule, "warmup_steps": 2}
    run = finished(settings(tmp_path / "run", optim=optim, critic={"learning_rate": 1e-3}), tokenizer)
    assert [row["lr"] for row in rows(run.run_dir)] == pytest.approx([1e-2 * share for share in expected])
    assert [row["lr_critic"] for row in rows(run.run_dir)] == pytest.approx([1e-3 * share for share in expected])


def test_the_critic_warms_up_before_the_policy_learns(tokenizer, tmp_path: Path) -> None:
    seen: list[dict] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    run = trainer(settings(tmp_path / "run", critic={"warmup_steps": 2}), tokenizer, callbacks=[Watch()])
    start = {name: p.detach().clone() for name, p in run.model.policy.named_parameters()}
    run.train()
    same = [all(torch.equal(tensor, start[name]) for name, tensor in weights.items()) for weights in seen]
    assert same == [True, True, False, False]
    assert [row["objective/kl_k3"] == 0.0 for row in rows(run.run_dir)] == [True, True, True, False]


@pytest.mark.parametrize("dtype", [{"dtype": "bfloat16"}, {}])
def test_an_adapter_on_a_bfloat16_policy_trains_in_float32(tokenizer, tmp_path: Path, dtype: dict) -> None:
    base = policy(tokenizer).to(torch.bfloat16)
    config = settings(tmp_path / "run", max_steps=2, model={"lora_r": 2, **dtype}, optim={"num_iterations": 1})
    run = finished(config, tokenizer, model=base)
    trained = [p for p in run.model.policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert run.model.autocast
    assert max(p.abs().max() for name, p in run.model.policy.named_parameters() if "lora_B" in name) > 0
    assert all(math.isfinite(v) for row in rows(run.run_dir) for v in row.values() if isinstance(v, float))


def test_a_bfloat16_policy_that_is_trained_whole_has_float32_weights(tokenizer, tmp_path: Path) -> None:
    run = finished(settings(tmp_path / "run", max_steps=1), tokenizer, model=policy(tokenizer).to(torch.bfloat16))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.model.autocast
    plain = trainer(settings(tmp_path / "b", model={"dtype": "float32"}), tokenizer, model=policy(tokenizer).bfloat16())
    assert not plain.model.autocast
    assert trainer(settings(tmp_path / "c", model={"dtype": "bfloat16"}), tokenizer).model.autocast
