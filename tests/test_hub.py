"""The hub's refusals, as its libraries raise them, become a sentence of ours."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from transformers import AutoConfig

from stable_rlhf import SAFETrainer
from stable_rlhf.config import ModelConfig
from stable_rlhf.data import load_prompts
from stable_rlhf.errors import ConfigError, StableRLHFError
from stable_rlhf.hub import hub_fault
from stable_rlhf.policy import check_model
from stable_rlhf.rewards.functions import resolve_reward


def raised(call, *given) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever the library raises
        call(*given)
    return caught.value


def wrapped(cause: BaseException) -> BaseException:
    """As Transformers wraps a cause in an OSError with a text of its own."""
    outer = OSError("We couldn't connect to 'https://huggingface.co' to load the files")
    outer.__cause__ = cause
    return outer


def answered(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the answer of a server in it."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error. Request ID: x")
    return error


@pytest.mark.parametrize("name", ["no/such-model", "nope"])
def test_a_name_that_is_not_in_the_cache_of_a_hub_that_is_switched_off(name: str) -> None:
    fault = hub_fault(raised(AutoConfig.from_pretrained, name))
    assert fault is not None
    assert fault.startswith("no folder of this name is here")
    assert fault.endswith("the hub is switched off (HF_HUB_OFFLINE)")
    assert hub_fault(raised(datasets.load_dataset, name)) == fault


@pytest.mark.parametrize("name", ["a b", "/no/such/folder", "x/y/z"])
def test_a_name_that_is_none_of_the_hub(name: str) -> None:
    fault = hub_fault(raised(AutoConfig.from_pretrained, name))
    assert fault == "there is no such folder, and it cannot be a name on the hub (NAME or OWNER/NAME)"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GatedRepoError, "the hub asks you to accept its conditions"),  # it is a RepositoryNotFoundError too
        (RepositoryNotFoundError, "the hub has nothing of this name, or it is private"),
        (LocalEntryNotFoundError, "no folder of this name is here, it is not in the cache, and the hub could not be"),
    ],
)
def test_the_cause_is_found_below_what_wraps_it(kind: type[Exception], said: str) -> None:
    fault = hub_fault(wrapped(answered(kind)))
    assert fault is not None
    assert fault.startswith(said)


def test_another_error_is_not_the_hubs() -> None:
    assert hub_fault(OSError("No space left on device")) is None
    assert hub_fault(ConnectionError("reset by peer")) is None


def test_a_user_reads_no_sentence_of_the_hubs_libraries() -> None:
    with pytest.raises(ConfigError) as caught:
        SAFETrainer("no/such-model", "builtin")
    assert str(caught.value) == (
        "model.name='no/such-model': no folder of this name is here, it is not in the cache, and the hub is switched "
        "off (HF_HUB_OFFLINE); give builtin, the "
        "folder of a causal language model in safetensors or GGUF, or a hub name"
    )


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that is not switched off, and whose address nobody listens at."""
    with socket.socket() as taken:  # bound, so that it is nobody else's, and not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for module in ("huggingface_hub.constants", "datasets.config"):
            monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
        yield


def test_a_name_on_a_hub_that_cannot_be_reached_fails_at_once_and_in_a_sentence(
    unreached: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "no/such-base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    began = time.monotonic()
    said = []
    for doing in (
        lambda: check_model(ModelConfig(name="no/such-model")),
        lambda: check_model(ModelConfig(name=str(tmp_path))),  # whose base is on the hub
        lambda: load_prompts("no/such-prompts"),
        lambda: resolve_reward("no/such-reward", device=torch.device("cpu")),
        lambda: resolve_reward(str(tmp_path), device=torch.device("cpu")),
    ):
        with pytest.raises(StableRLHFError) as raised:
            doing()
        said.append(str(raised.value))
    assert time.monotonic() - began < 5
    assert [sentence for sentence in said if "the hub could not be reached" not in sentence] == []
    assert not any("HF_HUB_OFFLINE" in sentence for sentence in said)
    assert "Retrying" not in caplog.text
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # as it was
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_is_here_does_not_ask_for_the_hub(unreached: None, tiny_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("stable_rlhf.hub._is_reached", lambda: pytest.fail("asked"))
    check_model(ModelConfig(name=str(tiny_folder)))
    check_model(ModelConfig())
    assert len(load_prompts("builtin", limit=2)) == 2
