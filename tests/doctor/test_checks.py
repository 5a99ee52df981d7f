"""doctor: each check in the good case and failing, and the memory formula against literals, tensors and measurement."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from stable_rlhf import Config, errors
from stable_rlhf.cli.main import main
from stable_rlhf.doctor import checks, dry_run, findings
from stable_rlhf.doctor import memory as doctor_memory
from stable_rlhf.hardware import memory
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.adapter import lora_config
from stable_rlhf.policy.loading import load_policy
from stable_rlhf.rollout.merged_weights import decoding_model
from tests.faults.servers import answer, misbehaving
from tests.tiny_runs import policy

CPU = torch.device("cpu")


def pleasant(prompts, completions, **columns):
    return [float("wonderful" in completion) for completion in completions]


def alike(prompts, completions, **columns):
    return [0.5] * len(completions)


def silent(prompts, completions, **columns):
    return [None if "terrible" in completion else 1.0 for completion in completions]


def infinite(prompts, completions, **columns):
    return [float("inf")] * len(completions)


def late(prompts, completions, **columns):
    """Fails on what is sampled, not on the two known texts."""
    if not any("wonderful" in completion for completion in completions):
        raise KeyError("\x1b[31mno lexicon")
    return pleasant(prompts, completions)


def slow_once(prompts, completions, **columns):
    """Takes a second for the first dry step: the second time it is asked, after the two known texts."""
    slow_once.asked += 1
    time.sleep(slow_once.asked == 2)
    return pleasant(prompts, completions)


def told_to_end(prompts, completions, **columns):
    """Is sent SIGTERM while what is sampled is scored."""
    if not any("wonderful" in completion for completion in completions):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
    return pleasant(prompts, completions)


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """A run of the tiny policy on 20 prompts of 4 to 6 tokens (a byte each)."""
    prompts = [f"row {i}" for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return [
        *("--model.name", str(tiny_folder), "--data.train", str(tmp_path / "prompts.jsonl"), "--data.eval_size", "8"),
        *(
            "--reward.functions",
            '["tests.doctor.test_checks:pleasant"]',
            "--rollout.batch_size",
            "4",
            "--max_steps",
            "50",
        ),
        *("--rollout.max_completion_length", "4", "--output_dir", str(tmp_path / "run"), "--model.device", "cpu"),
        *("--save_steps", "20"),
    ]


def lines(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """(verdict, text) of what was printed."""
    out, error = capsys.readouterr()
    assert error == ""
    return [(line[:9].strip(), line[9:]) for line in out.splitlines()]


def verdicts(found: list[tuple[str, str]]) -> dict[str, str]:
    return {text.split(":")[0].split("=")[0]: verdict for verdict, text in found if verdict}


GOOD = dict.fromkeys(("output_dir", "data", "reward", "disk", "memory", "model", "step", "forecast"), "ok")
# The tiny policy, which is not trained, rarely ends within 4 tokens, and never writes "wonderful".
GOOD |= dict.fromkeys(("completions", "scores"), "warning")


# --- a run ------------------------------------------------------------------------------------------


def test_a_good_run_is_described_line_by_line_and_leaves_nothing_behind(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", *settings]) == 0
    found = lines(capsys)
    assert verdicts(found) == GOOD
    texts = [text for _, text in found]
    assert texts[0] == f"output_dir={str(tmp_path / 'run')!r}: free, and {tmp_path} can be written to"
    assert (
        texts[2]
        == "data: 12 prompts of 5 to 6 tokens (median 5.5), 0 of them cut to data.max_prompt_length=512, 0 duplicates"
    )
    assert texts[3].startswith("prompt 1: row ")
    assert texts[6] == "data.eval_size=8: 8 of 20 rows are held out to evaluate on; 12 are trained on"
    assert texts[7].startswith("reward: pleasant gives 1 and 0 to 'It was wonderful: ")
    # 8,832 weights and a head of 105: 3 x 4 bytes of the weights, 4 x 4 of the heads; final/ has 4 and 2 x 4.
    assert "needed for 2 + 1 checkpoints of 215 kB, 323 kB of snapshots and the final model of 36.2 kB" in texts[1]
    assert "gradients 35.7 kB, AdamW's two moments 71.5 kB, KV cache of the rollout 5.12 kB" in texts[9]
    assert texts[10].startswith("model: a few tokens have the same log-probs alone")
    assert texts[11] == (
        "completions: 88% of those of the dry steps are cut off by rollout.max_completion_length=4; a cut answer is "
        "scored without its end: raise it, or see whether the policy ends at all"
    )
    assert texts[12] == (
        "scores: the completions of each dry step all have the same score, so there is nothing to learn from: give a "
        "reward with steps in between, or a better policy to begin with"
    )
    assert re.match(r"step: [\d.]+ s \(rollout [\d.e-]+ s, scoring ", texts[13])
    assert texts[14].startswith("forecast: 50 steps x ")
    assert texts[14].endswith("; checkpoints of 215 kB every 20 steps and at the end")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_takes_a_file_first_and_settings_after_it(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("save_total_limit: 7\n")
    assert main(["doctor", str(tmp_path / "run.yaml"), *settings]) == 0
    assert "needed for 7 + 1 checkpoints" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"stable-rlhf: --config {tmp_path / 'no.yaml'}: No such file or directory; check the path\n"
    )


def test_of_a_stream_the_first_rows_are_looked_at(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *settings, "--data.streaming", "true", "--data.eval_size", "0"]) == 0
    shown = capsys.readouterr().out
    assert "data.streaming=true: only the first 8 rows are looked at" in shown
    assert "data: 8 prompts" in shown


def test_a_run_with_groups_is_tried_with_as_many_prompts_as_a_step_has(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of two completions each of two prompts; of a stream two steps' prompts are looked at."""
    grouped = ["--preset", "grpo", "--rollout.num_generations", "2", "--data.eval_size", "0"]
    assert main(["doctor", *settings, *grouped, "--data.streaming", "true"]) == 0
    shown = capsys.readouterr().out
    assert "data.streaming=true: only the first 4 rows are looked at" in shown
    assert "checkpoints of 106 kB" in shown  # 8,832 weights x 3 x 4 bytes, and no heads
    assert main(["doctor", *settings, *grouped, "--data.limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "fewer than rollout.batch_size=4 / rollout.num_generations=2: every step sees all of them" in shown


def test_settings_that_two_steps_alone_would_refuse_are_no_obstacle(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data.train", "builtin", "--data.eval_split", "eval", "--critic.warmup_steps", "10"]
    assert main(["doctor", *settings, *more]) == 0
    assert verdicts(lines(capsys)) == GOOD


# --- each check -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--optim.lam", "2"], "optim.lam=2.0: "),
        (["--reward.timeout", "5"], "reward.timeout=5.0: has no effect unless one of reward.functions is the URL"),
        (["--model.name", "no/such-model"], "model.name='no/such-model': "),
        (["--data.train", "no.jsonl"], "prompt file no.jsonl does not exist."),
        (["--reward.functions", '["tests.no_such:f"]'], "reward 'tests.no_such:f': importing 'tests.no_such'"),
        (
            ["--rollout.max_completion_length", "60"],
            "{tmp}/prompts.jsonl, row 1: the prompt has 5 tokens, which with rollout.max_completion",
        ),
        (["--output_dir", "{tmp}/prompts.jsonl/run"], "output_dir='{tmp}/prompts.jsonl/run': {tmp}/prompts.jsonl is a"),
        (["--model.lora_r", "2", "--model.lora_target_modules", "[nope]"], "model.lora_target_modules=['nope']: "),
    ],
)
def test_what_cannot_be_used_costs_the_sentence_that_train_says(
    arguments: list[str], sentence: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["doctor", *settings, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stable-rlhf: " + sentence.replace("{tmp}", str(tmp_path)))
    assert error.count("\n") == 1


def test_a_folder_that_holds_a_run_fails_and_the_other_checks_go_on(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert main(["doctor", *settings]) == 1
    found = lines(capsys)
    assert found[0][1].endswith("or choose another folder")
    assert verdicts(found) == GOOD | {"output_dir": "failed"}


def test_a_folder_that_cannot_be_written_to_fails(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings.Findings()
    checks.check_output(found, Config(output_dir="/proc/run"))
    assert found.failed
    assert lines(capsys) == [
        (
            "failed",
            "output_dir='/proc/run': /proc cannot be written to (No such file or directory); choose another folder",
        )
    ]


def test_a_disk_that_is_too_small_fails_with_what_it_lacks(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = (3 * 2 + 3) * 107_664 + 36_168  # checkpoints hold two states, and three lie or are written as snapshots
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, needed - 1))
    assert main(["doctor", *settings]) == 1
    found = lines(capsys)
    assert verdicts(found) == GOOD | {"disk": "failed"}
    assert found[1][1].startswith("disk: 1.01 MB free at ")
    assert found[1][1].endswith("; free some, lower save_total_limit=2, or choose another output_dir")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, needed))
    assert main(["doctor", *settings]) == 0


@pytest.mark.parametrize(
    ("prompts", "arguments", "remedy"),
    [
        (["ab", "cd"], [], "fewer than rollout.batch_size=4: every step sees all of them"),
        (
            ["abc", "d", "e", "f"],
            ["--data.max_prompt_length", "2"],
            "raise data.max_prompt_length, or shorten the prompts",
        ),
        (
            ["a", "a", "b", "c"],
            [],
            "duplicates are trained on more often: remove them unless you want that",
        ),
    ],
)
def test_data_that_look_odd_are_a_warning(
    prompts: list[str],
    arguments: list[str],
    remedy: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    assert main(["doctor", *settings, "--data.eval_size", "0", *arguments]) == 0
    found = lines(capsys)
    assert verdicts(found) == GOOD | {"data": "warning"}
    assert found[2][1].endswith(remedy)


def test_prompts_are_shown_as_the_policy_sees_them_and_act_on_no_terminal(
    settings: list[str], tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the chat template, special tokens and all."""
    folder = tmp_path / "chat"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}<assistant>"
    )
    chat = [{"role": "user", "content": "hi\x1b[31m\nyou"}]
    (tmp_path / "prompts.jsonl").write_text(4 * (json.dumps({"prompt": chat}) + "\n"))
    assert main(["doctor", *settings, "--data.eval_size", "0", "--model.name", str(folder)]) == 0
    shown = "prompt 1: <bos><user>hi\\x1b[31m⏎you<eos><assistant>"
    assert lines(capsys)[3] == ("", shown)


@pytest.mark.parametrize(
    ("reward", "verdict", "exit_code", "text"),
    [
        ("alike", "warning", 0, "both get the same score: check that the reward reads the completion"),
        ("silent", "warning", 0, "a completion without a score is not trained on: find out why it has none"),
        ("infinite", "failed", 1, "A score is a finite number, at most 1e30 in size, or None for no score."),
    ],
)
def test_a_reward_that_tells_nothing_apart_or_fails_is_named(
    reward: str, verdict: str, exit_code: int, text: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *settings, "--reward.functions", f'["tests.doctor.test_checks:{reward}"]']) == exit_code
    found = lines(capsys)
    assert found[7] == (verdict, found[7][1])
    assert found[7][1].endswith(text)
    last = ("ok", "forecast: ") if exit_code == 0 else ("", "no step was tried: fix what failed first")
    assert found[-1][0] == last[0]
    assert found[-1][1].startswith(last[1])


@pytest.mark.parametrize(
    ("gold", "verdict", "text"),
    [
        ("alike", "warning", "alike gives both the same score: check that it reads the completion"),
        ("silent", "warning", "silent does not judge every completion: its mean is of those that it judges"),
        ("infinite", "failed", "A score is a finite number, at most 1e30 in size, or None for no score."),
    ],
)
def test_a_gold_reward_is_tried_once(
    gold: str, verdict: str, text: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--reward.gold", f"tests.doctor.test_checks:{gold}", "--reward.skip_special_tokens", "false"]
    assert main(["doctor", *settings, *given]) == (1 if verdict == "failed" else 0)
    found = lines(capsys)
    assert found[8][0] == verdict
    assert found[8][1].startswith("gold: ")
    assert found[8][1].endswith(text)
    assert found[-1][1].startswith("forecast: ")
    assert main(["doctor", *settings, *given, "--data.eval_size", "0"]) == 2
    assert "there are no held-out prompts" in capsys.readouterr().err


def test_a_step_that_fails_is_a_failure_with_its_reason(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *settings, "--reward.functions", '["tests.doctor.test_checks:late"]']) == 1
    found = lines(capsys)
    assert found[-1][0] == "failed"
    assert found[-1][1].startswith("step: reward function 'late' raised KeyError: ")
    assert "\x1b" not in found[-1][1]


def test_a_reward_server_is_tried_as_train_tries_it(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the trial's few retries, and before data and models are read."""
    for command, code in (("doctor", errors.Exit.FAILED), ("train", errors.Exit.REWARD)):
        with misbehaving(answer(b"", 404)) as server:
            assert main([command, *settings, "--reward.functions", f'["{server.url}"]']) == code
        said = capsys.readouterr()
        (line,) = (said.out + said.err).splitlines()
        assert line.startswith("failed   reward: the reward" if command == "doctor" else "stable-rlhf: the reward")
        assert "(a trial before the run begins, of at most 2 retries): HTTP 404" in line
        assert [request["query"] for request in server.requests] == [["The soup was good."]]


def test_a_signal_in_a_step_is_told_by_the_exit_code(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", *settings, "--reward.functions", '["tests.doctor.test_checks:told_to_end"]']
    assert main(arguments) == errors.Exit.TERMINATED
    assert capsys.readouterr().err == "stable-rlhf: stopped by SIGTERM\n"


def test_a_step_that_runs_out_of_memory_says_what_takes_less_and_a_bug_keeps_its_traceback(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stable_rlhf.training.step.update", lambda *arguments: torch.empty(2**60))
    assert main(["doctor", *settings]) == 1
    last = lines(capsys)[-1]
    assert last[0] == "failed"
    assert "allocate memory" in last[1]
    assert last[1].endswith(memory.LESS)
    monkeypatch.setattr("stable_rlhf.training.step.update", lambda *arguments: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        main(["doctor", *settings])


def test_memory_that_is_short_is_a_failure_or_a_warning_with_what_takes_less(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = doctor_memory.Memory(held={"policy": 700}, passing={"activations": 100}, checkpoint=1, final=1)
    for left, verdict in ((699, "failed"), (700, "warning"), (999, "warning"), (1000, "ok")):
        monkeypatch.setattr(memory, "free", lambda device, left=left: left)
        # On CUDA a step that is too large is an error that is caught; on a CPU the system ends the process.
        assert checks.check_memory(findings.Findings(), needed, torch.device("cuda")) is (verdict != "failed")
        on_cuda = lines(capsys)
        assert checks.check_memory(findings.Findings(), needed, CPU) is (verdict == "ok")
        (line, parts) = lines(capsys)
        assert line[0] == on_cuda[0][0] == verdict
        assert line[1].startswith(f"memory: about 0.8 kB needed, {left / 1000:g} kB free on cpu")
        assert ("so no step is tried" in line[1]) is (verdict == "warning")
        assert "no step" not in on_cuda[0][1]
        assert ("set model.lora_r, lower optim.microbatch_tokens" in line[1]) is (verdict != "ok")
        assert parts == ("", "by part: policy 0.7 kB, activations 0.1 kB")
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    assert main(["doctor", *settings]) == 1
    assert lines(capsys)[-1][1] == "no step was tried: fix what failed first"


def test_on_cuda_more_steps_are_tried_but_no_more_than_the_run_has() -> None:
    counts = [dry_run.number_of_steps(torch.device("cuda"), most) for most in (1, 2, 5, 8, 1000)]
    assert counts == [2, 2, 5, 8, 8]
    assert dry_run.number_of_steps(CPU, 1000) == 2


def test_the_first_dry_step_is_not_what_is_forecast(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    slow_once.asked = 0
    assert main(["doctor", *settings, "--reward.functions", '["tests.doctor.test_checks:slow_once"]']) == 0
    (seconds,) = re.findall(r"scoring ([0-9.]+) s", capsys.readouterr().out)
    assert float(seconds) < 0.5


def test_the_usual_step_is_the_median_of_those_after_the_first_half() -> None:
    """Four of eight: one that captured a shape counts no more than another."""
    names = ("rollout_s", "scoring_s", "logprobs_s", "update_s", "total_s", "tokens_per_s")
    rows = [dict.fromkeys(names, value) for value in (90.0, 80.0, 70.0, 60.0, 3.0, 1.0, 50.0, 2.0)]
    assert dry_run.usual_step(rows) == dict.fromkeys(names, 2.5)
    assert dry_run.usual_step(rows[3:5]) == dict.fromkeys(names, 3.0)  # two steps: the second


def test_the_forecast_is_arithmetic() -> None:
    timing = {"rollout_s": 1.0, "scoring_s": 0.5, "logprobs_s": 0.5, "update_s": 2.0, "total_s": 4.0}
    config = Config(max_steps=1000, save_steps=0)  # 128 held-out prompts in batches of 64
    assert dry_run.forecast(config, timing, 128, 2_000_000) == (
        "forecast: 1000 steps x 4 s and 8 s of evaluation = 1:06:48; checkpoints of 2 MB at the end"
    )
    config = Config(max_steps=1000, save_steps=0, eval_steps=250)  # after 250, 500, 750 steps too
    assert "20 s of evaluation" in dry_run.forecast(config, timing, 128, 2_000_000)


# --- the formula ------------------------------------------------------------------------------------


def test_the_parts_of_the_tiny_policy_are_those_computed_by_hand(tokenizer) -> None:
    rollout = {"batch_size": 8, "max_completion_length": 6}
    config = Config.from_preset("safe", rollout=rollout, critic={"heads": 2})
    needed = doctor_memory.estimate(policy(tokenizer), config, device=CPU, low=False, prompt=10)
    assert needed.held == {
        "policy": 35_328,  # 4 x (259 x 16 + 2 x (16 x (16 + 8 + 8 + 16) + 3 x 16 x 32 + 2 x 16) + 16)
        "reference": 35_328,
        "value heads and their targets": 1_680,  # 2 x 2 x 4 x (2 x 16 + 16 x 4 + 4 + 4 + 1)
        "gradients": 36_168,
        "AdamW's two moments": 72_336,
        "weights to sample from": 0,  # float32, no adapter: the policy's own
    }
    assert needed.passing == {
        "KV cache of the rollout": 16_384,  # 2 x 2 layers x 1 head x 8 x 8 rows x (10 + 6) x 4
        # 2 + 1 layers, 4 rows of 15: 60 x (4 x 16 x 4 + (4 x 16 + 4 x 32) x 4), and 2 x 4 x 2 heads x 15 x 15 x 4.
        "activations of a microbatch": 3 * (60 * 1024 + 14_400),
        "logits of a chunk": 3 * 24 * 259 * 4 + 4 * 259 * 16,
        "both again in CUDA graphs": 0,
        "weights before a step": 35_328,
        "kernels and allocator": 150_000_000,
    }
    assert (needed.checkpoint, needed.final) == (109_344, 37_008)


def test_settings_that_save_memory_do_so_in_the_estimate(tokenizer) -> None:
    def of(**overrides):
        config = Config.from_preset("safe", rollout={"batch_size": 8, "max_completion_length": 6}, **overrides)
        return doctor_memory.estimate(policy(tokenizer), config, device=CPU, low=False, prompt=10).passing

    activations, logits = "activations of a microbatch", "logits of a chunk"
    assert of(optim={"microbatch_tokens": 30})[activations] == 3 * (30 * 1024 + 7_200)
    assert of(optim={"num_mini_batches": 8})[logits] == 3 * 6 * 259 * 4 + 4 * 259 * 16
    assert of(model={"gradient_checkpointing": True})[activations] == 2 * 60 * 16 * 4 + 60 * 1024 + 14_400
    assert of(optim={"preview": False})["weights before a step"] == 0


def test_cuda_graphs_hold_what_a_pass_takes_once_more_and_a_longer_cache(tokenizer) -> None:
    def of(**model):
        config = Config.from_preset("safe", rollout={"batch_size": 8, "max_completion_length": 6}, model=model)
        device = torch.device("cuda")
        return doctor_memory.estimate(policy(tokenizer), config, device=device, low=False, prompt=10).passing

    activations, logits = 3 * 60 * 1024, 3 * 24 * 259 * 4 + 4 * 259 * 16  # attention is fused on CUDA
    graphs, direct = of(), of(cuda_graphs=False)
    assert (graphs["activations of a microbatch"], graphs["logits of a chunk"]) == (activations, logits)
    assert graphs["both again in CUDA graphs"] == activations + logits
    assert direct["both again in CUDA graphs"] == 0
    assert graphs["kernels and allocator"] == direct["kernels and allocator"] == 200_000_000
    assert graphs["KV cache of the rollout"] == 2 * 2 * 8 * 8 * (64 + 6) * 4  # of prompts of 10 tokens in a room of 64
    assert direct["KV cache of the rollout"] == 16_384


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_held_is_what_the_run_holds(rank: int, low: bool, tokenizer) -> None:
    """Against the tensors themselves: weights, heads, and the copy that is sampled from."""
    config = Config.from_preset("safe", model={"lora_r": rank, "dtype": "bfloat16" if low else "float32"})
    made: LlamaForCausalLM = policy(tokenizer).to(torch.bfloat16 if low and rank else torch.float32)
    adapted = get_peft_model(made, adapter) if (adapter := lora_config(config.model)) else made
    model = ActorCritic(adapted, config.critic, autocast=low)
    held = doctor_memory.estimate(adapted, config, device=CPU, low=low, prompt=10).held

    def size(tensors) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    reference = [] if rank else model._reference[0].parameters()
    assert held["policy"] == size(model.policy.parameters())
    assert held["reference"] == size(reference)
    assert held["value heads and their targets"] == size([*model.heads.parameters(), *model.target_heads.parameters()])
    assert held["weights to sample from"] == size(weight for weight, _ in decoding_model(model)[1])
    assert held["gradients"] == size([*model.policy_parameters(), *model.critic_parameters()])


def test_the_skeleton_has_the_shapes_and_dtypes_of_what_is_loaded(tiny_folder: Path) -> None:
    for overrides in ({}, {"lora_r": 2}, {"lora_r": 2, "dtype": "bfloat16"}):
        config = Config.from_preset("safe", model={"name": str(tiny_folder), "device": "cpu", **overrides})
        loaded = load_policy(config.model)[0]
        shapes = [
            {n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (loaded, doctor_memory.skeleton(config))
        ]
        assert shapes[0] == shapes[1]
        assert all(p.device.type == "meta" for p in doctor_memory.skeleton(config).parameters())


def test_the_estimate_is_near_what_the_built_in_policy_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Within a factor of 1.6 either way: the process's memory has shared libraries and the allocator's habits in it."""
    assert main(["doctor", "--model.device", "cpu", "--data.eval_size", "0"]) == 0
    ((estimated, taken),) = re.findall(r"(?s)memory: about (\d+) MB .*the steps took (\d+) MB", capsys.readouterr().out)
    assert 1 / 1.6 < int(taken) / int(estimated) < 1.6


@pytest.mark.parametrize(
    ("cut", "deviations", "verdicts_"),
    [([0.0, 0.1], [0.0, 0.5], ["ok", "ok"]), ([0.0, 0.5], [0.0, 0.0], ["warning", "warning"])],
)
def test_the_samples_of_the_dry_steps_are_judged(
    cut: list[float], deviations: list[float], verdicts_: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"completions/clipped_ratio": share, "objective/scores_std": deviation}
        for share, deviation in zip(cut, deviations, strict=True)
    ]
    dry_run.judge_samples(findings.Findings(), Config(), rows)
    assert [verdict for verdict, _ in lines(capsys)] == verdicts_
