"""The Hugging Face hub's refusals as sentences of ours."""

from __future__ import annotations

from collections.abc import Iterator

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
    "OfflineModeIsEnabled": _OFFLINE,
    "LocalEntryNotFoundError": _UNREACHED,
    "DatasetNotFoundError": "the hub has nothing of this name, or it is private: check the spelling, or run "
    "`hf auth login`",
}
"""Class of an error -> what it says of a name. By name, because the libraries keep the classes in different places."""
_SWITCHED_OFF = ("OfflineModeIsEnabled", "outgoing traffic has been disabled", "offline mode is enabled")


def hub_fault(error: BaseException) -> str | None:
    """A clause that explains an error of the hub, for a sentence that has named the model; None for other errors.

    The whole chain of causes is read: Transformers and datasets wrap the hub's errors in their own.
    """
    chain = list(_chain(error))
    if any(mark in str(link) for link in chain for mark in _SWITCHED_OFF):
        return _OFFLINE
    for link in reversed(chain):  # the cause itself before what was made of it
        for kind in type(link).__mro__:
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
