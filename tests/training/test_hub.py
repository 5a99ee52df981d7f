"""Uploads to a stand-in of the hub on loopback."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stable_rlhf import Config, ConfigError
from stable_rlhf.errors import UploadError
from stable_rlhf.training.hub import prepare_upload
from tests.tiny_runs import lora, policy, settings, trainer


class Hub:
    """Takes repositories and commits.

    ``refuses``: the paths that it answers with 403. ``private``: of the repository, None until it is there.
    """

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = ""
        self.private: bool | None = None

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.refuses and self.refuses in path:
            return 403, {"error": "not yours"}
        if path == "/api/models/me/mine" and self.private is None:
            return 404, {"error": "no such repository"}
        if path == "/api/models/me/mine":
            return 200, {"id": "me/mine", "private": self.private}
        if path == "/api/repos/create":
            self.created.append(made := json.loads(body))
            if self.private is None:
                self.private = made.get("visibility", "public") == "private"
            return 200, {"url": f"{self.address}/me/mine"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/me/mine/commit/abc", "commitOid": "abc", "success": True}
        return 200, {"errors": [], "warnings": []}  # the check of the card's metadata

    address = ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, content = hub.answer(self.path.split("?")[0], self._body())
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_run_is_uploaded_whole_at_its_end(tokenizer, tmp_path: Path, hub: Hub) -> None:
    config = settings(tmp_path, max_steps=1, push_to_hub=True, hub_model_id="me/mine", hub_private=False)
    run = trainer(config, tokenizer)
    run.train()
    shown = {(made["organization"], made["name"], made["visibility"]) for made in hub.created if "visibility" in made}
    assert shown == {("me", "mine", "public")}
    assert hub.files == {path.name: path.read_bytes() for path in (run.run_dir / "final").iterdir()}
    assert {"model.safetensors", "value_heads.safetensors", "tokenizer.json", "README.md"} <= hub.files.keys()
    hub.files.clear()
    assert run.push_to_hub("me/mine", commit_message="again") == f"{hub.address}/me/mine/commit/abc"
    assert "value_heads.safetensors" in hub.files


def test_an_upload_that_fails_loses_nothing(tokenizer, tmp_path: Path, hub: Hub) -> None:
    hub.refuses = "/commit/"
    run = trainer(settings(tmp_path, max_steps=1, push_to_hub=True, hub_model_id="me/mine"), tokenizer)
    with pytest.raises(UploadError, match=r"did not take 'me/mine' .*not yours.*; training is finished and all is in"):
        run.train()
    assert (tmp_path / "final" / "model.safetensors").is_file()
    assert (tmp_path / "final" / "README.md").is_file()


@pytest.mark.parametrize(
    ("name", "refuses", "token", "fault"),
    [
        ("me/mine", "/create", "hf_token", "not yours"),
        ("no such name!", "", "hf_token", "Repo id must"),
        ("me/mine", "", "", "there is no token for the hub"),
    ],
)
def test_what_would_fail_at_the_end_is_known_before_training(
    tokenizer,
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    refuses: str,
    token: str,
    fault: str,
) -> None:
    hub.refuses = refuses
    monkeypatch.setattr("stable_rlhf.training.hub.get_token", lambda: token or None)
    with pytest.raises(ConfigError, match=f"push_to_hub=True.*{fault}"):
        trainer(settings(tmp_path, push_to_hub=True, hub_model_id=name), tokenizer).train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_repository_of_push_to_hub_is_private_unless_said(
    tokenizer, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(settings(tmp_path, max_steps=1), tokenizer)
    run.train()
    for options in ({}, {"private": False}):
        hub.private = None
        run.push_to_hub("me/mine", **options)
    assert [made["visibility"] for made in hub.created if "visibility" in made] == ["private", "public"]
    assert "hub_private" not in capsys.readouterr().err


@pytest.mark.parametrize(("own", "shown"), [(False, "public"), (True, "private")])
def test_a_repository_of_another_visibility_is_said_before_training(
    own: bool, shown: str, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private = own
    asked = Config.from_preset("safe", push_to_hub=True, hub_model_id="me/mine", hub_private=not own)
    assert prepare_upload(asked, tmp_path) == "me/mine"
    said = f"hub_private={not own}: the repository 'me/mine' exists and is {shown}, and stays so"
    assert said in capsys.readouterr().err
    prepare_upload(dataclasses.replace(asked, hub_private=own), tmp_path)
    assert capsys.readouterr().err == ""


def test_a_policy_that_was_not_saved_as_it_is_is_not_uploaded(
    tokenizer, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, max_steps=1, push_to_hub=True, hub_model_id="me/mine")
    run = trainer(config, tokenizer)
    lm = run.model.policy
    whole = lm.save_pretrained

    def forgets(folder: Path, **options: Any) -> None:  # as a model whose code names its weights otherwise
        whole(folder, **options)
        if (file := folder / "model.safetensors").exists():
            save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(lm, "save_pretrained", lambda folder, **options: forgets(Path(folder), **options))
    with pytest.raises(UploadError, match=r"its logits differ .* It was not uploaded to 'me/mine'"):
        run.train()
    with pytest.raises(UploadError, match=r"nothing was uploaded to 'me/mine'.*its logits differ"):
        run.push_to_hub("me/mine")
    assert hub.files == {}
    assert (tmp_path / "final" / "README.md").is_file()


def test_an_adapter_on_a_model_without_a_name_is_uploaded(tokenizer, tmp_path: Path, hub: Hub) -> None:
    config = settings(tmp_path, max_steps=1, push_to_hub=True, hub_model_id="me/mine")
    trainer(config, tokenizer, model=lora(policy(tokenizer))).train()
    assert "adapter_model.safetensors" in hub.files
