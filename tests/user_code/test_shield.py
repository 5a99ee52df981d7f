"""What user code sets is in force when user code runs, and at no other time."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stable_rlhf.user_code import RandomStream, Shield
from stable_rlhf.user_code.shield import SETTINGS


def set_backend(name: str, attribute: str, value: Any) -> None:
    place: Any = torch.backends
    for part in name.split("."):
        place = getattr(place, part)
    setattr(place, attribute, value)


CHANGES: dict[str, Callable[[], Any]] = {
    "grad mode": lambda: torch.set_grad_enabled(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "cuDNN": lambda: set_backend("cudnn", "benchmark", True),
    "float32 precision": lambda: torch.set_float32_matmul_precision("medium"),
    "attention kernels": lambda: torch.backends.cuda.enable_math_sdp(False),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "environment": lambda: os.environ.update(STABLE_RLHF_TEST="1", HOME="/nowhere"),
    "working directory": lambda: os.chdir("/"),
}
"""Setting -> a change of it by user code."""


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "CUDA device"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_setting_of_user_code_is_its_own(name: str, raises: bool) -> None:
    shield, stream = Shield(), RandomStream(0)
    before = {key: setting.get() for key, setting in SETTINGS.items()}
    try:
        with shield.around(stream):
            CHANGES[name]()
            changed = SETTINGS[name].get()
            if raises:
                raise KeyError("gold")
    except KeyError:
        assert raises
    assert changed != before[name]
    assert {key: setting.get() for key, setting in SETTINGS.items()} == before
    with shield.around(stream):
        assert SETTINGS[name].get() == changed
        SETTINGS[name].set(before[name])
    with shield.around(stream):
        assert SETTINGS[name].get() == before[name]
    assert {key: setting.get() for key, setting in SETTINGS.items()} == before


@pytest.mark.parametrize("library", ["cuda.matmul", "mkldnn.matmul", "cudnn.conv"])
def test_the_precision_of_one_library_is_user_codes_own(library: str) -> None:
    before, shield = SETTINGS["float32 precision"].get(), Shield()
    for _ in range(2):
        with shield.around(RandomStream(0)):
            set_backend(library, "fp32_precision", "ieee")
        assert SETTINGS["float32 precision"].get() == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_default_device_of_the_cpu_is_none_at_all() -> None:
    shield = Shield()
    with shield.around(RandomStream(0)):
        torch.set_default_device("meta")
    assert getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is None


def test_a_variable_that_user_code_removes_is_there_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABLE_RLHF_TEST", "1")
    shield, stream = Shield(), RandomStream(0)
    with shield.around(stream):
        del os.environ["STABLE_RLHF_TEST"]
    assert os.environ["STABLE_RLHF_TEST"] == "1"
    with shield.around(stream):
        assert "STABLE_RLHF_TEST" not in os.environ


def test_a_folder_that_user_code_removes_is_no_fault(tmp_path: Path) -> None:
    here, shield = Path.cwd(), Shield()
    with shield.around(RandomStream(0)):
        (tmp_path / "sandbox").mkdir()
        os.chdir(tmp_path / "sandbox")
        (tmp_path / "sandbox").rmdir()
    assert Path.cwd() == here
    with shield.around(RandomStream(0)):
        assert Path.cwd() == here


def test_the_runs_handlers_are_put_back_and_others_are_the_users() -> None:
    def mine(signum: int, frame: object) -> None: ...

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with Shield().around(RandomStream(0)):
            for number in numbers:
                signal.signal(number, mine)
        assert [signal.getsignal(number) is mine for number in numbers] == [False, False, True]
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_modes_are_set_after_user_code_also_where_it_raises() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout()).eval()
    shield = Shield(model.eval)
    with pytest.raises(KeyError), shield.around(RandomStream(0)):
        raise KeyError(model.train())
    assert not any(module.training for module in model.modules())


def test_it_works_in_another_thread() -> None:
    seen: list[float] = []

    def scores() -> None:
        with Shield().around(RandomStream(0)):
            seen.append(random.random())

    thread = threading.Thread(target=scores)
    thread.start()
    thread.join()
    assert len(seen) == 1


# -- random numbers -------------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_a_stream_goes_on_from_call_to_call_and_does_not_move_the_run() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    alone = [draws() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    stream, users, runs = RandomStream(5), [], []
    for _ in range(3):
        runs.append(draws())
        with stream.drawn():
            users.append(draws())
    assert runs == alone
    again = RandomStream(5)
    with again.drawn():
        assert [draws() for _ in range(3)] == users
    assert len({number for drawn in users for number in drawn}) == 9


def test_a_seed_that_user_code_sets_holds_for_its_later_calls() -> None:
    stream = RandomStream(5)
    with stream.drawn():
        random.seed(7)
    random.seed(8)
    with stream.drawn():
        assert random.random() == random.Random(7).random()


def test_streams_of_other_seeds_are_others_and_none_is_the_runs() -> None:
    torch.manual_seed(3)
    seen = [float(torch.rand(()))]
    for seed in ((3,), (4,), (3, 0), (3, 1), (2**63 - 1,)):
        with RandomStream(*seed).drawn():
            seen.append(float(torch.rand(())))
    assert len(set(seen)) == 6


def test_a_stream_is_restored_from_its_state_and_its_state_moves_nothing() -> None:
    stream, other = RandomStream(1), RandomStream(2)
    before = torch.get_rng_state()
    state = stream.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    with stream.drawn():
        expected = draws()
    other.load_state_dict(state)
    with other.drawn():
        assert draws() == expected


# -- CUDA -----------------------------------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@on_cuda
def test_random_numbers_of_user_code_on_a_gpu_are_its_own() -> None:
    def draw() -> float:
        return float(torch.rand((), device="cuda"))

    torch.manual_seed(1)
    alone = [draw() for _ in range(3)]
    torch.manual_seed(1)
    stream, users, runs = RandomStream(5), [], []
    for _ in range(3):
        runs.append(draw())
        with Shield().around(stream):
            users.append(draw())
    assert runs == alone
    with RandomStream(5).drawn():
        assert [draw() for _ in range(3)] == users
    assert len({*users, *runs}) == 6


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_the_current_device_of_user_code_is_its_own() -> None:
    shield = Shield()
    torch.cuda.set_device(0)
    with shield.around(RandomStream(0)):
        torch.cuda.set_device(1)
    assert torch.cuda.current_device() == 0
    with shield.around(RandomStream(0)):
        assert torch.cuda.current_device() == 1
        torch.cuda.set_device(0)
