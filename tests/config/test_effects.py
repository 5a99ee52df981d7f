"""No setting does nothing: a tiny run with each of them turned shows it, in the place that the table names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from stable_rlhf.config.config import Config
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.errors import ConfigError, PromptError
from stable_rlhf.training.trainer import SAFETrainer
from tests.conftest import tiny_llama

TESTS = Path(__file__).parent.parent


def letters(prompts, completions, **columns):
    """A reward of the text alone, with a spread."""
    return [(sum(map(ord, completion)) % 17) / 8 for completion in completions]


def length(prompts, completions, **columns):
    return [len(completion) + sum(map(ord, completion)) / 1e4 for completion in completions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What can be observed of a run from outside."""

    rows: list[dict[str, Any]]
    """metrics.jsonl."""
    weights: str
    """SHA-256 over the saved model and heads."""
    files: list[str]
    """Paths in the run folder, and its own name first."""
    evaluation: str
    passes: Counter[tuple[str, int]]
    """How often a module of a class was called with so many rows."""
    printed: str
    device: str
    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A field's other value, and where the difference shows."""

    to: Any
    shows_in: str = "rows"
    of: str | None = None
    """One metric that must differ, where any would be too easy."""
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of both runs that let the field act."""
    also: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that the other value needs, without an effect of their own."""
    same: tuple[str, ...] = ()
    """What must not differ: memory and speed are no part of the result."""


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            whole[name] = {**whole.get(name, {}), **value} if name in SECTIONS else value
    return whole


LORA = {"model": {"lora_r": 2}}
HELD_OUT = {"data": {"train": "{prompts}", "eval_size": 2}}
BUILTIN = {"data": {"train": "builtin", "max_prompt_length": 16}}
BOTH_WAYS = {"kl": {"in_reward": False, "in_loss": "k2"}}
NO_BUDGET = {"kl": {"controller": "none", "in_reward": False}, "optim": {"preview": False}}  # that would allow it
AT_ONCE = {"max_steps": 10, "guard": {"patience": 1}}  # levels are known after the fifth step
ROLLS_BACK = {"max_steps": 7, "guard": {"patience": 1, "min_explained_variance": 0.999}}  # which no critic reaches
TWO_HEADS = {"critic": {"heads": 2}}
TWO_REWARDS = {"reward": {"functions": [f"tests.config.test_effects:{name}" for name in ("letters", "length")]}}
GROUPED = {"rollout": {"num_generations": 4}, "critic": {"heads": 0}, "optim": {"advantage": "grpo"}}
REWARD_MODEL = {"reward": {"functions": ["builtin"]}}

TURNED: dict[str, Turn | str] = {
    "preset": Turn(to="ppo"),
    "output_dir": Turn(to=None, shows_in="files"),
    "overwrite_output_dir": "training/test_arguments.py::test_a_run_is_replaced_where_that_is_asked_for",
    "max_steps": Turn(to=3),
    "save_steps": Turn(to=1, shows_in="files"),
    "save_total_limit": Turn(to=1, shows_in="files", given={"save_steps": 1}),
    "eval_steps": Turn(to=1, shows_in="evaluation", given=HELD_OUT),
    "metric_for_best_model": Turn(to="reward", shows_in="files", given={**HELD_OUT, "eval_steps": 1}),
    "greater_is_better": "training/test_best.py::test_the_best_checkpoint_is_kept_and_becomes_final",
    "load_best_model_at_end": "training/test_best.py::test_the_best_checkpoint_is_kept_and_becomes_final",
    "push_to_hub": "training/test_hub.py::test_a_run_is_uploaded_whole_at_its_end",
    "hub_model_id": "training/test_hub.py::test_a_run_is_uploaded_whole_at_its_end",
    "hub_private": "training/test_hub.py::test_a_run_is_uploaded_whole_at_its_end",
    "seed": Turn(to=1),
    "model.name": Turn(to="{other_model}"),
    "model.revision": "config/test_effects.py::test_a_revision_is_the_one_that_is_loaded",
    "model.gguf_file": Turn(to="absent.gguf", shows_in="error"),
    "model.trust_remote_code": "config/test_effects.py::test_a_models_own_code_runs_only_when_it_is_trusted",
    "model.device": Turn(to="cuda", shows_in="device" if torch.cuda.is_available() else "error"),
    "model.dtype": Turn(to="bfloat16", of="objective/entropy"),
    "model.lora_r": Turn(to=2, shows_in="files"),
    "model.lora_alpha": Turn(to=64.0, given=LORA),
    "model.lora_target_modules": Turn(to=["q_proj"], shows_in="weights", given=LORA),
    "model.lora_options": Turn(to={"use_rslora": True}, shows_in="weights", given=LORA),
    "model.cuda_graphs": "learner/test_passes.py::test_graphs_are_captured_where_they_are_asked_for",
    "model.torch_compile": "learner/test_passes.py::test_a_compiled_model_gives_the_figures_of_the_plain_one",
    "model.self_check": "policy/test_self_check.py::test_a_run_tries_its_model_unless_the_check_is_off",
    "model.gradient_checkpointing": Turn(to=True, shows_in="passes", same=("rows", "weights")),
    "data.train": Turn(to="{other_prompts}"),
    "data.split": Turn(to="eval", given=BUILTIN),
    "data.config_name": "data/test_sources.py::test_a_hub_data_set_is_asked_for_by_its_config_folder_and_split",
    "data.revision": "data/test_given.py::test_the_held_out_part_of_the_same_hub_set_has_its_config_and_revision",
    "data.format": Turn(to="hh", shows_in="error"),
    "data.prompt_column": Turn(to="chosen"),
    "data.eval": Turn(to="{other_prompts}", shows_in="evaluation", given=HELD_OUT),
    "data.eval_split": Turn(to="train", shows_in="evaluation", given={"data": {**BUILTIN["data"], "eval_size": 2}}),
    "data.eval_size": Turn(to=2, shows_in="evaluation"),
    "data.streaming": "data/test_streamed.py::test_a_file_is_read_as_it_is_needed",
    "data.max_prompt_length": Turn(to=2, of="prompts/truncated"),
    "data.limit": Turn(to=2),
    "reward.functions": Turn(to=["tests.config.test_effects:length"], of="objective/scores"),
    "reward.url": "rewards/test_client_runs.py::test_a_run_is_rewarded_by_the_server_as_by_the_function_itself",
    "reward.weights": Turn(to=[2.0], of="objective/scores"),
    "reward.aggregate": Turn(to="min", of="objective/scores", given=TWO_REWARDS),
    "reward.uncertainty_coef": Turn(
        to=2.0, of="objective/scores", given=merged(TWO_REWARDS, {"reward": {"aggregate": "uncertainty"}})
    ),
    "reward.gold": Turn(
        to=["tests.config.test_effects:length"], shows_in="evaluation", given=HELD_OUT, same=("rows", "weights")
    ),
    "reward.missing_eos_penalty": Turn(to=1.0, of="objective/scores"),
    "reward.normalise": Turn(to="none", of="val/returns_mean"),
    "reward.batch_size": Turn(to=1, shows_in="passes", given=REWARD_MODEL),
    "reward.append_eos": "rewards/test_model_texts.py::test_the_settings_of_texts_reach_the_rewards",
    "reward.skip_special_tokens": "rewards/test_model_texts.py::test_the_settings_of_texts_reach_the_rewards",
    "reward.timeout": "rewards/test_client_runs.py::test_a_servers_settings_act",
    "reward.retries": "rewards/test_client_runs.py::test_a_servers_settings_act",
    "reward.max_wait": "rewards/test_client_runs.py::test_a_servers_settings_act",
    "reward.token_env": "rewards/test_client.py::test_the_token_comes_from_the_environment_and_is_shown_nowhere",
    "reward.columns": "rewards/test_client.py::test_chosen_columns_are_sent_in_their_batches",
    "reward.accept_changed": "training/test_fingerprints.py::test_a_repaired_reward_is_accepted_where_it_is_set",
    "reward.trust_remote_code": "config/test_effects.py::test_a_reward_models_own_code_runs_only_when_it_is_trusted",
    "rollout.batch_size": Turn(to=8, of="episode"),
    "rollout.num_generations": Turn(to=2, of="objective/scores"),
    "rollout.max_completion_length": Turn(to=2, of="completions/max_length"),
    "rollout.temperature": Turn(to=0.5, of="objective/entropy"),
    "rollout.stop_tokens": Turn(to=[*range(2, 100), "<pad>"], of="completions/mean_length"),
    "rollout.stop_strings": Turn(to=[chr(code) for code in range(33, 127)], of="completions/mean_length"),
    "optim.learning_rate": Turn(to=1e-3, of="lr"),
    "optim.adaptive_kl": Turn(to=1e-9, of="lr"),
    "optim.lr_scheduler_type": Turn(to="linear", of="lr"),
    "optim.warmup_steps": Turn(to=1, of="lr"),
    "optim.weight_decay": Turn(to=0.5, shows_in="weights"),
    "optim.num_iterations": Turn(to=1, of="val/ratio_var"),
    "optim.num_mini_batches": Turn(to=1, of="val/ratio_var"),
    "optim.microbatch_tokens": Turn(to=1, shows_in="passes"),
    "optim.advantage": Turn(
        to="rloo", of="loss/policy_avg", given=merged(GROUPED, {"optim": {"advantage": "dr_grpo"}})
    ),
    "optim.skip_zero_variance_groups": "learner/test_groups.py::"
    "test_they_are_left_out_of_loss_and_denominator_where_that_is_asked_for",
    "optim.loss": Turn(to="cispo", of="loss/policy_avg"),
    "optim.importance": Turn(to="sequence", of="policy/clipfrac_avg", given={"optim": {"epsilon": 1e-3}}),
    "optim.denominator": Turn(to="length", of="loss/policy_avg", given={"rollout": {"stop_tokens": [*range(2, 62)]}}),
    "optim.epsilon": Turn(to=1e-4, of="policy/clipfrac_avg"),
    "optim.epsilon_high": Turn(to=1e-4, of="policy/clipfrac_avg"),
    "optim.gamma": Turn(to=0.5, of="val/returns_mean"),
    "optim.lam": Turn(to=0.5, of="val/returns_mean"),
    "optim.length_alpha": Turn(to=1.0, of="val/returns_mean"),
    "optim.whiten_floor": Turn(to=10.0, of="loss/policy_avg"),
    "optim.skip_equal_scores": "learner/test_signal.py::test_equal_scores_teach_only_where_that_is_asked_for",
    "optim.entropy_coef": Turn(to=0.1, of="grad_norm/policy"),
    "optim.max_grad_norm": Turn(to=1e-4, shows_in="weights"),
    "optim.preview": Turn(to=True, shows_in="weights", of="safe/step_scale"),
    "optim.max_update_kl": Turn(to=1e-6, of="safe/step_scale", given={"optim": {"preview": True}}),
    "critic.heads": Turn(to=2, of="val/mean"),  # 0: with optim.advantage
    "critic.temperature": Turn(to=0.01, of="val/mean", given=TWO_HEADS),
    "critic.regress": Turn(to="soft_min", of="loss/value_avg", given=TWO_HEADS),
    "critic.bootstrap": Turn(to="target", of="val/returns_mean"),
    "critic.target_tau": Turn(to=0.5, of="safe/target_gap"),
    "critic.loss": Turn(to="huber", of="loss/value_avg"),
    "critic.huber_delta": Turn(to=0.01, of="loss/value_avg", given={"critic": {"loss": "huber"}}),
    "critic.cliprange_value": Turn(to=0.2, of="val/clipfrac_avg", given={"critic": {"learning_rate": 0.1}}),
    "critic.clip_reduction": Turn(
        to="max", of="loss/value_avg", given={"critic": {"learning_rate": 0.1, "cliprange_value": 0.2}}
    ),
    "critic.zero_init": Turn(to=False, of="val/mean"),
    "critic.vf_coef": Turn(to=2.0, of="grad_norm/critic"),
    "critic.backbone_gradient": Turn(to=True, of="grad_norm/policy"),
    "critic.learning_rate": Turn(to=None, of="lr_critic"),
    "critic.max_grad_norm": Turn(to=1e-4, shows_in="weights"),
    "critic.lam": Turn(to=0.5, of="val/returns_mean"),
    "critic.warmup_steps": Turn(to=1, of="val/ratio_var"),
    "kl.controller": Turn(to="none", of="safe/kl_coef"),
    "kl.observe": Turn(to="k1", of="safe/kl_short"),
    "kl.settings": Turn(to={"initial_coef": 1.0}, of="safe/kl_coef"),
    "kl.in_reward": Turn(to=True, of="objective/non_score_reward", given=BOTH_WAYS, also={"kl": {"allow_both": True}}),
    "kl.length_neutral": Turn(to=False),
    "kl.in_loss": Turn(to="exact", of="loss/kl_avg", given=BOTH_WAYS),
    "kl.allow_both": Turn(to=True, shows_in="error", given={"kl": {"in_reward": True, "in_loss": "k2"}}),
    "guard.enabled": Turn(to=False, of="safe/rollbacks"),
    "guard.max_kl_ratio": Turn(
        to=None, of="safe/rollbacks", given={"max_steps": 5, "kl": {"settings": {"budget": 1e-6}}}
    ),
    "guard.max_kl": Turn(
        to=1e-6,
        of="safe/rollbacks",
        given={"max_steps": 5, **NO_BUDGET},
    ),
    "guard.min_entropy": Turn(to=0.9999, of="safe/rollbacks", given={**AT_ONCE, **NO_BUDGET}),
    "guard.max_entropy": Turn(
        to=1.0001, of="safe/rollbacks", given={**AT_ONCE, **NO_BUDGET, "optim": {"entropy_coef": 1.0, "preview": False}}
    ),
    "guard.min_distinct": "control/test_guard.py::test_a_rules_setting_moves_its_bound_and_none_turns_it_off",
    "guard.min_length": "control/test_guard.py::test_a_rules_setting_moves_its_bound_and_none_turns_it_off",
    "guard.max_drawdown": "control/test_guard_rewards.py::test_a_reward_that_loses_half_of_its_gain_is_a_crash",
    "guard.min_explained_variance": Turn(to=0.999, of="safe/rollbacks", given=AT_ONCE),
    "guard.patience": Turn(to=2, of="safe/rollbacks", given=ROLLS_BACK),
    "guard.snapshot_steps": Turn(to=1, of="objective/kl", given=ROLLS_BACK),
    "guard.max_rollbacks": "training/test_recovery_ends.py::test_after_max_rollbacks_the_run_stops_where_it_was_good",
    "guard.rollback_factor": Turn(to=0.1, of="lr", given=ROLLS_BACK),
    "log.report_to": Turn(to=["tensorboard"], shows_in="files"),
    "log.run_name": "training/test_trackers.py::test_trackers_get_the_runs_settings_and_its_name",
    "log.completions_steps": Turn(to=1, shows_in="files"),
    "log.progress": Turn(to=True, shows_in="printed"),
}
"""Setting -> its turn, or the test that observes it."""


def filled(value: Any, places: dict[str, str]) -> Any:
    """The value with the places' names replaced by their paths."""
    if isinstance(value, dict):
        return {key: filled(item, places) for key, item in value.items()}
    return value.format(**places) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def places(
    tiny_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    tiny_llama(len(tokenizer), seed=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name in ("prompts", "other_prompts"):
        rows = [{"prompt": f"{name} {i}", "chosen": f"{name}\n\nHuman: {i}\n\nAssistant: yes"} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_folder),
        "other_model": str(folder / "model"),
        **{name: str(folder / f"{name}.jsonl") for name in ("prompts", "other_prompts")},
    }


@pytest.fixture(scope="module")
def base(places: dict[str, str]) -> dict[str, Any]:
    """Two steps of two minibatches that all learn something, so much that the preview would hold most of it back."""
    return {
        "max_steps": 2,
        "save_steps": 0,
        "model": {"name": places["model"], "device": "cpu"},
        "data": {"train": places["prompts"], "eval_size": 0},
        "reward": {"functions": ["tests.config.test_effects:letters"]},
        "rollout": {"batch_size": 4, "max_completion_length": 6},
        "optim": {"learning_rate": 1e-2, "preview": False},
        "log": {"progress": False, "completions_steps": 0},
    }


Run: TypeAlias = Callable[[str, dict[str, Any]], "Seen"]


@pytest.fixture(scope="module")
def known() -> dict[str, Seen]:
    """What runs have shown, by name and settings: most turns are compared with one and the same plain run."""
    return {}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: dict[str, Seen]
) -> Run:
    monkeypatch.chdir(tmp_path)

    def go(name: str, settings: dict[str, Any]) -> Seen:
        key = f"{name} {settings}"
        if key not in known:
            known[key] = observed(name, settings, capsys)
        return known[key]

    return go


def observed(name: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Seen:
    passes: Counter[tuple[str, int]] = Counter()

    def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if type(module).__name__ in ("ValueHead", "LlamaMLP"):
            passes[type(module).__name__, len(inputs[0]) if inputs else 0] += 1

    hook = register_module_forward_pre_hook(count)
    error, made, folder = "", None, Path(name)
    try:
        config = Config.from_preset(**{"output_dir": name, **settings})
        made = SAFETrainer(config.model.name, args=config)
        folder = made.run_dir
        made.train()
    except (ConfigError, PromptError, OSError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        hook.remove()
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []
    digest = hashlib.sha256()
    for file in sorted((folder / "final").glob("*.safetensors")):
        digest.update(file.read_bytes())
    metrics, evaluation = folder / "metrics.jsonl", folder / "evaluation.json"
    return Seen(
        rows=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else [],
        weights=digest.hexdigest(),
        files=[str(folder.parent.name), *files],
        evaluation=evaluation.read_text() if evaluation.exists() else "",
        passes=passes,
        printed=capsys.readouterr().out,
        device=str(made.model.device) if made else "",
        error=error,
    )


def test_every_setting_has_a_turn_or_a_test_that_is_there() -> None:
    settings = [f.name for f in dataclasses.fields(Config) if f.name not in SECTIONS]
    settings += [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section)]
    assert sorted(TURNED) == sorted(settings)
    for where in (turn for turn in TURNED.values() if isinstance(turn, str)):
        file, _, test = where.partition("::")
        assert f"def {test}(" in (TESTS / file).read_text(), where


def test_the_same_settings_show_the_same(base: dict[str, Any], run: Run) -> None:
    """So that whatever differs below is the setting's doing."""
    one, two = run("one", base), run("two", base)
    assert one == two
    assert len(one.rows) == 2
    assert one.error == ""


@pytest.mark.parametrize(("setting", "turn"), [(name, turn) for name, turn in TURNED.items() if isinstance(turn, Turn)])
def test_turning_it_shows(
    setting: str,
    turn: Turn,
    base: dict[str, Any],
    places: dict[str, str],
    run: Run,
) -> None:
    section, _, field = setting.rpartition(".")
    given = merged(base, filled(turn.given, places))
    value = filled(turn.to, places)
    plain = run("plain", given)
    turned = run("turned", merged(given, turn.also, {section: {field: value}} if section else {field: value}))
    assert [seen.error for seen in (plain, turned)].count("") == (1 if turn.shows_in == "error" else 2)
    if turn.of is not None:
        figures = [[row.get(turn.of) for row in seen.rows] for seen in (plain, turned)]
        assert figures[0] != figures[1]
    assert getattr(plain, turn.shows_in) != getattr(turned, turn.shows_in)
    for name in turn.same:
        assert getattr(plain, name) == getattr(turned, name)


# -- settings that need a model of their own ------------------------------------------------------------------------

REMOTE = """
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

print("own code runs")

class RemotePolicy(LlamaForCausalLM):
    pass

class RemoteReward(LlamaForSequenceClassification):
    pass
"""


def with_its_own_code(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, auto: str, name: str) -> str:
    """A model's folder that offers a class of a Python file that lies in it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "remote.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {auto: f"remote.{name}"}}))
    return str(folder)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers copies such code to a folder before it runs it: here, to one of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])


@pytest.mark.usefixtures("modules")
def test_a_models_own_code_runs_only_when_it_is_trusted(
    base: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_llama(len(tokenizer))
    folder = with_its_own_code(tmp_path / "policy", made, tokenizer, "AutoModelForCausalLM", "RemotePolicy")
    for trusted, printed, kind in ((False, "", "LlamaForCausalLM"), (True, "own code runs\n", "RemotePolicy")):
        config = Config.from_preset(**merged(base, {"model": {"name": folder, "trust_remote_code": trusted}}))
        assert type(SAFETrainer(folder, args=config).model.policy).__name__ == kind
        assert capsys.readouterr().out == printed


@pytest.mark.usefixtures("modules")
def test_a_reward_models_own_code_runs_only_when_it_is_trusted(
    base: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny_llama(len(tokenizer)).config
    small.num_labels = 1
    made = LlamaForSequenceClassification(small)
    folder = with_its_own_code(
        tmp_path / "reward", made, tokenizer, "AutoModelForSequenceClassification", "RemoteReward"
    )
    for trusted, printed in (([], ""), ([folder], "own code runs\n")):
        reward = {"functions": [folder], "trust_remote_code": trusted}
        config = Config.from_preset(**merged(base, {"reward": reward}))
        assert SAFETrainer(config.model.name, args=config).scorer.names == ["reward"]
        assert capsys.readouterr().out == printed


def test_a_revision_is_the_one_that_is_loaded(
    base: dict[str, Any], run: Run, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two revisions of a model in a hub cache, with other weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    for seed, revision in enumerate(["main", "v2"]):
        commit = str(seed) * 40
        tiny_llama(len(tokenizer), seed).save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    settings = merged(base, {"model": {"name": "some/model"}})
    default, main, other = (
        run(name, merged(settings, {"model": {"revision": name if name != "none" else None}}))
        for name in ("none", "main", "v2")
    )
    assert [seen.error for seen in (default, main, other)] == ["", "", ""]
    assert default.rows == main.rows != other.rows
