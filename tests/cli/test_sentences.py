"""Python users and the command line are told the same: the message of the error is the line on stderr."""

from __future__ import annotations

import errno
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError

from stable_rlhf import Config, ConfigError, SAFETrainer
from stable_rlhf.cli.main import main
from stable_rlhf.config import load_config
from stable_rlhf.errors import (
    DivergenceError,
    Exit,
    GuardStop,
    Interrupted,
    NoRoomError,
    OutOfMemoryError,
    RewardError,
    RewardInputError,
    RewardUnavailable,
    SaveError,
    StableRLHFError,
)
from stable_rlhf.hardware import LESS
from stable_rlhf.training import run as run_module
from stable_rlhf.training import step as step_module
from tests.cli.test_main import said, tiny_run
from tests.faults.servers import answer, misbehaving

CUDA_SAID = "CUDA out of memory. Tried to allocate 2 MiB"


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> list[str]:
    return tiny_run(tiny_folder, tmp_path)


def sentence(error: BaseException) -> str:
    """The message on one line, as the command line prints it."""
    return " ".join(str(error).split())


def loading(arguments: list[str]) -> SAFETrainer:
    """The trainer that `train` would make of its arguments."""
    config = load_config(arguments)
    return SAFETrainer(config.model.name, args=config)


# -- before training ------------------------------------------------------------------------------------------------

NOT_THERE = [
    (["--model.name", "no/such-model"], "model.name='no/such-model': "),
    (["--model.name", "{tmp}/nothing"], "model.name='{tmp}/nothing': there is no such folder; give builtin, "),
    (["--model.name", "{tmp}"], "model.name='{tmp}': Unrecognized model in {tmp}"),
    (["--model.gguf_file", "no.gguf"], "model.name='{tiny}', model.gguf_file='no.gguf': {tiny} does not appear to"),
    (["--model.device", "gpu"], "model.device='gpu': give auto, cpu, cuda or cuda:NUMBER"),
    (["--model.device", "cuda:99"], "model.device='cuda:99': this machine has "),
    (["--model.lora_r", "2", "--model.lora_target_modules", "[nope]"], "model.lora_target_modules=['nope']: "),
    (["--log.report_to", "[nope]"], "log.report_to=['nope']: there is no tracker 'nope'; "),
    (["--data.train", "{tmp}/no.jsonl"], "prompt file {tmp}/no.jsonl does not exist. "),
    (["--reward.functions", '["{tmp}/nothing"]'], "the reward model '{tmp}/nothing' could not be loaded: "),
    (["--reward.functions", '["tests.no_such:f"]'], "reward 'tests.no_such:f': importing 'tests.no_such'"),
]


@pytest.mark.parametrize(("arguments", "begins"), NOT_THERE, ids=[" ".join(given) for given, _ in NOT_THERE])
def test_what_is_not_there_is_told_alike_by_trainer_train_and_doctor(
    arguments: list[str],
    begins: str,
    tiny: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"tmp": tmp_path, "tiny": tiny_folder}
    given = [*tiny, *(argument.format(**places) for argument in arguments)]
    with pytest.raises(StableRLHFError) as caught:
        loading(given)
    assert sentence(caught.value).startswith(begins.format(**places))
    assert caught.value.exit_code == main(["train", *given]) == Exit.BAD_INPUT
    assert said(capsys) == sentence(caught.value)
    assert main(["doctor", *given]) == Exit.BAD_INPUT
    assert capsys.readouterr().err == f"stable-rlhf: {sentence(caught.value)}\n"
    assert not (tmp_path / "run").exists()


def test_a_model_needs_only_its_name_to_be_refused(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        SAFETrainer(model="no/such")
    assert main(["train", "--model.name", "no/such"]) == Exit.BAD_INPUT
    assert said(capsys) == sentence(caught.value)


@pytest.mark.parametrize("weights", [None, b"torn"], ids=["missing", "damaged"])
def test_weights_that_are_missing_or_damaged_are_a_sentence(
    weights: bytes | None, tiny: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    given = [*tiny, "--model.name", str(folder)]
    with pytest.raises(ConfigError, match=re.escape(f"model.name='{folder}': ")) as caught:
        loading(given)
    assert main(["train", *given]) == Exit.BAD_INPUT
    assert said(capsys) == sentence(caught.value)


def test_an_adapter_given_as_an_object_is_named_as_that(tiny: list[str]) -> None:
    config = load_config(tiny)
    adapter = LoraConfig(target_modules=["nope"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"^peft_config: target_modules=\{'nope'\}: Target modules"):
        SAFETrainer(config.model.name, args=config, peft_config=adapter)


def test_a_reward_server_that_is_not_there_ends_the_command_with_4(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with misbehaving(answer(b"", 404)) as server:
        given = [*tiny, "--reward.functions", '["builtin"]', "--reward.url", server.url]
        with pytest.raises(RewardUnavailable) as caught:
            loading(given)
        assert caught.value.exit_code == main(["train", *given]) == 4
    seconds = re.compile(r"in [0-9.]+ s")
    assert seconds.sub("", said(capsys)) == seconds.sub("", sentence(caught.value))
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_while_loading_says_what_takes_less(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError(f"{CUDA_SAID}. GPU 0 has 1 MiB.")

    monkeypatch.setattr(run_module, "ActorCritic", greedy)
    with pytest.raises(OutOfMemoryError) as caught:
        loading(tiny)
    assert str(caught.value) == f"loading: {CUDA_SAID}; {LESS}"
    assert main(["train", *tiny]) == Exit.FAILED
    assert said(capsys) == str(caught.value)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_told_alike(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [*tiny, "--output_dir", "/proc/none/run"]
    made = loading(given)
    with pytest.raises(ConfigError) as caught:
        made.train()
    assert main(["train", *given]) == Exit.BAD_INPUT
    assert said(capsys) == str(caught.value)


# -- in training ----------------------------------------------------------------------------------------------------

usage = namedtuple("usage", "total used free")


def short_of_memory_in_a_reward() -> RewardError:
    error = RewardError("reward function 'vowels' raised OutOfMemoryError")
    error.__cause__ = torch.OutOfMemoryError(f"{CUDA_SAID}. GPU 0 has 1 MiB.")
    return error


GOES_ON = "`stable-rlhf resume {run}` continues from step 1."
LESS_THEN = (
    "lower optim.microbatch_tokens or reward.batch_size, or set model.gradient_checkpointing, in {run}/config.yaml. "
    f"{GOES_ON} A smaller rollout.batch_size or model.lora_r needs a new run."
)
ENDINGS: dict[str, tuple[BaseException, type[BaseException], Exit, str]] = {
    "a checkpoint that cannot be written": (
        SaveError("it could not be written; mend that"),
        SaveError,
        Exit.DISK,
        f"it could not be written; mend that. {GOES_ON}",
    ),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device"),
        NoRoomError,
        Exit.DISK,
        "{run} could not be written to: No space left on device; 5 bytes are free, and its next checkpoint needs "
        f"{{need:,}}; make room there. {GOES_ON}",
    ),
    "a full disk, by safetensors": (
        SafetensorError("I/O error: File too large (os error 27)"),
        NoRoomError,
        Exit.DISK,
        "{run} could not be written to: File too large; 5 bytes are free, and its next checkpoint needs {need:,}; "
        f"raise the limit on the length of a file (ulimit -f). {GOES_ON}",
    ),
    "a reward that fails": (RewardError("no lexicon."), RewardError, Exit.REWARD, f"no lexicon. {GOES_ON}"),
    "a reward that is away": (RewardUnavailable("away."), RewardUnavailable, Exit.REWARD, f"away. {GOES_ON}"),
    "memory in a step": (
        RuntimeError(f"{CUDA_SAID}. GPU 0 has 1 MiB."),
        OutOfMemoryError,
        Exit.FAILED,
        f"after 1 step: {CUDA_SAID}; {LESS_THEN}",
    ),
    "memory in a reward": (
        short_of_memory_in_a_reward(),
        OutOfMemoryError,
        Exit.FAILED,
        f"after 1 step, in the reward: {CUDA_SAID}; {LESS_THEN}",
    ),
    "the guard": (
        GuardStop("step 1: the KL is 30."),
        GuardStop,
        Exit.GUARD,
        f"step 1: the KL is 30. {GOES_ON} The guard would stop it again for the same cause: change `guard` in "
        "{run}/config.yaml first.",
    ),
    "a figure that is not finite": (
        DivergenceError("step 1: the loss is nan", {"loss": None}),
        DivergenceError,
        Exit.FAILED,
        "step 1: the loss is nan",
    ),
    "Ctrl-C": (KeyboardInterrupt(), Interrupted, Exit.INTERRUPTED, f"interrupted after 1 step. {GOES_ON}"),
    "SIGTERM": (
        Interrupted(signal.SIGTERM),
        Interrupted,
        Exit.TERMINATED,
        f"interrupted after 1 step. {GOES_ON}",
    ),
}


def fail_in_the_second_step(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of each run's second step raises such an error."""
    update, calls = step_module.update, []

    def failing(*given: Any) -> Any:
        calls.append(0)
        if len(calls) % 2:
            return update(*given)
        made = type(error)(*error.args, error.figures) if isinstance(error, DivergenceError) else error
        made.args, made.__cause__ = error_args, cause
        raise made

    error_args, cause = error.args, error.__cause__
    monkeypatch.setattr(step_module, "update", failing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 4, 5))


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_ends_a_run_is_told_alike_with_how_to_resume(
    ending: str,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, kind, code, expected = ENDINGS[ending]
    fail_in_the_second_step(error, monkeypatch)
    tiny += ["--guard.enabled", "false"]  # a figure that is not finite ends the run only without it
    run = tmp_path / "run"
    with pytest.raises(kind) as caught:
        loading(tiny).train()
    checkpoint = run / "checkpoints" / "step-000001"
    need = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert str(caught.value) == expected.format(run=run, need=need)
    shutil.rmtree(run)
    assert main(["train", *tiny]) == code
    assert said(capsys) == sentence(caught.value)
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("bug", [ValueError("a bug"), RuntimeError("size of tensor"), OSError(errno.EIO, "a bug")])
def test_a_bug_in_a_step_comes_out_as_it_is(bug: Exception, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_the_second_step(bug, monkeypatch)
    with pytest.raises(type(bug)) as caught:
        main(["train", *tiny])
    assert caught.value is bug


def test_a_saved_state_that_does_not_fit_is_told_alike_and_a_bug_after_it_is_not_hidden(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", *tiny]) == Exit.DONE
    longer = [*tiny, "--max_steps", "3"]

    def misfit(*given: Any, **named: Any) -> None:
        raise ValueError("the state of the controller has no 'threshold'")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "restore", misfit)
        with pytest.raises(ConfigError) as caught:
            loading(longer).train(resume_from_checkpoint=True)
        capsys.readouterr()
        assert main(["resume", str(tmp_path / "run"), "--max_steps", "3"]) == Exit.BAD_INPUT
        assert said(capsys) == str(caught.value) == "the state of the controller has no 'threshold'"
    monkeypatch.setattr(step_module, "update", misfit)
    with pytest.raises(ValueError, match="the state of the controller") as bug:
        loading(longer).train(resume_from_checkpoint=True)
    assert not isinstance(bug.value, StableRLHFError)


def test_an_evaluation_that_cannot_be_read_costs_a_resume_a_sentence(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny]) == Exit.DONE
    (tmp_path / "run" / "evaluation.json").write_text("{")
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run")]) == Exit.BAD_INPUT
    assert said(capsys).startswith(f"{tmp_path / 'run' / 'evaluation.json'}: not JSON (")


def test_a_reward_that_cannot_be_loaded_is_an_error_of_rewards_and_of_settings() -> None:
    with pytest.raises(RewardInputError) as caught:
        SAFETrainer("builtin", "tests.no_such:f", Config.from_preset("safe"))
    assert isinstance(caught.value, RewardError)
    assert isinstance(caught.value, ConfigError)
