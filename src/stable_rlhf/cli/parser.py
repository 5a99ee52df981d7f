"""An argument parser that raises this package's errors."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from stable_rlhf.control import as_whole
from stable_rlhf.errors import ConfigError


def whole(text: str) -> int:
    """A whole number as people write it: 100, 1e2."""
    number = as_whole(float(text)) if re.search(r"[.eE]", text) else int(text)
    if not isinstance(number, int):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number")
    return number


class Parser(argparse.ArgumentParser):
    """argparse's parser; its errors are ConfigErrors with the usage. Numbers may be written as ``whole`` reads them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register("type", int, whole)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")
