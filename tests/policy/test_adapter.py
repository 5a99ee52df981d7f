"""An adapter that has learned is the policy: where it comes from, and what its reference is."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from stable_rlhf import Config, SAFETrainer
from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.sections import ModelConfig
from stable_rlhf.doctor.memory import estimate, skeleton
from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.loading import check_model, load_policy, load_tokenizer, wrap_policy
from tests import tiny_runs
from tests.policy.test_actor_critic import learn, some_tokens
from tests.tiny_runs import lora


@torch.no_grad()
def logp_of(policy: torch.nn.Module, ids: Tensor) -> Tensor:
    return policy(input_ids=ids).logits.log_softmax(-1)


@pytest.fixture
def learned(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder with an adapter of the tiny policy that has learned, and nothing else."""
    base = LlamaForCausalLM.from_pretrained(tiny_folder)
    adapted = lora(base, seed=3)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_reference_of_an_adapter_that_has_learned_is_a_frozen_copy_that_shares_the_base(
    llama: LlamaForCausalLM,
) -> None:
    adapted = lora(llama, seed=3)
    ids = torch.arange(3, 12)[None]
    before = logp_of(adapted.eval(), ids)
    model = ActorCritic(adapted, CriticConfig())
    tokens = some_tokens(llama.config.vocab_size)
    assert model.reference_logp(tokens, temperature=1.0).equal(model(tokens, temperature=1.0).logp)
    learn(model)
    with model.reference() as reference:
        assert logp_of(reference, ids).equal(before)
        own = {id(p) for p in reference.parameters()}
    shared = {id(p) for p in adapted.parameters()} & own
    assert len(shared) == sum(not p.requires_grad for p in adapted.parameters())
    assert not logp_of(adapted, ids).equal(before)


def test_an_adapter_folder_is_trained_further_from_what_it_has_learned(learned: Path, tiny_folder: Path) -> None:
    config = ModelConfig(name=str(learned), device="cpu")
    check_model(config)
    policy, _ = load_policy(config)
    ids = torch.arange(3, 12)[None]
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_folder), str(learned)).eval()
    assert logp_of(policy, ids).equal(logp_of(expected, ids))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    own = load_tokenizer(ModelConfig(name=str(tiny_folder)))
    assert load_tokenizer(config)("the cat").input_ids == own("the cat").input_ids


def test_a_run_of_an_adapter_begins_with_a_kl_of_0_and_is_resumed_by_name(learned: Path, tmp_path: Path) -> None:
    config = tiny_runs.settings(tmp_path / "run", max_steps=1, save_steps=1, model={"name": str(learned)})
    data = datasets.Dataset.from_dict({"prompt": ["the cat", "a dog", "hello", "my name"] * 3})

    def run(config: Config) -> SAFETrainer:
        return SAFETrainer(str(learned), tiny_runs.letters, config, data)

    run(config).train()
    assert tiny_runs.rows(tmp_path / "run")[0]["objective/kl"] == 0.0
    longer = run(dataclasses.replace(config, max_steps=2))
    longer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in tiny_runs.rows(tmp_path / "run")] == [0, 1]
    assert tiny_runs.rows(tmp_path / "run")[1]["objective/kl"] != 0.0
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda folder: None, {"lora_r": 4}, "model.lora_r=4: .* is an adapter already and is trained further; leave"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), {}, "is not in safetensors"),
        (
            lambda folder: shutil.copy(folder / "README.md", folder / "adapter_config.json"),
            {},
            "adapter_config.json is not JSON",
        ),
    ],
)
def test_an_adapter_folder_that_cannot_be_trained_further_is_one_sentence(
    learned: Path, change, settings: dict, message: str
) -> None:
    change(learned)
    with pytest.raises(ConfigError, match=message):
        load_policy(ModelConfig(name=str(learned), device="cpu", **settings))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_models_own_weights_is_refused(llama: LlamaForCausalLM, kind: str) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=kind)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=f"init_lora_weights='{kind}': changes the model's own weights"):
        wrap_policy(llama, ModelConfig(), settings)


@pytest.mark.parametrize("kind", [True, "gaussian", False])
def test_with_any_other_initialisation_the_reference_is_the_policy_before_training(
    llama: LlamaForCausalLM, kind: bool | str
) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=kind)  # pyright: ignore[reportArgumentType]
    model = ActorCritic(wrap_policy(copy.deepcopy(llama), ModelConfig(), settings), CriticConfig())
    tokens = some_tokens(llama.config.vocab_size)
    assert model.reference_logp(tokens, temperature=1.0).equal(model(tokens, temperature=1.0).logp)


def test_a_second_adapter_on_one_that_transformers_loaded_is_refused(llama: LlamaForCausalLM) -> None:
    llama.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="Transformers has loaded an adapter into it, which would stay frozen"):
        wrap_policy(llama, ModelConfig(lora_r=4))


def test_dora_keeps_its_reference(llama: LlamaForCausalLM) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    before = logp_of(llama.eval(), torch.arange(3, 12)[None])
    model = ActorCritic(get_peft_model(llama, settings), CriticConfig())
    learn(model)
    with model.reference() as reference:
        assert logp_of(reference, torch.arange(3, 12)[None]).equal(before)


def test_doctor_counts_an_adapter_folder_as_the_run_holds_it(learned: Path) -> None:
    config = Config.from_preset("safe", model={"name": str(learned), "device": "cpu"})
    policy, _ = load_policy(config.model)
    trained = 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    estimated = estimate(skeleton(config), config, device=torch.device("cpu"), low=False, prompt=8)
    assert estimated.held["policy"] == sum(4 * p.numel() for p in policy.parameters())
    assert estimated.held["reference"] == trained
