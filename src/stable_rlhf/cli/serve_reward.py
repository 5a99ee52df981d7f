"""The command `serve-reward`."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from transformers.utils import logging

from stable_rlhf.cli.parser import Parser
from stable_rlhf.config import is_url, require
from stable_rlhf.errors import ConfigError
from stable_rlhf.hardware import resolve_device, shortage_named
from stable_rlhf.rewards import resolve_reward
from stable_rlhf.rewards.server import CONNECTIONS, SHOWN, STOP_SECONDS, Limits, RewardServer, is_loopback, listening
from stable_rlhf.text import printable
from stable_rlhf.user_code import ours_only


def serve(arguments: Sequence[str]) -> int:
    """Serves a reward until SIGTERM (returns 0) or SIGINT (returns 130). Raises ConfigError for arguments that cannot
    be served."""
    made = Parser(prog="stable-rlhf serve-reward", allow_abbrev=False)
    made.add_argument("model", help="builtin, a sequence-classification model (folder or hub name), or module:function")
    made.add_argument("--host", default="127.0.0.1", help="address to listen at; other than loopback needs --token-env")
    made.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one and prints it")
    made.add_argument("--token-env", metavar="NAME", help="environment variable with the token that clients must send")
    made.add_argument("--batch-size", type=int, default=64, help="number of texts that the model scores at once")
    made.add_argument("--max-batch", type=int, default=1024, help="most texts in one request")
    made.add_argument("--max-body-bytes", type=int, default=16 * 2**20, help="most bytes in one request")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    made.add_argument(
        "--append-eos", action="store_true", help="end every text that the model reads with its end token"
    )
    made.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    given = made.parse_args(list(arguments))
    for name in ("batch_size", "max_batch", "max_body_bytes"):
        require(getattr(given, name) > 0, f"--{name.replace('_', '-')}", getattr(given, name), "must be 1 or more")
    require(0 <= given.port < 2**16, "--port", given.port, "give 1 to 65535, or 0 for any free port")
    require(not is_url(given.model), "MODEL", given.model, "is a server itself; name a model or a function")
    token = _token(given.token_env)
    if token is None and not is_loopback(given.host):
        remedy = "others can reach this address: set --token-env to an environment variable with a token, or listen at "
        raise ConfigError(f"--host={given.host!r}: {remedy}127.0.0.1")
    logging.disable_progress_bar()
    with listening(given.host, given.port) as listener:
        with shortage_named("loading", "choose another --device or a smaller model"):
            reward = resolve_reward(
                given.model,
                device=resolve_device(given.device, "--device"),
                batch_size=given.batch_size,
                append_eos=given.append_eos,
                trust_remote_code=given.trust_remote_code,
            )
        limits = Limits(max_body_bytes=given.max_body_bytes, max_batch=given.max_batch, token=token)
        server = RewardServer(reward, limits, _print)
        code = _serve(listener, server.app, reward.name)
    if server.scoring:  # Python would wait for the batch at its end, and the batch may never end
        _print(f"the batch being scored did not end within {STOP_SECONDS:g} s and is lost")
        sys.stderr.flush()
        os._exit(code)
    return code


def _serve(listener: socket.socket, app: Starlette, name: str) -> int:
    host, port = listener.getsockname()[:2]
    _print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)")
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    stopped: list[int] = []
    # uvicorn stops on these signals, and then raises them again for whoever handled them before.
    before = {
        number: signal.signal(number, lambda n, _: stopped.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with ours_only(before):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + signal.SIGINT if signal.SIGINT in stopped else 0


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"--token-env={variable!r}: does not hold a token of printable ASCII without spaces")
    return token


def _print(line: str) -> None:
    print(f"stable-rlhf serve-reward: {printable(' '.join(line.split()), SHOWN)}", flush=True)
