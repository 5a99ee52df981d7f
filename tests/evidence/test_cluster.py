"""Cells on a Ray cluster: a local one of two CPUs. Skipped where Ray is not installed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stable_rlhf.errors import ConfigError, Exit
from stable_rlhf.evidence import cluster
from stable_rlhf.evidence.cluster import Cluster, parse_resources
from stable_rlhf.evidence.processes import COMMAND
from tests.faults.sweeps import Sweeps
from tests.faults.training import Tiny


@pytest.mark.parametrize("text", ["", "GPU", "GPU=", "GPU=0", "GPU=x", "GPU=1,GPU=2", "=1", "GPU=-1"])
def test_resources_without_their_form_cost_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--resources .*: give NAME=NUMBER"):
        parse_resources(text)


def test_resources_are_named_numbers() -> None:
    assert parse_resources("GPU=1, CPU=0.5,host:a=2") == {"GPU": 1, "CPU": 0.5, "host:a": 2}


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed; `pip install 'stable-rlhf\[ray\]'`"):
        Cluster(tmp_path, None, None, None)


def test_the_room_of_a_host_is_what_its_scarcest_resource_allows() -> None:
    host = {"CPU": 16.0, "GPU": 4.0, "memory": 1e11}
    assert cluster._room(host, {"GPU": 1, "CPU": 8}) == 2
    assert cluster._room(host, {"GPU": 0.5}) == 8
    assert cluster._room(host, {"TPU": 1}) == 0


def test_a_sweep_on_a_cluster_goes_on_after_a_kill_and_a_signal_to_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sweeps = Sweeps(Tiny.make(tmp_path))
    grid = ("--preset", "ppo", "--seeds", "3", "--max_steps", "30")
    sweeps.run("whole", *grid)
    command = [*COMMAND, *sweeps.arguments("ray", *grid), "--launcher", "ray"]
    cells = tmp_path / "ray" / "cells"
    for number, seed in ((signal.SIGKILL, 0), (signal.SIGINT, 2)):
        with (tmp_path / "said.txt").open("w") as file:
            sweep = subprocess.Popen(command, stdout=file, stderr=file)
        until = time.monotonic() + 120
        while not any(cells.glob(f"*seed={seed}/checkpoints/step-*")) and sweep.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        sweep.send_signal(number)
        code = sweep.wait(120)
        assert code == (Exit.INTERRUPTED if number == signal.SIGINT else -number), (tmp_path / "said.txt").read_text()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.DONE, done.stderr
    assert "3 of 3 cells complete" in done.stdout
    assert "to be resumed" in done.stdout
    sweeps.assert_same("ray", sweeps.results("whole"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://user:secret@127.0.0.1:1", "nonsense", "127.0.0.1:x"])
def test_a_cluster_that_is_not_there_costs_a_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^--address ") as error:
        cluster.check_reachable(address)
    assert "secret" not in str(error.value)
    assert "nothing answers" in str(error.value) or "give HOST:PORT, ray://HOST:10001 or auto" in str(error.value)


def test_resources_that_no_host_has_cost_a_sentence(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"^--resources GPU=64: no host of the cluster has that much"):
        Cluster(tmp_path, None, {"GPU": 64}, None)
    assert not ray.is_initialized()
