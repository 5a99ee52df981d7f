"""verl for the tests: the functions that we replace, as a stand-in of a page and as the installed package.

The stand-in has verl's modules and names, and the lines of verl 0.9.1 that the KL passes through. So the same tests run
without verl, and with it call verl's own functions, its DataProto and its configuration.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

CORE, CONFIG = "verl.trainer.ppo.core_algos", "verl.utils.config"
RAY, V1 = "verl.trainer.ppo.ray_trainer", "verl.trainer.ppo.v1.trainer_base"


class Settings(dict[str, Any]):
    """A nested dictionary whose entries are attributes too, as those of OmegaConf."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return Settings(value) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Verl:
    """The places, and how to make what a trainer has."""

    name: str
    core: Any
    config: Any
    ray: Any
    v1: Any
    settings: Callable[..., Any]
    """verl's configuration: overrides as on its command line -> the whole of it."""
    data: Callable[[dict[str, Tensor]], Any]
    """Tensors -> the batch that apply_kl_penalty takes."""
    trainers: dict[str, type]
    """Trainer classes, by name."""


# -- the stand-in ---------------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str = "0.9.1", without: str = "") -> Verl:
    """The stand-in, in sys.modules until the test ends. ``without``: a name of it that is left out."""
    names = ("verl", "verl.utils", CONFIG, "verl.trainer", "verl.trainer.ppo", CORE, RAY, "verl.trainer.ppo.v1", V1)
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, name)
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    core, config, ray, v1 = (modules[name] for name in (CORE, CONFIG, RAY, V1))
    modules["verl"].__dict__["__version__"] = version
    core.__dict__.update(get_kl_controller=_get_kl_controller, FixedKLController=Fixed)
    config.__dict__.update(validate_config=lambda config, *args, **kwargs: None)
    trainers = {name: type(name, (Trainer,), dict(vars(Trainer))) for name in ("RayPPOTrainer", "PPOTrainer")}
    ray.__dict__.update(apply_kl_penalty=_apply_kl_penalty, RayPPOTrainer=trainers["RayPPOTrainer"])
    v1.__dict__.update(apply_kl_penalty=_apply_kl_penalty, PPOTrainer=trainers["PPOTrainer"])
    for module in modules.values():
        module.__dict__.pop(without, None)
    return Verl(
        "stand-in", core, config, ray, v1, _stand_in_settings, lambda batch: SimpleNamespace(batch=batch), trainers
    )


class Fixed:
    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        pass


def _get_kl_controller(kl_ctrl: Any) -> Any:
    if kl_ctrl.type != "fixed":
        raise NotImplementedError
    return Fixed(kl_ctrl.kl_coef)


def _apply_kl_penalty(data: Any, kl_ctrl: Any, kl_penalty: str = "kl") -> Any:
    mask = data.batch["response_mask"]
    kld = (data.batch["old_log_probs"] - data.batch["ref_log_prob"]) * mask
    beta = kl_ctrl.value
    current_kl = ((kld * mask).sum(-1) / (mask.sum(-1) + 1e-8)).mean().item()
    kl_ctrl.update(current_kl=current_kl, n_steps=len(mask))
    data.batch["token_level_rewards"] = data.batch["token_level_scores"] - beta * kld
    return data, {"actor/reward_kl_penalty": current_kl, "actor/reward_kl_penalty_coeff": beta}


class Trainer:
    """How verl's trainers save and load, as far as files go."""

    config: Any
    global_steps: int

    def _save_checkpoint(self) -> None:
        local = Path(self.config.trainer.default_local_dir)
        folder = local / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data.pt").write_text("")
        (local / "latest_checkpointed_iteration.txt").write_text(str(self.global_steps))

    def _load_checkpoint(self) -> None:
        self.global_steps = 0
        settings = self.config.trainer
        if settings.resume_mode == "resume_path":
            self.global_steps = int(settings.resume_from_path.split("global_step_")[-1])
        latest = Path(settings.default_local_dir) / "latest_checkpointed_iteration.txt"
        if settings.resume_mode == "auto" and latest.exists():
            self.global_steps = int(latest.read_text())


def _stand_in_settings(*overrides: str) -> Any:
    made: dict[str, Any] = {
        "algorithm": {
            "use_kl_in_reward": False,
            "kl_penalty": "kl",
            "kl_ctrl": {"_target_": "", "type": "fixed", "kl_coef": 0.001, "horizon": 10000, "target_kl": 0.1},
        },
        "trainer": {"default_local_dir": "", "resume_mode": "auto", "resume_from_path": None},
    }
    for override in overrides:
        name, value = override.lstrip("+").split("=", 1)
        *sections, field = name.split(".")
        part = made
        for section in sections:
            part = part[section]
        part[field] = json.loads(value) if value[:1] in "0123456789-tfn" else value
    return Settings(made)


# -- the installed package ------------------------------------------------------------------------------------------


@contextmanager
def installed() -> Iterator[Verl]:
    """The installed verl, with its own functions at the beginning and at the end. Skips where it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl's own, of engines that are not there
        try:
            core, config, ray, v1, protocol, sync = (
                importlib.import_module(name)
                for name in (CORE, CONFIG, RAY, V1, "verl.protocol", "verl.trainer.ppo.v1.trainer_sync")
            )
        except ImportError as error:
            pytest.skip(f"verl is not installed ({error}): docs/verl.md, Tests, says how to run this")
        _restore()
        try:
            trainers = {"RayPPOTrainer": ray.RayPPOTrainer, "PPOTrainer": sync.PPOTrainerSync}
            yield Verl("installed", core, config, ray, v1, _settings, protocol.DataProto.from_single_dict, trainers)
        finally:
            _restore()


def _restore() -> None:
    """Takes our wrappers off again."""
    ray, v1 = sys.modules[RAY], sys.modules[V1]
    holders: list[Any] = [*sys.modules.values(), ray.__dict__["RayPPOTrainer"], v1.__dict__["PPOTrainer"]]
    for holder in holders:
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if getattr(value, "__dict__", {}).get("stable_rlhf") is True:
                setattr(holder, name, value.__wrapped__)


WITHOUT_A_SIZE = [
    f"actor_rollout_ref.{part}.{name}=true"
    for part, name in (
        ("actor", "use_dynamic_bsz"),
        ("ref", "log_prob_use_dynamic_bsz"),
        ("rollout", "log_prob_use_dynamic_bsz"),
    )
]
"""verl wants microbatch sizes or these."""


def _settings(*overrides: str) -> Any:
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*WITHOUT_A_SIZE, *overrides])


# -- for both -------------------------------------------------------------------------------------------------------


class _Loader:
    """A data loader of 10 batches, whose place in them is not looked at."""

    def __len__(self) -> int:
        return 10

    def state_dict(self) -> dict[str, int]:
        return {"batches": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == self.state_dict()


def trainer_of(verl: Verl, name: str, config: Any, controller: Any) -> Any:
    """A trainer of verl's without workers: what its checkpoint methods read, and stand-ins for what they call."""
    cls = verl.trainers[name]
    trainer = object.__new__(cls)
    group = SimpleNamespace(save_checkpoint=lambda *args, **kwargs: None, load_checkpoint=lambda *args, **kwargs: None)
    trainer.__dict__.update(
        config=config,
        global_steps=0,
        use_critic=False,
        actor_rollout_wg=group,
        train_dataloader=_Loader(),
        trainer_mode="sync",
        checkpoint_callback=SimpleNamespace(on_save=lambda **kwargs: None),
        kl_ctrl_in_reward=controller,
    )
    return trainer


def batch_of(
    kl: float, error: float = 0.0, rewards: tuple[float, ...] = (1.0, 3.0), entropy: float = 2.0
) -> dict[str, Tensor]:
    """A rollout with exactly this KL and entropy, its standard error, and these rewards, each at a last token.

    Rows have 4 tokens each; row i has the log-ratio kl +- spread, in turn, so that with an even number of rows n the
    error of the mean is spread / sqrt(n - 1).
    """
    rows = len(rewards)
    assert rows % 2 == 0
    spread = error * (rows - 1) ** 0.5
    signs = torch.tensor([1.0, -1.0] * (rows // 2), dtype=torch.float64)[:, None].expand(rows, 4)
    scores = torch.zeros(rows, 4, dtype=torch.float64)
    scores[:, -1] = torch.tensor(rewards, dtype=torch.float64)
    logp = torch.full((rows, 4), -entropy, dtype=torch.float64)
    return {
        "response_mask": torch.ones(rows, 4, dtype=torch.int64),
        "token_level_scores": scores,
        "old_log_probs": logp,
        "ref_log_prob": logp - kl - spread * signs,
    }
