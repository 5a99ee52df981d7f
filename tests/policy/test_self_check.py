"""What the check at loading finds in models that would be trained or sampled wrongly, and what it does about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from stable_rlhf import SAFETrainer
from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.sections import ModelConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.hardware import UNMASKED
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.loading import wrap_policy
from stable_rlhf.policy.self_check import apart, check_checkpointing, probe
from stable_rlhf.policy.transformer import context_length
from tests import tiny_runs
from tests.policy.test_actor_critic import some_tokens
from tests.policy.test_architectures import make


def own_logp(lm: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def test_the_tried_rows_have_different_lengths_and_8_columns_whatever_the_vocabulary() -> None:
    for vocabulary in (5, 97, 50_000):
        prompt, mask, tokens = probe(vocabulary, torch.device("cpu"))
        assert mask.sum(1).tolist() == tokens.start.tolist() == [1, 4, 2]
        assert tokens.mask.sum(1).tolist() == [3, 2, 4]
        assert tokens.ids.shape == (3, 8)
        assert 0 <= min(int(prompt.min()), int(tokens.ids.min())) <= int(tokens.ids.max()) < vocabulary


def test_two_log_probs_are_as_far_apart_as_their_largest_difference_under_the_mask() -> None:
    one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.5, 2.25, 99.0]])
    mask = torch.tensor([[True, True, False]])
    assert apart(one, other, mask) == 0.5
    assert apart(one, torch.tensor([[1.0, float("nan"), 3.0]]), mask) == float("inf")


def test_a_model_that_needs_its_mask_is_trained_with_its_own_attention() -> None:
    """Doge adds to the mask that it is given; without one it is not causal."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.3}
    model = ActorCritic(make("doge", hidden_size=32, **heads), CriticConfig())
    assert model.attention == "sdpa"
    assert ActorCritic(make("llama"), CriticConfig()).attention == UNMASKED
    ids = torch.arange(10, 22)[None]
    tokens = some_tokens(97)
    out = model(tokens, temperature=1.0).logp
    row = torch.cat([tokens.ids[1, : tokens.start[1]], tokens.response[1][tokens.mask[1]]])[None]
    expected = own_logp(model.policy, row)[0, tokens.start[1] - 1 : -1]
    expected = expected.gather(1, tokens.response[1][tokens.mask[1]][:, None])[:, 0]
    torch.testing.assert_close(out[1][tokens.mask[1]].detach(), expected, atol=1e-5, rtol=0)
    assert own_logp(model.policy, ids).isfinite().all()


class Bidirectional(LlamaForCausalLM):
    """Attends to every token, later ones too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_hook(self._mix)

    @staticmethod
    def _mix(module: Any, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output


class SideBySide(Bidirectional):
    """Every row depends on the rows beside it."""

    @staticmethod
    def _mix(module: Any, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state[:, :1].mean(0, keepdim=True)
        return output


class Raises(Bidirectional):
    @staticmethod
    def _mix(module: Any, inputs: Any, output: Any) -> Any:
        raise KeyError("no such expert")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Bidirectional, r"a changed last token changes the log-probs before it by .* it is not causal; choose"),
        (SideBySide, r"rows side by side have log-probs .* nats off those of each row alone; choose"),
        (Raises, r"Raises: a forward of a few tokens fails with KeyError: 'no such expert'; choose another model"),
    ],
)
def test_a_model_that_would_be_trained_wrongly_is_refused_unless_the_check_is_off(kind: type, message: str) -> None:
    model = kind(make("llama").config)
    with pytest.raises(ConfigError, match=message):
        ActorCritic(model, CriticConfig())
    ActorCritic(model, CriticConfig(), self_check=False)


@pytest.mark.parametrize("family", ["opt", "gpt2", "xglm", "biogpt"])
def test_dropout_stays_off_in_recomputed_layers_and_after_a_callback_calls_train(family: str) -> None:
    named = {"num_layers": 2, "attention_heads": 2, "d_model": 16, "ffn_dim": 32} if family == "xglm" else {}
    sizes = {"gpt2": {}, "opt": {}, "biogpt": {}}.get(family, named)
    model = ActorCritic(make(family, **sizes), CriticConfig())
    tokens = some_tokens(97)
    with torch.no_grad():
        expected = model(tokens, temperature=1.0).logp
    check_checkpointing(model)
    with model.checkpointing(True):
        assert model(tokens, temperature=1.0).logp.equal(expected)
    model.train()
    assert model(tokens, temperature=1.0).logp.equal(expected)
    # The settings that are saved with the model keep their dropout.
    dropouts = [value for name, value in model.policy.config.to_dict().items() if "drop" in name and value]
    assert dropouts


def test_checkpointing_that_changes_the_forward_is_refused() -> None:
    lm = make("llama")
    layer = lm.model.layers[0]

    def noisy(module: Any, inputs: Any, output: Any) -> Any:
        return output + 0.1 if module.training else output

    layer.mlp.register_forward_hook(lambda module, inputs, output: noisy(layer, inputs, output))
    model = ActorCritic(lm, CriticConfig())
    with pytest.raises(ConfigError, match=r"model.gradient_checkpointing=true: changes log-probs .* set model"):
        check_checkpointing(model)


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("mpt", {"max_seq_len": 48, "d_model": 16, "n_heads": 2, "n_layers": 2}, 48),
        ("phi3", {"max_position_embeddings": 64, "original_max_position_embeddings": 24, "sliding_window": None,
                  "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                                      "long_factor": [2.0] * 4, "original_max_position_embeddings": 24}}, 24),
    ],
)  # fmt: skip
def test_the_context_is_as_long_as_rows_may_be_side_by_side(family: str, changes: dict, length: int) -> None:
    model = wrap_policy(make(family, **changes), ModelConfig())
    assert context_length(model) == length
    tokens = some_tokens(97).padded(length + 1)
    with pytest.raises(ConfigError, match=f"tokens in a row, but the model reads {length}; lower data.max_prompt"):
        ActorCritic(model, CriticConfig())(tokens, temperature=1.0)


def test_the_context_of_a_model_with_nested_settings_is_that_of_its_text() -> None:
    text = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 40, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert context_length(AutoModelForCausalLM.from_config(config)) == 40


def test_a_run_tries_its_model_unless_the_check_is_off(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def run(name: str, **model: bool) -> SAFETrainer:
        lm = SideBySide(tiny_runs.policy(tokenizer).config)
        return tiny_runs.trainer(tiny_runs.settings(tmp_path / name, model=model), tokenizer, model=lm)

    with pytest.raises(ConfigError, match="rows side by side"):
        run("on")
    run("off", self_check=False)
