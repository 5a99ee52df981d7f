"""Puts the controller `safe` into verl: which of its functions are replaced, and when.

`attach` replaces two functions, which act as before unless `algorithm.kl_ctrl.type` is `safe`. Only then, when a
trainer asks for its controller, `apply_kl_penalty` and the trainers' checkpoint methods are wrapped too. With another
controller they still act as before.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stable_rlhf.errors import ConfigError
from stable_rlhf.integrations.verl import (
    TYPE,
    SafeKLController,
    check_config,
    check_penalty,
    check_version,
    controller_from,
    load_state,
    measure,
    save_state,
)

logger = logging.getLogger(__name__)

ENTRIES = ("verl.trainer.ppo.core_algos:get_kl_controller", "verl.utils.config:validate_config")
"""The functions through which everything begins: one makes the controller, one checks a run's configuration."""

RAY_TRAINER = "verl.trainer.ppo.ray_trainer"
TRAINERS = {RAY_TRAINER: "RayPPOTrainer", "verl.trainer.ppo.v1.trainer_base": "PPOTrainer"}
"""The trainers with `_save_checkpoint` and `_load_checkpoint`: the older one, and v1, which is verl's default."""

FULLY_ASYNC = "FullyAsyncTrainer"
"""A trainer that saves and loads checkpoints in its own way: refused."""


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, the first time that it is given."""
    logger.warning(message)


def attach() -> bool:
    """Replaces ENTRIES; a second call changes nothing. They act as before unless `safe` is asked for.

    Returns False, and warns once, where one of them is not there.
    """
    version = getattr(importlib.import_module("verl"), "__version__", "of unknown version")
    missing = _missing(ENTRIES)
    if missing:
        warn_once(f"stable-rlhf cannot attach to verl {version}: it has no {', no '.join(missing)}")
        return False
    for name, wrap in zip(ENTRIES, (_making, _validating), strict=True):
        _replace(name, functools.partial(wrap, version))
    return True


def _making(version: str, get: Callable[..., Any]) -> Callable[..., Any]:
    def get_kl_controller(kl_ctrl: Any) -> Any:
        if kl_ctrl.type != TYPE:
            return get(kl_ctrl)
        check_version(version)
        attach_trainers(version)
        return controller_from(kl_ctrl)

    return get_kl_controller


def _validating(version: str, validate: Callable[..., Any]) -> Callable[..., Any]:
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        check_config(config, version)
        return validate(config, *args, **kwargs)

    return validate_config


def attach_trainers(version: str) -> None:
    """Lets verl's trainers show the controller each rollout, save its state and restore it.

    Raises RuntimeError, naming version and what was not found, where that cannot be done; ConfigError where a trainer
    is in use that saves its checkpoints in its own way.
    """
    ray_trainer = importlib.import_module(RAY_TRAINER)
    trainers = [f"{name}:{cls}" for name, cls in TRAINERS.items() if name in sys.modules]
    methods = {f"{name}.{method}": wrap for name in trainers for method, wrap in METHODS.items()}
    missing = _missing((f"{RAY_TRAINER}:apply_kl_penalty", *methods))
    if missing:
        raise RuntimeError(f"stable-rlhf cannot attach to verl {version}: it has no {', no '.join(missing)}")
    if any(cls.__name__ == FULLY_ASYNC for cls in _below(ray_trainer.RayPPOTrainer)):
        raise ConfigError(
            f"algorithm.kl_ctrl.type={TYPE} is not supported with verl's {FULLY_ASYNC}, which saves its checkpoints in "
            "its own way: take another trainer, or another type."
        )
    penalty = ray_trainer.apply_kl_penalty
    for name, module in list(sys.modules.items()):  # trainers have imported it by name
        if getattr(module, "__dict__", {}).get("apply_kl_penalty") is penalty:
            _replace(f"{name}:apply_kl_penalty", _observing)
    for name, wrap in methods.items():
        _replace(name, wrap)


def _observing(penalty: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_kl_penalty`, which shows `safe` the rollout first, and gives its figures to verl's logger."""

    def apply_kl_penalty(data: Any, kl_ctrl: Any, kl_penalty: str = "kl") -> Any:
        if not isinstance(kl_ctrl, SafeKLController):
            return penalty(data, kl_ctrl=kl_ctrl, kl_penalty=kl_penalty)
        check_penalty(kl_penalty)
        kl_ctrl.observe(measure(data.batch))
        data, metrics = penalty(data, kl_ctrl=kl_ctrl, kl_penalty=kl_penalty)
        return data, {**metrics, **kl_ctrl.metrics()}

    return apply_kl_penalty


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    """`_save_checkpoint`, which writes the state first: verl's last act is to name the checkpoint as the latest."""

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        controller = getattr(self, "kl_ctrl_in_reward", None)
        if isinstance(controller, SafeKLController):
            save_state(controller, _folder(self), self.global_steps)
        return save(self, *args, **kwargs)

    return _save_checkpoint


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """`_load_checkpoint`, which then restores the state from the folder that verl has loaded."""

    def _load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        controller = getattr(self, "kl_ctrl_in_reward", None)
        if isinstance(controller, SafeKLController) and getattr(self, "global_steps", 0) > 0:  # else the run begins
            settings = self.config.trainer
            given = settings.resume_mode == "resume_path"
            load_state(controller, Path(settings.resume_from_path) if given else _folder(self), self.global_steps)
        return result

    return _load_checkpoint


METHODS = {"_save_checkpoint": _saving, "_load_checkpoint": _loading}
"""Methods of TRAINERS, and what wraps them."""


def _folder(trainer: Any) -> Path:
    return Path(trainer.config.trainer.default_local_dir) / f"global_step_{trainer.global_steps}"


def _holder(name: str) -> tuple[Any, str]:
    """Of a function's name `module:function` or `module:Class.method`: the module or class, and the last part.

    Raises ImportError or AttributeError where there is none.
    """
    module, _, path = name.partition(":")
    *classes, attribute = path.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), attribute


def _missing(names: Iterable[str]) -> list[str]:
    """Those of the names that cannot be found, with the reason."""
    found = []
    for name in names:
        try:
            getattr(*_holder(name))
        except (ImportError, AttributeError) as error:
            found.append(f"{name} ({error})")
    return found


def _replace(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts a wrapper in the place of a function, unless one of ours is there."""
    holder, attribute = _holder(name)
    function = getattr(holder, attribute)
    if not hasattr(function, "stable_rlhf"):
        wrapper = functools.update_wrapper(wrap(function), function)
        wrapper.__dict__["stable_rlhf"] = True
        setattr(holder, attribute, wrapper)


def _below(cls: type) -> list[type]:
    return [found for child in cls.__subclasses__() for found in (child, *_below(child))]
