"""The state of the process that user code and the run would otherwise change for each other."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from stable_rlhf.checkpoints import RandomState
from stable_rlhf.user_code.children import children_end_here
from stable_rlhf.user_code.stream import RandomStream


class Shield:
    """Runs user code (rewards, callbacks) with its own state of the process, so that the run keeps its own.

    What user code sets (``SETTINGS``: default dtype, environment, ...) is in force whenever user code runs, and only
    then. Random numbers come from a stream of their own. Signal handlers of the run, and its modules' modes, are as
    before once user code returns.

    modes: puts the modules of the run into the modes that the run needs.
    """

    def __init__(self, modes: Callable[[], None] = lambda: None) -> None:
        self._modes = modes
        self._own: dict[str, Any] = {}
        self.runs_random: dict[str, Any] | None = None
        """The state of the run's random generators while user code runs; None otherwise."""

    @contextlib.contextmanager
    def around(self, stream: RandomStream) -> Iterator[None]:
        """User code runs inside the context and draws random numbers from ``stream``."""
        with stream.drawn() as before, _handlers_kept(), self._settings():
            outer, self.runs_random = self.runs_random, self.runs_random or before
            try:
                with children_end_here():  # innermost: a forked child cannot use CUDA, to read its random state say
                    yield
            finally:
                self.runs_random = outer
                self._modes()

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        runs = {name: setting.get() for name, setting in SETTINGS.items()}
        for name, value in self._own.items():
            SETTINGS[name].set(value)
        try:
            yield
        finally:
            self._own = {name: value for name, setting in SETTINGS.items() if (value := setting.get()) != runs[name]}
            for name in self._own:
                SETTINGS[name].set(runs[name])


class RunRandom:
    """The random generators of the run, as a part of it: also where user code, which has others, saves the run."""

    def __init__(self, shield: Shield) -> None:
        self._shield, self._generators = shield, RandomState()

    def state_dict(self) -> dict[str, Any]:
        runs = self._shield.runs_random
        return self._generators.state_dict() if runs is None else dict(runs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if (runs := self._shield.runs_random) is None:
            self._generators.load_state_dict(state)
        else:
            runs.update(state)  # put back once user code returns


class Setting(NamedTuple):
    """A setting of the whole process, or of the thread."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


_BACKENDS: Any = torch.backends
_PRECISIONS = (_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul, _BACKENDS.cudnn.conv)
"""Of float32, for each library."""


def _precision() -> tuple[str | None, ...]:
    try:
        every = torch.get_float32_matmul_precision()
    except RuntimeError:  # one library's has been set by itself
        every = None
    return every, *(library.fp32_precision for library in _PRECISIONS)


def _set_precision(value: tuple[str | None, ...]) -> None:
    every, *single = value
    if every is not None:
        torch.set_float32_matmul_precision(every)  # writes those of the libraries too
    for library, precision in zip(_PRECISIONS, single, strict=True):
        library.fp32_precision = precision


def _attributes(place: Any, *names: str) -> Setting:
    def put(values: tuple[Any, ...]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(place, name, value)

    return Setting(lambda: tuple(getattr(place, name) for name in names), put)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _set_default_device(device: torch.device) -> None:
    # The CPU is what there is without a default; as a default it would slow down every call of torch.
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _attention_kernels() -> tuple[bool, ...]:
    flags = torch.backends.cuda
    return flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled()


def _set_attention_kernels(value: tuple[bool, ...]) -> None:
    flags = torch.backends.cuda
    for enable, on in zip((flags.enable_flash_sdp, flags.enable_mem_efficient_sdp, flags.enable_math_sdp), value):  # noqa: B905
        enable(on)


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _set_cuda_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _set_environment(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it has been removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


SETTINGS = {
    "grad mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": Setting(torch.get_default_device, _set_default_device),
    "deterministic algorithms": Setting(_deterministic, _set_deterministic),
    "cuDNN": _attributes(_BACKENDS.cudnn, "enabled", "deterministic", "benchmark"),
    "float32 precision": Setting(_precision, _set_precision),
    "attention kernels": Setting(_attention_kernels, _set_attention_kernels),
    "threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "CUDA device": Setting(_cuda_device, _set_cuda_device),
    "environment": Setting(lambda: dict(os.environ), _set_environment),
    "working directory": Setting(_folder, _set_folder),
}
"""Name -> setting."""


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Puts back the handlers of SIGINT and SIGTERM, by which a run stops; those of other signals are the user's."""
    mine = threading.current_thread() is threading.main_thread()  # no other thread can set one
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if mine else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
