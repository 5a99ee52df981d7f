"""The command line: train, resume, report. Arguments -> Config -> one call."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentError,
    ArgumentParser,
    Namespace,
)

from stable_rlhf.config import PRESETS, SECTIONS, Config, ConfigError

USAGE = """\
stable-rlhf train [--config FILE] [--section.field VALUE ...]   train a policy; without arguments, the built-in one
stable-rlhf resume RUN [--max_steps N] [--checkpoint FOLDER]    go on with a run from its newest checkpoint
stable-rlhf report RUN                                          write RUN/report.html

`stable-rlhf train --help` lists every setting."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 failed, 2 bad settings or usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": _train, "resume": _resume, "report": _report}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(f"stable-rlhf: there is no command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        commands[arguments[0]](arguments[1:])
    except ConfigError as error:
        print(f"stable-rlhf: {error}", file=sys.stderr)
        return 2
    return 0


def parser(preset: str) -> ArgumentParser:
    """Every setting of Config as an argument, with the preset's values as defaults. No abbreviations, no other names."""
    made = ArgumentParser(prog="stable-rlhf train", exit_on_error=False, default_meta=False, allow_abbrev=False)
    made.add_argument("--config", action=ActionConfigFile, help="YAML file of settings; later arguments override it")
    made.add_class_arguments(Config, skip=set(SECTIONS))
    for name, section in SECTIONS.items():
        made.add_class_arguments(section, name)
    made.set_defaults(
        {
            "preset": preset,
            **{f"{name}.{field}": value for name in SECTIONS for field, value in PRESETS[preset].get(name, {}).items()},
        }
    )
    return made


def load_config(arguments: Sequence[str]) -> Config:
    """Defaults < preset < --config FILE < --section.field VALUE, in this order. Raises ConfigError."""
    first = _parse(parser("safe"), arguments)
    if first.preset not in PRESETS:
        raise ConfigError(f"preset={first.preset!r}: choose one of {', '.join(PRESETS)}")
    settings = _parse(parser(first.preset), arguments).as_dict()
    settings.pop("config", None)
    sections = {name: section(**settings.pop(name)) for name, section in SECTIONS.items()}
    return Config(**settings, **sections)


def _parse(made: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    try:
        return made.parse_args(list(arguments))
    except (ArgumentError, argparse.ArgumentError) as error:
        raise ConfigError(_with_suggestion(str(error), made)) from error


def _with_suggestion(message: str, made: ArgumentParser) -> str:
    """jsonargparse's message in one line, with the setting that was probably meant."""
    line = " ".join(message.split())
    names = [name for name in made.get_defaults().as_flat().__dict__]
    for word in line.replace("'", " ").replace('"', " ").replace(",", " ").split():
        name = word.lstrip("-").split("=")[0].rstrip(".:")
        if name in names:
            break
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        if close and ("." in name or word.startswith("--")):
            return f"{line}. Did you mean --{close[0]}?"
    return line


def _train(arguments: list[str]) -> None:
    if "-h" in arguments or "--help" in arguments:
        parser("safe").print_help()
        return
    _run(load_config(arguments), resume=None)


def _resume(arguments: list[str]) -> None:
    made = argparse.ArgumentParser(prog="stable-rlhf resume", allow_abbrev=False)
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument("--max_steps", type=int, help="train to this many steps instead")
    made.add_argument("--checkpoint", type=Path, help="go on from this checkpoint instead of the newest")
    given = made.parse_args(arguments)
    file = given.run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{given.run} is not a run folder: it has no config.yaml")
    extra = [] if given.max_steps is None else ["--max_steps", str(given.max_steps)]
    config = load_config(["--config", str(file), *extra, "--output_dir", str(given.run)])
    _run(config, resume=given.checkpoint or True)


def _run(config: Config, resume: bool | Path | None) -> None:
    """Trains, writes the report whatever happens, and prints the closing tables."""
    from transformers.utils import logging  # torch and transformers load only when the settings are good

    from stable_rlhf.report import write_report
    from stable_rlhf.telemetry import print_summary
    from stable_rlhf.trainer import SAFETrainer

    logging.disable_progress_bar()  # the run has a bar of its own
    trainer = SAFETrainer(config.model.name, args=config)
    with _report_at_the_end(trainer, write_report):
        evaluation = trainer.train(resume_from_checkpoint=resume)
    if trainer.args.log.progress:
        print_summary(trainer.run_dir, evaluation, f"stable-rlhf resume {trainer.run_dir} --max_steps N")


@contextlib.contextmanager
def _report_at_the_end(trainer: Any, write_report: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if (trainer.run_dir / "metrics.jsonl").exists():
            write_report(trainer.run_dir)
        raise
    write_report(trainer.run_dir)


def _report(arguments: list[str]) -> None:
    made = argparse.ArgumentParser(prog="stable-rlhf report", allow_abbrev=False)
    made.add_argument("run", type=Path, help="the run's folder")
    from stable_rlhf.report import write_report

    print(write_report(made.parse_args(arguments).run))


if __name__ == "__main__":
    sys.exit(main())
