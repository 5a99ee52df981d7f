"""The weights that are sampled from: the policy's as they are now, merged and narrowed as its forward has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from stable_rlhf.policy.transformer import causal_lm
from stable_rlhf.rollout.decoder import Decoder
from stable_rlhf.rollout.merged_weights import Part
from tests.tiny_decoders import LENGTHS, Made, assert_same, make_model, make_prompts, move, naive, sample

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft sets it itself


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 8},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 8},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 32.0}},
    "some layers": {"target_modules": ["q_proj", "up_proj", "c_attn"]},
    "embedding": {"target_modules": ["embed_tokens", "wte"]},
    "bias": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # peft, of patterns that fit one family
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])  # GPT-2's layers are Conv1D, with W transposed
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_a_rollout_is_of_the_weights_as_they_are_now(family: str, adapter: str | None, made: Made) -> None:
    model = make_model(family, None if adapter is None else ADAPTERS[adapter])
    decoder, (prompt, mask) = made(model), make_prompts(*LENGTHS)
    before = sample(decoder, prompt, mask)
    assert_same(before, naive(model, prompt, mask))
    move(model)
    after = sample(decoder, prompt, mask)
    assert_same(after, naive(model, prompt, mask))
    assert after.tolist() != before.tolist()


def test_an_optimiser_step_is_seen(made: Made) -> None:
    model = make_model("qwen2", {})
    decoder, (prompt, mask) = made(model), make_prompts(*LENGTHS)
    before = sample(decoder, prompt, mask)
    optimizer = torch.optim.AdamW(model.policy_parameters(), lr=0.2)
    causal_lm(model.policy)(input_ids=prompt).logits.square().mean().backward()
    optimizer.step()
    after = sample(decoder, prompt, mask)
    assert_same(after, naive(model, prompt, mask))
    assert after.tolist() != before.tolist()


def test_two_active_adapters_add_up(made: Made) -> None:
    model = make_model("qwen2", {})
    second = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model.policy.add_adapter("second", second)
    model.policy.base_model.set_adapter(["default", "second"])
    prompt, mask = make_prompts(*LENGTHS)
    assert_same(sample(made(model), prompt, mask), naive(model, prompt, mask))


def test_an_adapter_that_is_not_active_adds_nothing(made: Made) -> None:
    model = make_model("qwen2", {})
    second = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model.policy.add_adapter("second", second)
    assert model.policy.active_adapters == ["default"]
    prompt, mask = make_prompts(*LENGTHS)
    assert_same(sample(made(model), prompt, mask), naive(model, prompt, mask))


def own_weights(decoder: Decoder) -> dict[str, Tensor]:
    """What is sampled from, by the policy's names: parameters, and the parts of joined layers."""
    found: dict[str, Tensor] = dict(decoder.lm.named_parameters())
    for name, part in decoder.lm.named_modules():
        if isinstance(part, Part):
            for kind, whole in (("weight", part.joined.weight), ("bias", part.joined.bias)):
                if whole is not None:
                    found[f"{name}.{kind}"] = whole.split(part.joined.sizes)[part.index]
    return found


@pytest.mark.parametrize("adapter", ["lora", "rslora", "patterns", "some layers"])
def test_a_merged_weight_is_w_plus_scale_times_b_a(adapter: str) -> None:
    model = make_model("qwen2", ADAPTERS[adapter])
    decoder = Decoder(model)
    move(model)
    decoder.refresh()
    decoder.refresh()  # made anew, not added to
    merged = 0
    for name, layer in causal_lm(model.policy).named_modules():
        if isinstance(layer, LoraLayer):
            r, alpha = layer.r["default"], layer.lora_alpha["default"]
            scale = alpha / r**0.5 if adapter == "rslora" else alpha / r
            product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            expected = layer.get_base_layer().weight.double() + scale * product
            found = own_weights(decoder)[f"{name}.weight"]
            assert (found - layer.get_base_layer().weight).abs().max() > 0.01
            torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
            merged += 1
    assert merged == (4 if adapter == "some layers" else 14)


@pytest.mark.parametrize("lora", [None, {}, {"use_dora": True}], ids=["full", "lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_what_is_not_merged_is_the_policys_own_memory(family: str, lora: dict | None) -> None:
    model = make_model(family, lora)
    policys = {parameter.data_ptr() for parameter in model.policy.parameters()}
    decoder = Decoder(model)
    copied = {name for name, weight in own_weights(decoder).items() if weight.data_ptr() not in policys}
    adapted = {name for name, layer in causal_lm(model.policy).named_modules() if isinstance(layer, LoraLayer)}
    biases = {f"{name}.bias" for name in adapted if name.endswith(("q_proj", "k_proj", "v_proj"))}  # small: joined
    merged = {f"{name}.weight" for name in adapted} | biases
    assert copied == (merged if (family, lora) == ("qwen2", {}) else set())


def test_under_autocast_what_is_bfloat16_already_is_the_policys_own_memory_and_is_left_as_it_is() -> None:
    """Where all of it is bfloat16 there is nothing for autocast to do, which would cost a look at every operation."""
    model = make_model("qwen2", {"target_modules": ["q_proj"]})
    for name, parameter in model.policy.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    model.autocast = True
    policys = {parameter.data_ptr() for parameter in model.policy.parameters()}
    decoder = Decoder(model)
    found = own_weights(decoder)
    copied = {name for name, weight in found.items() if weight.data_ptr() not in policys}
    assert copied == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    narrowing: list[bool] = []
    decoder.lm.get_decoder().register_forward_pre_hook(lambda *_: narrowing.append(torch.is_autocast_enabled("cpu")))
    sample(decoder, *make_prompts(3, 5))
    assert set(narrowing) == {False}


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_policy_is_left_as_it_was(lora: dict | None, autocast: bool, made: Made) -> None:
    model = make_model("qwen2", lora)
    model.autocast = autocast
    lm = causal_lm(model.policy)

    def state() -> dict[str, Any]:
        weights = {
            name: (weight.data_ptr(), weight.dtype, weight.requires_grad, weight.grad, weight.detach().clone().tolist())
            for name, weight in model.named_parameters()
        }
        kinds = [(name, type(module).__name__, module.training) for name, module in model.named_modules()]
        return {"weights": weights, "kinds": kinds, "attention": lm.config._attn_implementation}

    before = state()
    sample(made(model), *make_prompts(3, 5))
    assert state() == before


@pytest.mark.parametrize("lora", [None, {}, {"use_dora": True}], ids=["full", "lora", "dora"])
def test_under_autocast_what_it_narrows_is_sampled_from_in_bfloat16_and_nothing_else(
    lora: dict | None, made: Made
) -> None:
    model = make_model("qwen2", lora)
    model.autocast = True
    decoder, (prompt, mask) = made(model), make_prompts(*LENGTHS)
    sample(decoder, prompt, mask)
    move(model)
    sample(decoder, prompt, mask)
    found = own_weights(decoder)
    linear = ("_proj", "lora_A.default", "lora_B.default")
    for name, weight in found.items():
        narrowed = name.removesuffix(".weight").removesuffix(".bias").removesuffix(".base_layer").endswith(linear)
        assert weight.dtype == (torch.bfloat16 if narrowed else torch.float32), name
    merged_policy = copy.deepcopy(model.policy).double()
    base = merged_policy.merge_and_unload() if lora == {} else causal_lm(merged_policy)
    for name, weight in base.state_dict().items():
        # W, A and B rounded to 8 bits each, their sum once more: half a step of the largest number in it.
        torch.testing.assert_close(found[name].double(), weight, rtol=2**-7, atol=2**-8 * weight.abs().max().item())
    if lora is None:
        assert all(torch.equal(found[n], w.to(found[n].dtype)) for n, w in causal_lm(model.policy).named_parameters())


def test_under_autocast_the_head_is_the_policys_own_and_stays_tied() -> None:
    model = make_model("qwen2", tie_word_embeddings=True)
    model.autocast = True
    lm = Decoder(model).lm
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert lm.get_output_embeddings().weight is causal_lm(model.policy).get_output_embeddings().weight
