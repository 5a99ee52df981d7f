"""Cells on the hosts of a Ray cluster: each is an actor that holds the resources and starts the cell's process.

The sweep's folder must be one that every host sees. Needs the extra `ray`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_rlhf.errors import ConfigError, Exit
from stable_rlhf.evidence.devices import Place
from stable_rlhf.evidence.processes import COMMAND, Job, Processes, send
from stable_rlhf.runs import sweeps

PATIENCE = 10.0
"""Seconds in which a cluster's host must answer."""

LOST = -signal.SIGKILL
"""Exit code of a cell whose host or actor was lost: as if it had been killed there, it is resumed by the next sweep."""


def parse_resources(text: str) -> dict[str, float]:
    """`GPU=1,CPU=4` as a mapping. Raises ConfigError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w.:-]+)\s*=\s*(\d+(?:\.\d+)?|\.\d+)\s*", part)
        if match is None or float(match[2]) == 0 or match[1] in found:
            raise ConfigError(f"--resources {text}: give NAME=NUMBER,... such as GPU=1,CPU=4")
        found[match[1]] = float(match[2])
    return found


class Cluster:
    """Starts cells on a Ray cluster.

    Each gets ``resources``; by default a GPU and a CPU where the cluster has GPUs, else a CPU. ``jobs``: most cells at
    a time; None is as many as the cluster has room for now. Raises ConfigError if there is no such cluster, or if no
    host has these resources.
    """

    def __init__(self, out: Path, address: str | None, resources: Mapping[str, float] | None, jobs: int | None) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("--launcher ray: Ray is not installed; `pip install 'stable-rlhf[ray]'`") from error
        self._ray: Any = ray
        self._out = out.absolute()
        if address is not None and address not in ("auto", "local"):
            check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            shown = f"--address {_without_secrets(address)}" if address else "--launcher ray"
            raise ConfigError(f"{shown}: {' '.join(str(error).split())[:300]}; start one with `ray start`") from error
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has_gpu = any(host.get("GPU", 0) >= 1 for host in hosts)
        self.resources = dict(resources or ({"GPU": 1, "CPU": 1} if has_gpu else {"CPU": 1}))
        room = sum(_room(host, self.resources) for host in hosts)
        if room == 0:
            self.close()
            asked = ", ".join(f"{name}={number:g}" for name, number in self.resources.items())
            raise ConfigError(f"--resources {asked}: no host of the cluster has that much; ask for less")
        threads = max(1, int(self.resources.get("CPU", 1)))
        self.places: Sequence[Place] = [Place(gpu=None, threads=threads)] * (room if jobs is None else jobs)
        self.hosts = len(hosts)

    def start(self, arguments: list[str], place: Place, log: Path) -> Job:
        others = {name: number for name, number in self.resources.items() if name not in ("CPU", "GPU")}
        made = self._ray.remote(_Cell).options(
            num_cpus=self.resources.get("CPU", 0), num_gpus=self.resources.get("GPU", 0), resources=others
        )
        actor = made.remote()
        started = actor.start.remote(str(self._out), os.getcwd(), arguments, place, str(log.absolute()))
        return _Remote(self._ray, actor, started, log)

    def close(self) -> None:
        self._ray.shutdown()


def check_reachable(address: str) -> None:
    """Raises ConfigError if nothing listens at HOST:PORT or ray://HOST:PORT; Ray itself would try for minutes."""
    host, _, port = _without_secrets(address).rpartition(":")
    shown = f"--address {_without_secrets(address)}"
    if not host or not port.isdecimal():
        raise ConfigError(f"{shown}: give HOST:PORT, ray://HOST:10001 or auto")
    try:
        socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{shown}: nothing answers there ({error}); start a cluster with `ray start`") from error


def _without_secrets(address: str) -> str:
    scheme, separator, rest = address.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _room(host: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """Cells that fit on a host."""
    return int(min(host.get(name, 0.0) / number for name, number in resources.items()))


class _Cell:
    """The actor, on the cell's host. Its process ends with it, and it ends with the sweep."""

    def __init__(self) -> None:
        # Ctrl-C in a terminal with a local cluster: the sweep passes it on. Not SIG_IGN, which the cell would inherit.
        signal.signal(signal.SIGINT, lambda number, frame: None)
        self._process: Job | None = None

    def start(self, out: str, folder: str, arguments: list[str], place: Place, log: str) -> None:
        if not os.path.isfile(Path(out) / sweeps.ASKED):
            raise FileNotFoundError(f"{socket.gethostname()} does not see {out}; --out must be a folder of all hosts")
        os.chdir(folder)
        self._process = Processes([place], COMMAND).start(arguments, place, Path(log))

    def poll(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def send_signal(self, number: int) -> None:
        if self._process is not None:
            send(self._process, number)


class _Remote:
    """A cell's actor, as the sweep sees it: nothing here waits for the cluster."""

    def __init__(self, ray: Any, actor: Any, started: Any, log: Path) -> None:
        self._ray, self._actor, self._started, self._log = ray, actor, started, log
        self._asked: Any = None
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and self._is_ready(self._started):
            try:
                self._ray.get(self._started)
                self._asked = self._asked or self._actor.poll.remote()
                if self._is_ready(self._asked):
                    self._code, self._asked = self._ray.get(self._asked), None
            except self._ray.exceptions.RayActorError:
                self._code = LOST
            except self._ray.exceptions.RayTaskError as error:
                with self._log.open("a", encoding="utf-8") as file:
                    file.write(f"stable-rlhf: {' '.join(str(error.cause).split())}\n")
                self._code = Exit.FAILED
            if self._code is not None:
                self._ray.kill(self._actor)  # it gives its resources back
        return self._code

    def send_signal(self, number: int) -> None:
        if self._code is None and self._is_ready(self._started):
            self._actor.send_signal.remote(number)
        elif self._code is None:  # it waits for a place in the cluster
            self._ray.kill(self._actor)
            self._code = 128 + number

    def _is_ready(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])
