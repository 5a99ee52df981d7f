"""The hub's refusals, as its libraries raise them, become a sentence of ours."""

from __future__ import annotations

import datasets
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig

from stable_rlhf import SAFETrainer
from stable_rlhf.errors import ConfigError
from stable_rlhf.hub import hub_fault


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
