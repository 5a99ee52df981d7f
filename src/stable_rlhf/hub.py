"""The Hugging Face hub: whether it can be reached, and its refusals as sentences of ours."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OFFLINE = "no folder of this name is here, it is not in the cache, and the hub is switched off (HF_HUB_OFFLINE)"
_UNREACHED = (
    "no folder of this name is here, it is not in the cache, and the hub could not be reached; check the network"
)
_BY_ERROR = {
    "GatedRepoError": "the hub asks you to accept its conditions: do so on its page there, then run `hf auth login`",
    "RepositoryNotFoundError": "the hub has nothing of this name, or it is private: check the spelling, or run "
    "`hf auth login`",
    "RevisionNotFoundError": "the hub has no such revision of it; check the branch, tag or commit",
    "HFValidationError": "there is no such folder, and it cannot be a name on the hub (NAME or OWNER/NAME)",
    "LocalEntryNotFoundError": _UNREACHED,
    "DatasetNotFoundError": "the hub has nothing of this name, or it is private: check the spelling, or run "
    "`hf auth login`",
}
"""Class of an error -> what it says of a name. By name, because the libraries keep the classes in different places."""
_SWITCHED_OFF = ("OfflineModeIsEnabled", "outgoing traffic has been disabled", "offline mode is enabled")


WAIT = 3.0
"""Seconds that the hub may take to answer at all. Its client would try for half a minute, and each name again."""

RECENT = 60.0
"""Seconds for which an answer of ``_is_reached`` holds: loading a run asks several times."""

_tried: dict[str, tuple[float, bool]] = {}
"""Address of the hub -> (when it was tried, whether it answered)."""


@contextlib.contextmanager
def looked_up(*names: str) -> Iterator[None]:
    """For what loads things by name: without the network if one of them is not here and the hub does not answer.

    The cache is then all there is, as with HF_HUB_OFFLINE, and a name that is not in it fails at once.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or all(Path(name).exists() for name in names) or _is_reached():
        yield
        return
    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]  # the latter has a copy
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was


def _is_reached() -> bool:
    """Whether the hub answers within WAIT seconds, by whatever proxy its client uses."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    at, answers = _tried.get(constants.ENDPOINT, (-RECENT, False))
    if time.monotonic() - at < RECENT:
        return answers
    try:
        get_session().head(constants.ENDPOINT, timeout=WAIT)
        answers = True
    except Exception as error:  # of httpx, or of httpx2 in newer clients: both have a class of this name
        if all(kind.__name__ != "TransportError" for kind in type(error).__mro__):
            raise
        answers = False
    _tried[constants.ENDPOINT] = time.monotonic(), answers
    return answers


def _offline() -> str:
    """The clause for a name that is not in the cache: the hub was switched off by the user, or did not answer."""
    from huggingface_hub import constants

    _, answers = _tried.get(constants.ENDPOINT, (0.0, True))
    return _OFFLINE if answers else _UNREACHED


def hub_fault(error: BaseException) -> str | None:
    """A clause that explains an error of the hub, for a sentence that has named the model; None for other errors.

    The whole chain of causes is read: Transformers and datasets wrap the hub's errors in their own.
    """
    chain = list(_chain(error))
    if any(mark in str(link) for link in chain for mark in _SWITCHED_OFF):
        return _offline()
    for link in reversed(chain):  # the cause itself before what was made of it
        for kind in type(link).__mro__:
            if kind.__name__ == "OfflineModeIsEnabled":
                return _offline()
            if kind.__name__ in _BY_ERROR:
                return _BY_ERROR[kind.__name__]
    unreached = any(type(link) is ConnectionError and "on the Hub" in str(link) for link in chain)
    return _UNREACHED if unreached else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
