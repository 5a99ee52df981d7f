"""The arguments of TRL's own `grpo` or `rloo` script, read from a YAML file as TRL reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from stable_rlhf.config.files import read_mapping
from stable_rlhf.errors import ConfigError, OutOfMemoryError, StableRLHFError
from stable_rlhf.integrations.trl.figures import check_version
from stable_rlhf.text import ends, kind_of, quoted

SCRIPTS = {"grpo": "GRPO", "rloo": "RLOO"}
"""TRL's scripts that doctor reads, and how the names of their classes begin."""

KNOWN_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
"""Names that TRL's script knows; any other has to be MODULE.FUNCTION."""

SHOWN = 500
"""Most characters of each end of TRL's own message."""

_NAMES = (
    ("Set data.prompt_column to the column that holds the prompts, or choose another data format.",
     "TRL reads no other column: rename the one that holds the prompts."),
    ("Choose one with data.split, or data.eval_split for held-out prompts.", "Choose one with dataset_train_split."),
    ("; give builtin, the folder of a causal language model in safetensors or GGUF, or a hub name",
     "; give the folder or the hub name of a causal language model"),
    (", or give it as processing_class to SAFETrainer", ""),
    ("model.name", "model_name_or_path"),
    ("config_name", "dataset_config"),
    ("data.split", "dataset_train_split"),
    ("train_dataset", "datasets"),
    ("rollout.max_completion_length", "max_completion_length"),
)  # fmt: skip
"""Our settings' names and remedies in errors, and what a TRL script has instead."""


@dataclass(frozen=True, kw_only=True)
class TRLArguments:
    """The four groups of arguments that TRL's script has, with its defaults."""

    file: str
    kind: str
    """`grpo` or `rloo`."""
    version: str
    """Of TRL."""
    processes: int
    """That train at the same time."""
    script: Any
    training: Any
    """GRPOConfig or RLOOConfig."""
    model: Any
    mixture: Any
    """DatasetMixtureConfig: the key `datasets`."""
    asked: Mapping[str, Any]
    """Arguments by name as the file gives them, with TRL's defaults for the others, before TRL fills in more."""

    @property
    def limit(self) -> int:
        return int(self.training.max_completion_length)

    @property
    def group(self) -> int:
        return int(self.training.num_generations)

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"--trl {self.file}: {text}")

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors of this package name the file, and TRL's arguments instead of our settings."""
        try:
            yield
        except StableRLHFError as error:
            if (text := str(error)).startswith(f"--trl {self.file}: "):
                raise
            for ours, theirs in _NAMES:
                text = text.replace(ours, theirs)
            if isinstance(error, OutOfMemoryError):
                raise OutOfMemoryError(text) from error
            raise self.error(text) from error


def read_arguments(file: str, kind: str = "grpo", processes: int | None = None) -> TRLArguments:
    """Reads a file as `trl KIND --config FILE` does.

    ``processes``: how many train; None is what the file gives to `accelerate launch` (``num_processes``,
    ``accelerate_config``), or 1. Environment variables under ``env`` are set, as TRL sets them. Raises ConfigError for
    a version of TRL that was not tested, a file that is not a mapping, and whatever TRL refuses, with the remedy.
    """
    version, content = check_version(), _content(file)
    trl, module = _imported("trl"), _imported(f"trl.scripts.{kind}")
    name = SCRIPTS[kind]
    types = (getattr(module, f"{name}ScriptArguments"), getattr(trl, f"{name}Config"), trl.ModelConfig)
    types = (*types, trl.DatasetMixtureConfig)
    known = {field.name for each in types for field in dataclasses.fields(each) if field.init}
    launch = {key: value for key, value in content.items() if key not in known and key != "env"}
    processes = _processes(file, launch, known, kind) if processes is None else processes
    if processes < 1:
        raise ConfigError(f"--num_processes={processes}: give 1 or more")
    made = trl.TrlParser([types[0], _with_processes(types[1], processes), *types[2:]], prog=f"trl {kind}")
    _check_kinds(file, content, made, types)

    def refuse(message: str) -> NoReturn:  # argparse would print the usage of 300 arguments and exit
        raise ConfigError(f"--trl {file}: {_in_one_sentence(message)}")

    made.error = refuse
    try:
        read = made.parse_args_and_config(["--config", file], return_remaining_strings=True)
    except ConfigError:
        raise
    except Exception as error:  # of the configs' own checks, which raise errors of many classes
        raise ConfigError(f"--trl {file}: {_refused(error, made, processes, name)}") from error
    script, training, model, mixture = read[:4]
    given = TRLArguments(
        file=file,
        kind=kind,
        version=version,
        processes=processes,
        script=script,
        training=training,
        model=model,
        mixture=mixture,
        asked=vars(made.parse_known_args(args=[])[0]),
    )
    _check_complete(given)
    return given


# -- the file -------------------------------------------------------------------------------------------------------


def _content(file: str) -> dict[str, Any]:
    """The file's mapping. It is read here too, so that a fault of it is a sentence and not a traceback."""
    example = "the arguments of TRL's script, such as `beta: 0.04`"
    content = read_mapping(f"--trl {file}", Path(file), yaml.safe_load, example)
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"--trl {file}: the key {quoted(key)} is {kind_of(key)}; TRL's keys are names")
    return content


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"TRL cannot be imported ({error}): pip install 'stable-rlhf[trl]'") from error


def _with_processes(config: type, processes: int) -> type:
    """The config as ``processes`` processes make it. Its checks of batch sizes read their number from itself."""
    return type(config.__name__, (config,), {"world_size": property(lambda self: processes)})


def _processes(file: str, launch: Mapping[str, Any], known: Collection[str], kind: str) -> int:
    """The number of processes that the other keys ask `accelerate launch` for. Raises ConfigError for a key that it
    does not know either: `trl` then ends with accelerate's usage."""
    if not launch:
        return 1
    accelerate, resolved = _imported("accelerate.commands.launch"), _imported("trl.cli.accelerate_config")
    made, found = accelerate.launch_command_parser(), 1

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"--trl {file}: {_in_one_sentence(message)}")

    made.error = refuse
    for key, value in launch.items():
        option = [f"--{key}", str(value)]
        if key == "accelerate_config":
            try:
                option = resolved.resolve_accelerate_config_argument(option)
            except ValueError as error:
                raise ConfigError(f"--trl {file}: {error}") from error
        arguments, unknown = made.parse_known_args([f"{option[0]}={option[1]}", "script.py"])
        if unknown:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f"Did you mean {close[0]}?" if close else "Remove it."
            raise ConfigError(
                f"--trl {file}: neither `trl {kind}` nor `accelerate launch` has an argument {key!r}. {meant}"
            )
        if arguments.config_file is not None:
            found = int(_content(arguments.config_file).get("num_processes", found))
        found = arguments.num_processes or found
    return found


# -- what TRL refuses -----------------------------------------------------------------------------------------------


def _check_kinds(file: str, content: Mapping[str, Any], made: Any, types: Collection[type]) -> None:
    """Raises ConfigError for a list where a number is read, and the reverse.

    TRL's parser converts texts only and takes other values as they are, so that it fails later and without the name.
    """
    numbers = {
        field.name: field.type.__name__
        for each in types
        for field in dataclasses.fields(each)
        if field.type in (int, float)
    }
    lists = {action.dest for action in made._actions if action.nargs == "+"}
    for key, value in content.items():
        if key in numbers and isinstance(value, list | dict | bool):
            raise ConfigError(f"--trl {file}: {key}={quoted(value)}: TRL reads {_an(numbers[key])} there")
        if key in lists and value is not None and not isinstance(value, list):
            raise ConfigError(f"--trl {file}: {key}={quoted(value)}: TRL reads a list there; write [{value}]")


def _an(name: str) -> str:
    return {"int": "a whole number", "float": "a number"}.get(name, f"a value of the type {name}")


def _in_one_sentence(message: str) -> str:
    """argparse's message as key, value and remedy; of another form only on one line."""
    found = re.match(r"argument --(?:no[-_])?(\w+)[^:]*: invalid (\w+) value: (.*)", message, re.DOTALL)
    if found:
        return f"{found[1]}={ends(found[3], SHOWN)}: TRL reads {_an(found[2])} there"
    return ends(" ".join(message.split()), SHOWN)


def _refused(error: Exception, made: Any, processes: int, name: str) -> str:
    """TRL's refusal with the remedy, where it is the arithmetic of its batches."""
    said = ends(" ".join(str(error).split()).rstrip("."), SHOWN) or type(error).__name__
    try:
        values, _ = made.parse_known_args(args=[])
        remedy = batch_fault(vars(values), processes, name)
    except (TypeError, ValueError, KeyError):  # the values themselves are not numbers
        remedy = None
    if remedy is not None:
        return remedy
    if "bf16" in said:
        return f"TRL refuses it on this machine: {said}; run doctor where you train, or set use_cpu: true, bf16: false"
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"TRL refuses it: {kind}{said}"


def batch_fault(values: Mapping[str, Any], processes: int, name: str) -> str | None:
    """The fault in the arithmetic of a generation's batch, by TRL's rule, with the remedy; None where there is none.

    generation_batch_size = per_device_train_batch_size x processes x steps_per_generation, where the last is
    gradient_accumulation_steps unless given, must be divisible by num_generations.
    """
    device, group = values["per_device_train_batch_size"], values["num_generations"]
    given, steps = values["generation_batch_size"], values["steps_per_generation"]
    if group < 2:
        return f"num_generations={group}: {name} compares the completions of one prompt; set 2 or more"
    every = device * processes
    each = f"per_device_train_batch_size={device} x {number_of_processes(processes)}"
    if given is not None and steps is not None:
        return (
            f"generation_batch_size={given} and steps_per_generation={steps}: TRL takes one of them; remove the other"
        )
    if given is not None:
        whole = math.lcm(every, group)
        if given % every or given % group:
            return (
                f"generation_batch_size={given} is not divisible by both {each} = {every} and num_generations={group}; "
                f"set generation_batch_size to {whole} or a multiple of it"
            )
        return None
    key = "gradient_accumulation_steps" if steps is None else "steps_per_generation"
    count = values["gradient_accumulation_steps"] if steps is None else steps
    batch = every * count
    if batch % group == 0:
        return None
    least = group // math.gcd(every, group)
    sizes = [str(size) for size in range(2, batch + 1) if batch % size == 0]
    other = f", or num_generations to {' or '.join(sizes[:4])}" if sizes else ""
    return (
        f"{each} x {key}={count} = {batch} completions a generation, which is not divisible by "
        f"num_generations={group}: groups must be whole; set {key} to {least} or a multiple of it{other}"
    )


def number_of_processes(count: int) -> str:
    return f"{count} {'process' if count == 1 else 'processes'}"


def _check_complete(given: TRLArguments) -> None:
    """Raises ConfigError for arguments without which the script, or its trainer, fails."""
    script, training = given.script, given.training
    if not given.model.model_name_or_path:
        raise given.error("model_name_or_path is missing: name the model to train")
    if not script.dataset_name and not given.mixture.datasets:
        raise given.error("dataset_name and datasets are missing: give one of them")
    count = len(script.reward_funcs or []) + bool(script.reward_model_name_or_path)
    if count == 0:
        raise given.error("reward_funcs and reward_model_name_or_path are missing: give one of them")
    for name in map(str, script.reward_funcs or []):
        if name not in KNOWN_REWARDS and not set(".:") & set(name):
            raise given.error(
                f"reward_funcs: TRL's script does not know {quoted(name)}: name one of {', '.join(KNOWN_REWARDS)}, or "
                "a function as MODULE.FUNCTION"
            )
    if training.reward_weights is not None and len(training.reward_weights) != count:
        raise given.error(f"reward_weights={training.reward_weights}: give {count}, one weight for each reward")
    if getattr(training, "multi_objective_aggregation", "sum_then_normalize") not in (
        "sum_then_normalize",
        "normalize_then_sum",
    ):
        raise given.error(
            f"multi_objective_aggregation={quoted(training.multi_objective_aggregation)}: TRL knows sum_then_normalize "
            "and normalize_then_sum"
        )
