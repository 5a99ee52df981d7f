"""Uploads of a saved policy to the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi, get_token

from stable_rlhf.config import Config
from stable_rlhf.console import tell
from stable_rlhf.errors import ConfigError, UploadError


def prepare_upload(config: Config, run_dir: Path) -> str | None:
    """Makes the repository that ``push_to_hub`` names; returns its full name, None where nothing is to be uploaded.

    Called before training: a missing token, a name that cannot be one, and a hub that refuses are known then. Raises
    ConfigError.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or run_dir.name
    if get_token() is None:
        raise ConfigError("push_to_hub=True: there is no token for the hub: run `hf auth login`, or set HF_TOKEN")
    try:
        with _hub_named(name):
            return _made(HfApi(), name, config.hub_private)
    except UploadError as error:
        raise ConfigError(f"push_to_hub=True, hub_model_id={config.hub_model_id!r}: {error}") from error


def upload(folder: Path, repo_id: str, *, private: bool | None = None, token: Any = None, **options: Any) -> str:
    """Uploads a folder as a commit to ``repo_id``, which is made if it is not there; returns the commit's address.

    ``options`` are those of huggingface_hub's ``upload_folder``. Raises UploadError; the folder stays as it is.
    """
    options = {"commit_message": "Upload of a policy trained with stable-rlhf", **options}
    with _hub_named(repo_id):
        api = HfApi(token=token)
        repo_id = _made(api, repo_id, private)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)


def _made(api: HfApi, name: str, private: bool | None) -> str:
    """The full name of the repository, which is made if it is not there.

    The visibility of one that is there stays as it is: a line on the console says where it is not ``private``.
    """
    repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
    own = None if private is None else api.model_info(repo_id).private
    if own is not None and own != private:
        shown = "private" if own else "public"
        tell(
            f"hub_private={private}: the repository {repo_id!r} exists and is {shown}, and stays so: change that in "
            "its settings on the hub, or name another in hub_model_id"
        )
    return repo_id


@contextlib.contextmanager
def _hub_named(repo_id: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into an UploadError."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # ValueError: of a name; RuntimeError: of Xet
        fault = " ".join(str(error).split()) or type(error).__name__
        raise UploadError(f"the hub did not take {repo_id!r} ({fault})") from error
