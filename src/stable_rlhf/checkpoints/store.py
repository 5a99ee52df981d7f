"""Checkpoints: everything that affects the future, saved at rollout boundaries. safetensors and JSON only.

A checkpoint is a folder ``step-000040`` (40 steps done) with ``model.safetensors``, ``optimizer.safetensors``,
``random.safetensors``, ``state.json`` and ``manifest.json``, which knows them by their SHA-256.

1. It is written aside (``.writing-step-000040``), flushed, read back from the disk, and renamed only if it is whole.
2. The same step again: the old one is ``.replaced-step-000040`` until the new one has its name and that is flushed.
3. What goes is first renamed to ``.removed-step-000040``: a kill on the way leaves nothing that looks damaged.
4. Leftovers of a kill are cleared by the next save or resume. Looking for the newest changes nothing.
5. A damaged one is never used and never counted as kept. A resume that goes on from before it renames it to
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
"""Bytes. An older checkpoint up to this length is hashed before a save counts it as kept: 0.6 s for a GiB on one core.
Of a longer one manifest, names and lengths are compared, as hashing it would take as long as saving does; the one just
written has been read back, so a whole one stays whatever became of the others."""


_NAME = re.compile(r"(?:\.replaced-)?step-([0-9]{6,})")


_LEFTOVER = re.compile(r"\.(writing|replaced|removed)-(step-[0-9]{6,})")


_REMEDY = "choose an older checkpoint of the run with --checkpoint, or start a new run"


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes ``folder/step-<step>``, then removes what is older than the newest ``keep`` whole ones. Returns its path.

    Raises SaveError where it cannot be written, NoRoomError for want of room; then nothing of it is left, and the older
    ones are as they were.
    """
    final = folder / f"step-{step:06d}"
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
    _rotate(final, keep)
    return final


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first.

    ``.replaced-step-...``, which only a kill leaves, comes before the one of its step: it may be all there is of it.
    """
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (steps_of(path), path.name))


def steps_of(path: Path) -> int:
    """Steps done at a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


def inspect(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint or None, what is wrong with each newer one, a clause each). Changes nothing.

    It hashes what it looks at: a second for every 2 GB.
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
    """As ``inspect``. Raises CheckpointError where no checkpoint is whole, or none is there."""
    path, damaged = inspect(folder)
    if path is not None:
        return path, damaged
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}: restore one from a copy, or start a new run")
    raise CheckpointError(f"{folder.parent} has no checkpoint: start a new run")


def forget_after(folder: Path, step: int) -> list[Path]:
    """Removes the checkpoints of more than ``step`` steps: a run that goes on from there takes another course.

    Left there, the next resume would take one of them for the newest, and the rotation would keep it for a new one.
    Damaged ones are renamed to ``damaged-step-...`` instead, as they may be all that is left of those steps; returns
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
    """(tensors by group, state) of a checkpoint. Raises CheckpointError where a file is missing or has changed.

    Everything is verified before anything is parsed. The tensors have memory of their own: where safetensors maps the
    file, which it does unless told not to, a later change to the file changes them too.
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
        raise CheckpointError(f"{path} holds no state of a run ({fault}): {_REMEDY}") from error
    return tensors, state


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Where a loaded state goes to its owners: CheckpointError if a part is missing or of another kind."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} holds no state of a run ({fault}): {_REMEDY}") from error


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
        f"{aside} read back is not what was written ({fault}): the disk or the memory of this machine fails; what was "
        "saved before is as it was; go on with another one"
    )


def _put(aside: Path, final: Path) -> None:
    """Gives it its name. Wherever this is cut off, one of the two is there under a name that ``found`` knows."""
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
    """To the disk: a file's content, a folder's names. ``forget``: the next read is from the disk, where Linux can."""
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
                f"the checkpoint of step {state['step']} could not be written: its {name!r} has what JSON cannot hold, "
                f"such as a number that is not finite ({error}); mend what it comes from"
            ) from error
    return json.dumps(state, indent=1).encode()


def _not_written(final: Path, length: int, number: int, error: BaseException) -> SaveError:
    what = f"{final} could not be written: {os.strerror(number) if number else error}"
    kept = "what was saved before is as it was; " if found(final.parent) else ""
    if number not in NO_ROOM:
        return SaveError(f"{what}; {kept}mend that")
    near = next(path for path in final.parents if path.is_dir())
    free = shutil.disk_usage(near).free
    odd = ", so it is a quota, the number of files or the length of one that is at its limit" if free > length else ""
    return NoRoomError(
        f"{what}; it needs {length:,} bytes in {final.parent}, where {free:,} are free{odd}; {kept}{NO_ROOM[number]}"
    )


# -- what is there ------------------------------------------------------------------------------------------------


def _check(path: Path, hashed: bool = True) -> Manifest:
    """As ``manifest.check``, and the folder's name is its step. Raises CheckpointError with what is wrong."""
    try:
        manifest = check(path, hashed)
        if _NAME.fullmatch(path.name) and steps_of(path) != manifest.step:
            raise ValueError(f"it was saved as that of step {manifest.step}; give it its name again")
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


def _rotate(final: Path, keep: int) -> None:
    """Removes what is older than the newest ``keep`` whole ones; ``final``, read back a moment ago, is one of them.

    And what ``final`` has replaced.
    """
    whole = 0
    for path in reversed(found(final.parent)):
        if path == final:
            whole += 1
        elif whole < keep and path.name.startswith("step-"):
            whole += _is_whole(path, HASHED_BY_ROTATION)
        else:
            try:
                _remove(path)
            except OSError as error:
                reason = error.strerror or error
                raise SaveError(f"{path} cannot be removed ({reason}): remove it") from error


def _clear(folder: Path) -> None:
    """What a kill has left. A replaced one takes its name back, unless a whole one has it."""
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
