"""Checkpoints under fire: bytes flipped, files cut, a save killed, a disk that is full.

A checkpoint's content here is a function of its step and of the attempt at it, so that whatever is loaded can be told
from anything that was not saved.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.checkpoints import store
from stable_rlhf.errors import CheckpointError, NoRoomError
from tests.faults.children import CHILDREN
from tests.faults.counts import Counts

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where a disk's flushes would take most of the time and change nothing: a kill loses nothing that the system has."""
WORDS = 2048
"""Numbers in the largest tensor: 8 kB, so that a save is short and a kill hits any part of it."""


def content(step: int, attempt: int = 0) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Three groups as the trainer has them, and a state; every number depends on step and attempt."""
    seed = 1000 * step + attempt
    moments = {"0.exp_avg": torch.arange(WORDS // 4) * 0.5 + seed, "0.step": torch.tensor(float(seed))}
    model = {"policy.weight": (torch.arange(float(WORDS)) + seed).view(2, -1), "heads.bias": torch.tensor([seed])}
    generators = {"cpu": torch.tensor([seed % 256, 1, 2], dtype=torch.uint8)}
    state = {"attempt": attempt, "episode": seed / 3, "prompts": {"order": list(range(seed % 7, 20))}}
    return {"model": model, "optimizer": moments, "random": generators}, state


def save(folder: Path, step: int, attempt: int = 0, keep: int = 2) -> Path:
    tensors, state = content(step, attempt)
    return store.save(folder, step, tensors, state, keep)


def read(path: Path) -> tuple[int, int]:
    """(step, attempt) of a checkpoint. Raises AssertionError unless all of it is what was saved for these."""
    tensors, state = store.load(path)
    step, attempt = state.pop("step"), state["attempt"]
    expected, expected_state = content(step, attempt)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    for name, group in expected.items():
        assert tensors[name].keys() == group.keys()
        for key, tensor in group.items():
            loaded = tensors[name][key]
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(loaded, tensor)
    return step, attempt


def flip_bytes(count: int, seed: int) -> Counts:
    """A byte changed at a random place of a random file of the newest checkpoint: refused, and the older one found."""

    def change(file: Path, chance: random.Random) -> str:
        damaged = bytearray(file.read_bytes())
        place, flip = chance.randrange(len(damaged)), chance.randrange(1, 256)
        damaged[place] ^= flip
        file.write_bytes(damaged)
        return f"byte {place} of {file.name} xor {flip}"

    return _damage(count, seed, change)


def cut_files(count: int, seed: int) -> Counts:
    """A random file of the newest checkpoint cut to a random length, or filled up to a longer one with zeros."""

    def change(file: Path, chance: random.Random) -> str:
        length = file.stat().st_size
        new = chance.choice([chance.randrange(length), length + chance.randrange(1, 5000)])
        os.truncate(file, new)
        return f"{file.name} of {length} bytes made {new} long"

    return _damage(count, seed, change)


def _damage(count: int, seed: int, change: Callable[[Path, random.Random], str]) -> Counts:
    chance, survived, lost = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "checkpoints"
        older, newer = save(folder, 2), save(folder, 4)
        names = sorted(file.name for file in newer.iterdir())
        for _ in range(count):
            file = newer / chance.choice(names)
            before = file.read_bytes()
            what = change(file, chance)
            with contextlib.suppress(CheckpointError):
                store.load(newer)
                lost.append(f"{what}: loaded")
            path, damaged = store.newest(folder)
            if path == older and len(damaged) == 1 and str(newer) in damaged[0] and read(path) == (2, 0):
                survived += 1
            else:
                lost.append(f"{what}: {path} was the newest, {damaged} damaged")
            file.write_bytes(before)
        assert read(newer) == (4, 0)
    return Counts(count, survived, tuple(lost))


def kill_saves(count: int, seed: int) -> Counts:
    """A process that saves without pause, every third step twice, killed at random moments."""
    chance, survived, lost = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "checkpoints"
        last = (0, 0)
        for _ in range(count):
            receive, send = CHILDREN.Pipe(duplex=False)
            child = CHILDREN.Process(target=_save_for_ever, args=(folder, last[0] + 1, send))
            child.start()
            send.close()
            receive.poll(60)  # its first checkpoint is there
            time.sleep(chance.random() / 20)  # up to about ten saves more
            child.kill()
            child.join()
            done = last
            with contextlib.suppress(EOFError):
                while True:
                    done = receive.recv()
            receive.close()
            try:
                assert done > last, "it did not save"
                assert child.exitcode == -signal.SIGKILL, f"it ended with {child.exitcode}"
                # Whole, and no older than the last that was said to be saved.
                path, damaged = store.newest(folder)
                assert read(path) in (done, _next(done)), f"{path.name} after {done} were saved"
                assert not damaged, damaged
                survived += 1
            except (AssertionError, CheckpointError) as error:
                lost.append(f"killed after {done}: {error}")
            last = max(done, read(path)[:2])
    return Counts(count, survived, tuple(lost))


def _next(done: tuple[int, int]) -> tuple[int, int]:
    step, attempt = done
    return (step, 1) if step % 3 == 0 and attempt == 0 else (step + 1, 0)


def _save_for_ever(folder: Path, step: int, send: Connection) -> None:
    torch.set_num_threads(1)
    at = (step, 0)
    while True:
        save(folder, *at)
        send.send(at)
        at = _next(at)


def kill_at_every_operation() -> Counts:
    """A save of a new step, and of the same step again, killed at each of its operations on files, one by one.

    Python's audit events tell them: every open, rename, mkdir, listing and removal of a save is one.
    """
    survived, lost, number = 0, [], 0
    for step, attempt in ((6, 0), (4, 1)):
        for operation in range(1, 1000):
            with tempfile.TemporaryDirectory(dir=MEMORY) as made:
                folder = Path(made) / "checkpoints"
                save(folder, 2), save(folder, 4)
                child = CHILDREN.Process(target=_save_and_die, args=(folder, step, attempt, operation))
                child.start()
                child.join()
                if child.exitcode == 0:  # it has fewer operations than that
                    assert read(store.newest(folder)[0]) == (step, attempt)
                    break
                number += 1
                try:
                    assert child.exitcode == -signal.SIGKILL, f"it ended with {child.exitcode}"
                    path, damaged = store.newest(folder)
                    assert read(path) in ((4, 0), (step, attempt)), path
                    assert not damaged, damaged
                    save(folder, 8)  # the run goes on, and clears what was left
                    whole = [(4, 0), (4, 1), (6, 0)]
                    assert [read(path) for path in store.found(folder)] in [[at, (8, 0)] for at in whole]
                    assert sorted(folder.iterdir()) == store.found(folder), sorted(folder.iterdir())
                    survived += 1
                except (AssertionError, CheckpointError) as error:
                    lost.append(f"saving {(step, attempt)}, killed at operation {operation}: {error}")
    return Counts(number, survived, tuple(lost))


def _save_and_die(folder: Path, step: int, attempt: int, operation: int) -> None:
    torch.set_num_threads(1)
    left = operation

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    tensors, state = content(step, attempt)
    sys.addaudithook(count)
    store.save(folder, step, tensors, state, 2)
    os._exit(0)  # whatever Python opens at its end is no operation of the save


def long_files(count: int) -> Counts:
    """Files may be only so long: `count` limits from nothing to the length of the longest file. Needs no rights."""
    with tempfile.TemporaryDirectory() as made:
        longest = max(file.stat().st_size for file in save(Path(made), 2).iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited(folder: Path, room: int) -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # Python ignores the signal: it is an error then
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with tempfile.TemporaryDirectory() as made:
        return _without_room(Path(made), [i * (longest - 1) // max(1, count - 1) for i in range(count)], limited)


def full_disk(count: int) -> Counts:
    """A small file system of its own with `count` amounts of room left, from nothing to nearly enough.

    Raises PermissionError where none may be mounted.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as made:
        need = sum(-(-file.stat().st_size // page) * page for file in save(Path(made), 2).iterdir())

    @contextlib.contextmanager
    def filled(folder: Path, room: int) -> Iterator[None]:
        ballast = folder.parent / "ballast"
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - room)))
        try:
            yield
        finally:
            ballast.unlink()

    with small_disk(64 * need) as disk:
        return _without_room(disk, [i * (need - page) // max(1, count - 1) for i in range(count)], filled)


def _without_room(
    disk: Path, rooms: list[int], limited: Callable[[Path, int], contextlib.AbstractContextManager[None]]
) -> Counts:
    survived, lost, folder = 0, [], disk / "checkpoints"
    save(folder, 2), save(folder, 4)
    for room in rooms:
        try:
            for step, attempt in ((6, 0), (4, 1)):  # a new one, and the same again
                with limited(folder, room):
                    try:
                        save(folder, step, attempt)
                    except NoRoomError as error:
                        sentence = str(error)
                    else:
                        raise AssertionError("it was saved all the same")
                assert "it needs " in sentence, sentence
                assert "earlier checkpoints are unchanged" in sentence, sentence
                assert [path.name for path in sorted(folder.iterdir())] == ["step-000002", "step-000004"]
                assert [read(path) for path in store.found(folder)] == [(2, 0), (4, 0)]
            survived += 1
        except (AssertionError, CheckpointError, OSError) as error:
            lost.append(f"room for {room} bytes: {error!r}")
    save(folder, 6)  # with room it goes on
    assert read(store.newest(folder)[0]) == (6, 0)
    return Counts(len(rooms), survived, tuple(lost))


@contextlib.contextmanager
def small_disk(length: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={length}", "none", made]
        if shutil.which("mount") is None:
            raise PermissionError("there is no `mount` here")
        if (done := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode:
            raise PermissionError(f"no file system may be mounted here: {done.stderr.strip()}")
        try:
            yield Path(made)
        finally:
            subprocess.run(["umount", made], check=True)


FAULTS: dict[str, Callable[[int, int], Counts]] = {
    "checkpoint bytes flipped": flip_bytes,
    "checkpoint files cut or lengthened": cut_files,
    "saves killed at random": kill_saves,
    "saves killed at each operation": lambda count, seed: kill_at_every_operation(),
    "saves of files that may not be so long": lambda count, seed: long_files(count),
    "saves on a full disk": lambda count, seed: full_disk(count),
}
"""By what is done: (count, seed) -> Counts. The last needs the right to mount, or raises PermissionError."""
