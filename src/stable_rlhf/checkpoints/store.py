"""Checkpoints on disk: everything that affects a run's future, saved between rollouts as safetensors and JSON.

A checkpoint is a folder ``step-000040`` (40 steps done) with ``model.safetensors``, ``optimizer.safetensors``,
``random.safetensors``, ``state.json`` and ``manifest.json``, which lists them with their SHA-256.

1. It is written aside (``.writing-step-000040``), flushed, read back from the disk, and renamed only if it is whole.
2. Where the same step is saved again, the old one is ``.replaced-step-000040`` until the new one has its name and is
   flushed.
3. A checkpoint to be removed is first renamed to ``.removed-step-000040``: a kill in between leaves nothing that looks
   damaged.
4. Leftovers of a kill are cleared by the next save or resume. Looking for the newest changes nothing.
5. A damaged one is never used and never counted as kept. A resume from an earlier one renames it to
   ``damaged-step-000040``, for a person to look at.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stable_rlhf.checkpoints.manifest import Manifest, check
from stable_rlhf.errors import CheckpointError, NoRoomError, SaveError
from stable_rlhf.files import NO_ROOM, error_number, parsed

HASHED_BY_ROTATION = 1 << 30
"""Bytes up to which an older checkpoint is hashed before a save counts it as kept: 0.6 s for a GiB on one core. Of a
longer one only manifest, names and lengths are compared, since hashing would take as long as saving. The one just
written has been read back, so there is a whole one whatever became of the others."""

_NAME = re.compile(r"(?:\.replaced-)?step-([0-9]{6,})")

_LEFTOVER = re.compile(r"\.(writing|replaced|removed)-(step-[0-9]{6,})")

_REMEDY = (
    "choose an older checkpoint of the run (--checkpoint of `resume`, in Python resume_from_checkpoint), or start a "
    "new run"
)


def at(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` steps done is, or would be."""
    return folder / f"step-{step:06d}"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    spared: int | None = None,
) -> Path:
    """Writes ``folder/step-<step>`` and removes all but the newest ``keep`` whole ones. Returns the new one's path.

    The checkpoint of ``spared`` steps, such as the best one, stays too and is not counted.

    Raises SaveError where it cannot be written, NoRoomError where the disk has too little room; nothing of it is left
    then, and the older ones are unchanged.
    """
    final = at(folder, step)
    aside = folder / f".writing-{final.name}"
    encoded = _encoded({"step": step, **state})
    try:
        _make(folder)
        _clear(folder)
        aside.mkdir()
        _write(aside, step, tensors, encoded)
        _put(aside, final)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)  # what resists is cleared by the next save
        if (number := error_number(error)) is None:
            raise
        length = len(encoded) + sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        raise _not_written(final, length, number, error) from error
    _rotate(final, keep, spared)
    return final


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first.

    ``.replaced-step-...``, which only a kill leaves, comes before the other one of its step, which may be missing.
    """
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (steps_of(path), path.name))


def steps_of(path: Path) -> int:
    """Steps done at a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


def inspect(folder: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest whole checkpoint, or None; also returns a clause on what is wrong with each newer one.

    Changes nothing. It hashes what it looks at: a second for every 2 GB.
    """
    damaged: list[str] = []
    for path in reversed(found(folder)):
        try:
            _check(path)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged


def newest(folder: Path) -> tuple[Path, list[str]]:
    """The same as ``inspect``, except that it raises CheckpointError where no checkpoint is whole or none exists."""
    path, damaged = inspect(folder)
    if path is not None:
        return path, damaged
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}: restore one from a copy, or start a new run")
    raise CheckpointError(f"{folder.parent} has no checkpoint: start a new run")


def forget_after(folder: Path, step: int) -> list[Path]:
    """Removes the checkpoints of more than ``step`` steps, since a run that resumes there takes another course.

    If they stayed, the next resume would take one of them for the newest, and a save would count it as one to keep.
    Damaged ones are renamed to ``damaged-step-...`` instead, as they may be all that is left of those steps. Returns
    these.
    """
    _clear(folder)
    kept: list[Path] = []
    for path in found(folder):
        if steps_of(path) > step:
            if _is_whole(path):
                _remove(path)
            else:
                kept.append(_set_aside(path))
    return kept


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Loads a checkpoint: (tensors by group, state). Raises CheckpointError where a file is missing or has changed.

    Everything is verified before anything is parsed. The file is read, not mapped as safetensors does by default: a
    later change to a mapped file would change the tensors too.
    """
    try:
        manifest = _check(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {_REMEDY}") from error
    try:
        state = parsed((path / "state.json").read_bytes())
        if not isinstance(state, dict) or state.get("step") != manifest.step:
            raise ValueError(f"state.json is not the state of step {manifest.step}")
        files = [path / name for name in manifest.files if name.endswith(".safetensors")]
        tensors = {file.stem: load_file(file, backend="pread") for file in files}
    except (OSError, ValueError, SafetensorError, RuntimeError, TypeError) as error:  # the last two: torch, of a shape
        fault = str(error).partition("\n")[0]  # torch adds a stack
        raise CheckpointError(f"{path} does not hold the state of a run ({fault}): {_REMEDY}") from error
    return tensors, state


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Raises CheckpointError, while a loaded state is restored, if a part of it is missing or of another kind."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} does not hold the state of a run ({fault}): {_REMEDY}") from error


# -- writing ------------------------------------------------------------------------------------------------------


def _write(aside: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
    for name, group in tensors.items():
        # Copies: safetensors refuses tensors that share memory, and stores no views.
        own = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in group.items()}
        save_file(own, aside / f"{name}.safetensors")
    (aside / "state.json").write_bytes(state)
    written = Manifest.of(aside, step)
    (aside / "manifest.json").write_bytes(written.encoded())
    for file in aside.iterdir():
        _flush(file, forget=True)
    _flush(aside)
    try:
        whole = check(aside) == written
    except ValueError as error:
        raise _unlike(aside, str(error)) from error
    if not whole:
        raise _unlike(aside, "manifest.json is another one")


def _unlike(aside: Path, fault: str) -> SaveError:
    return SaveError(
        f"{aside}, read back, differs from what was written ({fault}): the disk or the memory of this machine is "
        "failing; earlier checkpoints are unchanged; use another disk or machine"
    )


def _put(aside: Path, final: Path) -> None:
    """Gives a new checkpoint its name. A kill at any point leaves the old or the new one where ``found`` finds it."""
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    _flush(final.parent)


def _make(folder: Path) -> None:
    if folder.is_dir():
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True)
    for path in [*missing, missing[-1].parent]:  # the last: the run's folder, which is new too
        if os.access(path.parent, os.R_OK):  # what may not be listed cannot be flushed
            _flush(path.parent)


def _flush(path: Path, forget: bool = False) -> None:
    """Flushes a file's content, or a folder's names, to the disk.

    ``forget`` makes the next read come from the disk, on systems that can.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


def _encoded(state: dict[str, Any]) -> bytes:
    for name, part in state.items():
        try:
            json.dumps(part, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SaveError(
                f"the checkpoint of step {state['step']} could not be written: its {name!r} has a value that JSON "
                f"cannot hold, such as a number that is not finite ({error}); correct where it comes from"
            ) from error
    return json.dumps(state, indent=1).encode()


def _not_written(final: Path, length: int, number: int, error: BaseException) -> SaveError:
    what = f"{final} could not be written: {os.strerror(number) if number else error}"
    kept = "earlier checkpoints are unchanged; " if found(final.parent) else ""
    if number not in NO_ROOM:
        return SaveError(f"{what}; {kept}correct that")
    near = next(path for path in final.parents if path.is_dir())
    free = shutil.disk_usage(near).free
    odd = ", so a quota, the number of files or the length of a file is at its limit" if free > length else ""
    return NoRoomError(
        f"{what}; it needs {length:,} bytes in {final.parent}, where {free:,} are free{odd}; {kept}{NO_ROOM[number]}"
    )


# -- what is there ------------------------------------------------------------------------------------------------


def _check(path: Path, hashed: bool = True) -> Manifest:
    """Checks a checkpoint by `manifest.check`, and that its name is its step. Raises CheckpointError."""
    try:
        manifest = check(path, hashed)
        if _NAME.fullmatch(path.name) and steps_of(path) != manifest.step:
            raise ValueError(f"it was saved as step {manifest.step}; rename it back")
    except OSError as error:
        fault = f"{Path(error.filename or path).name}: {error.strerror or error}"
        raise CheckpointError(f"{path} is not a whole checkpoint ({fault})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error})") from error
    return manifest


def _is_whole(path: Path, longest_hashed: float = math.inf) -> bool:
    try:
        if _check(path, hashed=False).length <= longest_hashed:
            _check(path)
    except CheckpointError:
        return False
    return True


def _rotate(final: Path, keep: int, spared: int | None) -> None:
    """Removes all but the newest ``keep`` whole ones and ``spared``, and the one that ``final`` has replaced.

    ``final`` was read back a moment ago and counts as whole.
    """
    whole = 0
    for path in reversed(found(final.parent)):
        if path == final:
            whole += 1
        elif spared is not None and path == at(final.parent, spared):
            continue
        elif whole < keep and path.name.startswith("step-"):
            whole += _is_whole(path, HASHED_BY_ROTATION)
        else:
            try:
                _remove(path)
            except OSError as error:
                reason = error.strerror or error
                raise SaveError(f"{path} cannot be removed ({reason}): remove it") from error


def _clear(folder: Path) -> None:
    """Removes what a kill has left. A replaced checkpoint takes its name back, unless a whole one has it."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (match := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        final = folder / match[2]
        if match[1] == "replaced" and not (final.exists() and _is_whole(final)):
            if final.exists():
                _set_aside(final)
            path.rename(final)
        else:
            _remove(path)


def _set_aside(path: Path) -> Path:
    name = f"damaged-step-{steps_of(path):06d}"
    taken = {other.name for other in path.parent.iterdir()}
    free = next(name for name in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if name not in taken)
    return path.rename(path.with_name(free))


def _remove(path: Path) -> None:
    removed = path.with_name(f".removed-step-{steps_of(path):06d}")
    if path != removed:
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
    if removed.is_dir() and not removed.is_symlink():
        shutil.rmtree(removed)
    else:
        removed.unlink()
