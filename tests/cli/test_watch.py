"""The command `watch`: what it prints, its exit codes, its end by a signal, and the shell example of docs/watch.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from stable_rlhf.cli.main import main
from tests.evidence.test_watched import healthy, jsonl, since, trl_rows, trl_state

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "stable_rlhf", "watch"]


def watch(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """(exit code, lines on stdout, stderr)."""
    code = main(["watch", *arguments])
    shown = capsys.readouterr()
    return code, shown.out.splitlines(), shown.err


def test_a_healthy_log_ends_with_0_and_one_that_fails_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(jsonl(tmp_path / "log.jsonl", healthy(60)))
    code, lines, errors = watch(capsys, log, "--completions", "64")
    assert (code, lines[-1], errors) == (0, f"{log}: nothing found in 60 steps", "")
    jsonl(tmp_path / "log.jsonl", since(30, healthy(60), kl=2.1))
    code, lines, errors = watch(capsys, log, "--completions=64", "--max_steps", "1e2")
    assert (code, errors) == (3, "")
    assert lines[-2].startswith(
        "step 30: the KL is 2.1 nats per token, above its ceiling of 2: the run should be stopped"
    )
    assert lines[-1] == f"{log}: the guard stops the run at step 30 (rule max_kl); 29 later rows not judged"


def test_settings_of_the_guard_are_flags_as_those_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = str(jsonl(tmp_path / "log.jsonl", since(30, healthy(60), kl=2.1, entropy=0.1)))
    assert watch(capsys, log, "--guard.max_kl", "1e1", "--guard.min_entropy=null")[0] == 0
    assert watch(capsys, "--guard.max_kl", "1e1", log)[1][-1].endswith("(rule min_entropy); 25 later rows not judged")
    assert watch(capsys, log, "--budget", "2")[0] == 0
    assert watch(capsys, log, "--budget", "2", "--guard.max_kl_ratio", "1.04")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.csv"], "none.csv does not exist; check the path"),
        (["log.csv"], "log.csv:3: kl is 'x', which is not a number; correct the value"),
        (["log.csv", "--guard.max_kl", "x"], "guard.max_kl='x': give a finite number, or null"),
        (["log.csv", "--guard.patience", "0"], "guard.patience=0: must be greater than 0"),
        (["log.csv", "--guard.max_rollbacks", "2"], "--guard.max_rollbacks='2': has no effect on a log"),
        (["log.csv", "--guard.max_kl", "1", "--budget", "1"], "--guard.max_kl='1': has no effect with --budget"),
        (["log.csv", "--guard.min_entropi", "1"], "unrecognized arguments: --guard.min_entropi"),
        (["log.csv", "--budget", "nan"], "--budget=nan: give nats per token, above 0"),
        (["log.csv", "--completions", "0"], "--completions=0: must be 1 or more"),
        (["log.csv", "--every", "1"], "--every=1.0: has no effect without --follow"),
        (["log.csv", "--follow", "--every", "0"], "--every=0.0: give a number of seconds above 0"),
        (["run", "--mapping", "m.yaml"], "--mapping m.yaml: has no effect"),
        (["log.csv", "--mapping", "m.yaml"], "m.yaml: No such file or directory; check the path"),
        (["log.csv", "--out", "."], "--out='.': has a config.yaml that `watch` did not write"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text("step,reward,kl\n1,1,0.1\n2,1,x\n")
    (tmp_path / "config.yaml").write_text("max_steps: 1\n")
    code, lines, errors = watch(capsys, *arguments)
    assert (code, lines, errors.count("\n")) == (2, [], 1)
    assert said in errors


def test_the_folder_has_a_report_whose_path_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trl_state(tmp_path / "run", trl_rows(since(30, healthy(60), kl=2.1)), planned=100)
    out = tmp_path / "out"
    code, lines, _ = watch(capsys, str(run), "--out", str(out))
    assert (code, lines[-1]) == (3, f"Report: {out / 'report.html'}")
    assert "Ended by the guard: 31 of 100 steps" in (out / "report.html").read_text()
    assert main(["report", str(out)]) == 0


def test_names_from_the_file_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "rewards/\x1b[2J/mean"
    log = jsonl(tmp_path / "log.jsonl", [{"step": 1, name: float("nan")}])
    (tmp_path / "m.yaml").write_text(json.dumps({"step": "step", name: name}))
    code, lines, _ = watch(capsys, str(log), "--mapping", str(tmp_path / "m.yaml"))
    assert code == 3
    assert lines[-2].startswith(r"step 0: rewards/\x1b[2J/mean is nan: the run should be stopped")


# -- processes ------------------------------------------------------------------------------------------------------


def shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a shell script in a folder, with our command before all others."""
    path = folder / "bin"
    path.mkdir()
    (path / "stable-rlhf").write_text(f'#!/bin/sh\nexec {sys.executable} -m stable_rlhf "$@"\n')
    (path / "stable-rlhf").chmod(0o755)
    (path / "python").symlink_to(sys.executable)
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    done = ["bash", "-c", text]
    return subprocess.run(done, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def trainer(rows: Sequence[dict[str, object]], end: str) -> str:
    """A script that writes the rows to log.jsonl, one in 20 ms, and then does something."""
    return f"""import json, sys, time
for row in json.loads({json.dumps(json.dumps(list(rows)))}):
    with open("log.jsonl", "a") as file:
        file.write(json.dumps(row) + chr(10))
    time.sleep(0.02)
{end}
"""


def test_a_script_sees_the_exit_code_of_a_run_that_should_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(trainer(since(30, healthy(60), kl=2.1), "time.sleep(50)"))
    text = "python train.py & job=$!; stable-rlhf watch log.jsonl --follow --every 0.05 || { echo stop $?; kill $job; }"
    done = shell(text, tmp_path)
    assert done.stdout.splitlines()[-1] == "stop 3"
    assert "step 30: the KL is 2.1" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("rows", "end", "code", "said"),
    [
        (since(30, healthy(60), kl=2.1), "time.sleep(50)", 128 + signal.SIGTERM, "step 30: the KL is 2.1"),
        (healthy(10), "sys.exit(7)", 7, ""),
        (healthy(10), "sys.exit(3)", 3, ""),
    ],
)
def test_the_script_of_the_page_stops_a_job_that_fails_and_no_other(
    tmp_path: Path, rows: list[dict[str, object]], end: str, code: int, said: str
) -> None:
    page = (ROOT / "docs" / "watch.md").read_text(encoding="utf-8")
    (script,) = [text for text in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "wait -n" in text]
    (tmp_path / "train.py").write_text(trainer(rows, end))
    done = shell(script.replace("--follow", "--follow --every 0.05"), tmp_path)
    assert (done.returncode, done.stderr) == (code, "")
    assert said in done.stdout


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_following_with_its_code_and_the_verdict_so_far(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    log, out = jsonl(tmp_path / "log.jsonl", healthy(10)), tmp_path / "out"
    command = [*COMMAND, str(log), "--follow", "--every", "0.05", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 30
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 10:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signum)
        shown, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (code, "")
    assert shown.splitlines()[-2:] == [f"{log}: nothing found in 10 steps", f"Report: {out / 'report.html'}"]
    assert not (out / ".owner.json").exists()


def test_a_full_disk_is_exit_code_5(tmp_path: Path) -> None:
    log = jsonl(tmp_path / "log.jsonl", healthy(60))
    limit = f"ulimit -f 4; stable-rlhf watch {log} --out {tmp_path / 'out'}"
    done = shell(f"trap '' XFSZ; {limit}", tmp_path)
    assert done.returncode == 5
    assert "could not be written" in done.stderr
    shutil.rmtree(tmp_path / "out")
