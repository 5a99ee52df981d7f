"""Signals and the lock, with real processes: what they leave, what they say, how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from stable_rlhf.checkpoints.store import newest, steps_of
from stable_rlhf.errors import ConfigError, Exit, Interrupted
from stable_rlhf.runs.lock import RunLock
from stable_rlhf.runs.metrics import read_rows
from stable_rlhf.training.stopping import GracefulStop
from tests.faults import children, injections, servers
from tests.faults.training import STEPS, Tiny, assert_same, result, sentence
from tests.tiny_runs import rows, settings, trainer

BLOCK = 60.0
"""Seconds that the reward blocks where nothing must wait for it."""
SOON = 20.0
"""Seconds in which a process that stops at once has ended, on a machine that is busy with other things."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> dict[str, bytes]:
    return result(tiny.train("whole", "--save_steps", "0"))


def arrives(path: Path, child: children.Child | None = None) -> None:
    for _ in range(3000):
        if path.exists():
            return
        assert child is None or child.process.exitcode is None, child.said
        time.sleep(0.02)
    raise AssertionError(f"{path} has not come")


def blocked(tiny: Tiny, name: str, seconds: float, *more: str) -> children.Child:
    """A run in whose second step, number 1, the reward takes that long; returns once it has begun to."""
    said = tiny.folder / f"{name}-blocks"
    wrong = partial(injections.blocking_reward, 1, seconds, said)
    child = children.start(tiny.arguments(name, *more), tiny.folder / f"{name}.txt", wrong)
    arrives(said, child)
    return child


# -- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tiny: Tiny, expected: dict[str, bytes]) -> None:
    """SIGTERM to the command itself, in a process of its own from the start."""
    run, said = tiny.folder / "terminated", tiny.folder / "terminated-blocks"
    code = (
        "import sys; from pathlib import Path; from tests.faults import injections; from stable_rlhf import cli\n"
        "import torch; torch.set_num_threads(1)\n"
        f"injections.blocking_reward(1, 0.5, Path({str(said)!r})); sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *tiny.arguments("terminated", "--save_steps", "0")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    arrives(said)
    process.terminate()
    _, stderr = process.communicate(timeout=children.PATIENCE)
    line = f"stable-rlhf: interrupted after 2 steps. `stable-rlhf resume {run}` continues from step 2.\n"
    assert (process.returncode, stderr) == (Exit.TERMINATED, f"stopping after this step, with a checkpoint\n{line}")
    assert_stopped_and_goes_on(tiny, run, expected)


def test_sigint_does_the_same_with_a_code_of_its_own(tiny: Tiny, expected: dict[str, bytes]) -> None:
    child, run = blocked(tiny, "interrupted", 0.5, "--save_steps", "0"), tiny.folder / "interrupted"
    os.kill(child.pid, signal.SIGINT)
    assert child.end() == Exit.INTERRUPTED
    assert sentence(child.said) == f"interrupted after 2 steps. `stable-rlhf resume {run}` continues from step 2."
    assert "stopping after this step, with a checkpoint; Ctrl-C again to stop now, without a checkpoint\n" in child.said
    assert_stopped_and_goes_on(tiny, run, expected)


def assert_stopped_and_goes_on(tiny: Tiny, run: Path, expected: dict[str, bytes]) -> None:
    """After two steps, as if it had not been stopped."""
    assert [row["step"] for row in rows(run)] == [0, 1]
    assert (run / "report.html").is_file()
    assert not (run / ".owner.json").exists()
    code, said = tiny.run(["resume", str(run)])
    assert (code, said.count("\n")) == (Exit.DONE, 1), said
    assert said.startswith("6 steps done, reward ")
    assert_same(run, expected)


def test_a_second_sigint_stops_at_once(tiny: Tiny) -> None:
    child = blocked(tiny, "twice", BLOCK, "--save_steps", "1")
    os.kill(child.pid, signal.SIGINT)
    child.process.join(0.5)
    assert child.process.exitcode is None  # the step is finished first
    began = time.monotonic()
    os.kill(child.pid, signal.SIGINT)
    assert child.end(SOON) == Exit.INTERRUPTED
    assert time.monotonic() - began < SOON
    run = tiny.folder / "twice"
    assert sentence(child.said) == f"interrupted after 1 step. `stable-rlhf resume {run}` continues from step 1."


@pytest.mark.parametrize(
    "acts",
    [[servers.answer(b"", 503, Retry_After="600")], [servers.answer(b"", 503, Retry_After="6"), servers.hang]],
    ids=["asks for ten minutes", "is asked again and hangs"],
)
def test_a_signal_while_a_reward_server_is_away_is_not_kept_waiting_by_it(tiny: Tiny, acts: list[servers.Act]) -> None:
    """It has answered the trial and the evaluation, and fails from the first step on."""
    name = f"away-{len(acts)}"
    with servers.misbehaving(*[servers.score] * 2, *acts) as server:
        more = ("--reward.url", server.url, "--reward.functions", '["builtin"]', "--reward.max_wait", "3600")
        child = children.start(tiny.arguments(name, *more), tiny.folder / f"{name}.txt", int)
        for _ in range(3000):
            if len(server.requests) == 2 + len(acts):
                break
            time.sleep(0.02)
        time.sleep(0.5)  # the answer is read, and the pause or the wait has begun
        os.kill(child.pid, signal.SIGTERM)
        assert child.end(SOON) == Exit.TERMINATED
        assert len(server.requests) == 2 + len(acts)
    told, _, last = child.said.splitlines()[-3:]
    assert "gives no scores (HTTP 503: ''); waiting, at most reward.max_wait=3600 s" in told
    run = tiny.folder / name
    assert last == f"stable-rlhf: interrupted after 0 steps. `stable-rlhf resume {run}` continues from step 0."


def test_a_sigterm_before_the_first_step_stops_at_once(tiny: Tiny) -> None:
    """In the evaluation before training nothing has been learned that could be lost."""
    said = tiny.folder / "early-blocks"
    child = children.start(
        tiny.arguments("early"), tiny.folder / "early.txt", partial(injections.blocking_reward, -1, BLOCK, said)
    )
    arrives(said, child)
    os.kill(child.pid, signal.SIGTERM)
    assert child.end(SOON) == Exit.TERMINATED
    assert sentence(child.said) == "interrupted after 0 steps. There is no checkpoint to resume from yet: start again."
    code, said_then = tiny.run(["resume", str(tiny.folder / "early")])
    assert code == Exit.BAD_INPUT
    assert "has no checkpoint to resume from; start again with `stable-rlhf train" in sentence(said_then)
    assert tiny.train("early") == tiny.folder / "early"  # the folder is still free


@pytest.mark.parametrize(
    ("part", "turn", "step"),
    [
        ("checkpoints/.writing-step-000002/manifest.json", 1, 2),  # while a checkpoint is being written
        ("snapshot/.writing-step-000003/state.json", 1, 3),  # after a step that no checkpoint was due at
        ("final/config.json", 1, STEPS),
        ("evaluation.json", 4, STEPS),
    ],
)
def test_a_sigterm_while_files_are_written_loses_nothing(
    tiny: Tiny, expected: dict[str, bytes], part: str, turn: int, step: int
) -> None:
    name = f"writing-{len(part)}"  # not the part itself, which would be in every path
    run = tiny.folder / name
    send = partial(injections.terminate_at, part, run, signal.SIGTERM, turn)
    code, said = tiny.run(tiny.arguments(name), send)
    assert code == Exit.TERMINATED, said
    assert sentence(said) == f"interrupted after {step} steps. `stable-rlhf resume {run}` continues from step {step}."
    saved, damaged = newest(run / "checkpoints")
    assert (steps_of(saved), damaged) == (step, [])
    assert not list(run.glob("checkpoints/.*"))
    code, said = tiny.run(["resume", str(run)])
    assert (code, said.count("\n")) == (Exit.DONE, 1), said
    assert said.startswith("6 steps done, reward ")
    assert_same(run, expected)


def test_a_signal_between_two_steps_is_kept_for_the_end_of_the_next_wait() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as raised, GracefulStop() as stop:  # noqa: PT012
        with stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM  # and nothing has been raised
        raise AssertionError("it went on")
    assert raised.value.signum == signal.SIGTERM


def test_handlers_are_what_they_were_afterwards(tokenizer, tmp_path: Path) -> None:
    def handler(signum, frame) -> None:
        raise AssertionError("not called")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer(settings(tmp_path / "run", max_steps=1), tokenizer).train()
        assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(ConfigError, match="holds a run already"):
            trainer(settings(tmp_path / "run", max_steps=1), tokenizer).train()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        for number, function in before.items():
            signal.signal(number, function)


def test_training_works_in_another_thread(tokenizer, tmp_path: Path) -> None:
    thread = threading.Thread(target=trainer(settings(tmp_path, max_steps=1), tokenizer).train)
    thread.start()
    thread.join(60)
    assert [row["step"] for row in rows(tmp_path)] == [0]
    assert (tmp_path / "final" / "model.safetensors").is_file()
    RunLock(tmp_path).take()  # it is free


# -- the lock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_steps", ["0", "1"])
def test_a_run_that_is_alive_is_left_alone_and_its_process_named(tiny: Tiny, save_steps: str) -> None:
    """With a checkpoint or without one yet; and after kill -9 nothing is locked."""
    name = f"alive-{save_steps}"
    run = tiny.folder / name
    child = blocked(tiny, name, BLOCK, "--save_steps", save_steps)
    owner = json.loads((run / ".owner.json").read_text())
    assert (owner["pid"], owner["host"]) == (child.pid, socket.gethostname())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    for command in (["resume", str(run)], tiny.arguments(name)):
        code, said = tiny.run(command)
        assert code == Exit.BAD_INPUT
        assert sentence(said) == (
            f"output_dir={str(run)!r}: is in use by process {child.pid} on {socket.gethostname()}, training since "
            f"{owner['since']}; wait for it, stop it, or choose another folder"
        )
    assert before == {path: path.stat().st_mtime_ns for path in before}
    child.process.kill()
    assert child.end() == -signal.SIGKILL
    code, said = tiny.run(["resume", str(run)])
    assert (code, "in use" in said) == (Exit.DONE if save_steps == "1" else Exit.BAD_INPUT, False)
    assert not (run / ".owner.json").exists()


def test_of_two_processes_in_one_folder_exactly_one_trains(tiny: Tiny, expected: dict[str, bytes]) -> None:
    arguments = tiny.arguments("both", "--save_steps", "0")
    pair = [children.start(arguments, tiny.folder / f"both-{i}.txt") for i in range(2)]
    codes = [child.end() for child in pair]
    assert sorted(codes) == [Exit.DONE, Exit.BAD_INPUT], [child.said for child in pair]
    said = sentence(pair[codes.index(Exit.BAD_INPUT)].said)
    assert "is in use by " in said or "holds a run already" in said
    assert_same(tiny.folder / "both", expected)


def test_a_resume_of_a_finished_run_and_one_with_other_settings_say_so(tiny: Tiny) -> None:
    run = tiny.train("done", "--max_steps", "2")
    code, said = tiny.run(["resume", str(run)])
    assert code == Exit.DONE
    assert said == (
        f"{run} is finished: 2 of 2 steps are done. To train it further: stable-rlhf resume {run} --max_steps 4\n"
    )
    file = run / "config.yaml"
    changed = yaml.safe_load(file.read_text())
    changed["optim"]["gamma"] = 0.5
    file.write_text(yaml.safe_dump(changed))
    code, said = tiny.run(["resume", str(run), "--max_steps", "4"])
    assert code == Exit.BAD_INPUT
    assert sentence(said) == (
        "optim.gamma is 0.5 here and 1.0 in the checkpoint: resume with the run's own, or start a new run"
    )
    assert len(read_rows(run / "metrics.jsonl")[0]) == 2
