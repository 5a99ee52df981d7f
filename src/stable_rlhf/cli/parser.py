"""An argument parser that raises this package's errors."""

from __future__ import annotations

import argparse
from typing import NoReturn

from stable_rlhf.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse's parser; its errors are ConfigErrors with the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")
