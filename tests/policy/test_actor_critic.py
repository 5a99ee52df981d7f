"""One forward gives log-probs, entropy, values and exact KL; the reference; gradient checkpointing; what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from stable_rlhf import SAFETrainer
from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.sections import ModelConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.policy.loading import check_lm_head, load_policy, load_tokenizer, wrap_policy
from stable_rlhf.records import Tokens
from tests.oracles import objective as oracle
from tests.tiny_runs import lora


def some_tokens(vocabulary: int, seed: int = 0) -> Tokens:
    """Three rows with prompts of 1, 3 and 4 tokens and responses of 5, 2 and 4."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, vocabulary, (3, 4), generator=generator)
    response = torch.randint(3, vocabulary, (3, 5), generator=generator)
    prompt_mask = torch.tensor([[False, False, False, True], [False, True, True, True], [True] * 4])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True, True, True, True, False]])
    return Tokens.pack(prompt, prompt_mask, response, mask)


def new_lora(model: LlamaForCausalLM) -> PeftModel:
    """The model with an adapter as PEFT makes it, which adds nothing yet."""
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))


@torch.no_grad()
def learn(model: ActorCritic) -> None:
    """Moves every trained weight of the policy, as training would."""
    for number, parameter in enumerate(model.policy_parameters()):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


def naive_logits(model: LlamaForCausalLM, tokens: Tokens, row: int) -> Tensor:
    """[t, V] logits at s_0 .. s_{t-1} of one row alone, without any padding, by the model's own forward."""
    prompt = tokens.ids[row, : tokens.start[row]]
    response = tokens.response[row][tokens.mask[row]]
    with torch.no_grad():
        return model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]


def test_log_probs_and_entropy_are_those_of_the_unpadded_row_at_the_temperature(llama: LlamaForCausalLM) -> None:
    tokens = some_tokens(llama.config.vocab_size)
    out = ActorCritic(llama, CriticConfig())(tokens, temperature=0.7)
    for row in range(3):
        log_p = (naive_logits(llama, tokens, row) / 0.7).log_softmax(-1)
        response = tokens.response[row][tokens.mask[row]]
        expected = log_p.gather(1, response[:, None])[:, 0]
        keep = tokens.mask[row]
        torch.testing.assert_close(out.logp[row][keep], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.entropy[row][keep], -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)


def test_a_value_has_not_seen_its_own_action(llama: LlamaForCausalLM) -> None:
    model = ActorCritic(llama, CriticConfig(zero_init=False))
    tokens = some_tokens(llama.config.vocab_size)
    changed = copy.deepcopy(tokens)
    changed.ids[0, tokens.start[0] + 2] = (changed.response[0, 2] - 2) % 200 + 3
    before, after = (model(t, temperature=1.0).values[0, 0] for t in (tokens, changed))
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_the_reference_is_the_policy_as_given_and_the_exact_kl_is_over_the_vocabulary(llama: LlamaForCausalLM) -> None:
    original = copy.deepcopy(llama)
    model = ActorCritic(llama, CriticConfig())
    with torch.no_grad():
        for parameter in model.policy_parameters():
            parameter.mul_(1.1)
    tokens = some_tokens(llama.config.vocab_size)
    out, ref_logp = model(tokens, temperature=1.3, exact_kl=True), model.reference_logp(tokens, temperature=1.3)
    again, measured = model.reference_kl(tokens, out.state, temperature=1.3)
    for row in range(3):
        keep = tokens.mask[row]
        log_p = (naive_logits(llama, tokens, row) / 1.3).log_softmax(-1)
        log_q = (naive_logits(original, tokens, row) / 1.3).log_softmax(-1)
        response = tokens.response[row][keep]
        torch.testing.assert_close(ref_logp[row][keep], log_q.gather(1, response[:, None])[:, 0], atol=1e-5, rtol=0)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert kl.max() > 0.01
        torch.testing.assert_close(out.exact_kl[row][keep], kl, atol=1e-5, rtol=0)
        torch.testing.assert_close(measured[row][keep], kl, atol=1e-5, rtol=0)
        torch.testing.assert_close(again[row][keep], ref_logp[row][keep], atol=1e-6, rtol=0)


def test_with_lora_the_reference_is_the_same_weights_with_the_adapter_off(llama: LlamaForCausalLM) -> None:
    base = copy.deepcopy(llama)
    model = ActorCritic(new_lora(llama), CriticConfig())
    tokens = some_tokens(base.config.vocab_size)
    assert model.reference_logp(tokens, temperature=1.0).equal(model(tokens, temperature=1.0).logp)
    learn(model)
    out, ref_logp = model(tokens, temperature=1.0), model.reference_logp(tokens, temperature=1.0)
    expected = ActorCritic(base, CriticConfig())(tokens, temperature=1.0)
    assert torch.equal(ref_logp, expected.logp)
    assert (out.logp - ref_logp).abs().max() > 0.01
    again, kl = model.reference_kl(tokens, out.state, temperature=1.0)
    assert torch.equal(again, ref_logp)
    torch.testing.assert_close(kl, model(tokens, temperature=1.0, exact_kl=True).exact_kl, atol=1e-6, rtol=0)


def test_the_value_loss_reaches_the_transformer_only_when_asked(llama: LlamaForCausalLM) -> None:
    for reaches in (False, True):
        model = ActorCritic(copy.deepcopy(llama), CriticConfig(backbone_gradient=reaches))
        model(some_tokens(llama.config.vocab_size), temperature=1.0).values.sum().backward()
        assert any(p.grad is not None for p in model.policy_parameters()) == reaches
        assert all(p.grad is not None for p in model.critic_parameters())


def test_target_heads_follow_as_a_polyak_average(llama: LlamaForCausalLM) -> None:
    model = ActorCritic(llama, CriticConfig(heads=2, target_tau=0.25))
    before = model.target_heads[1].out.weight.clone()
    with torch.no_grad():
        model.heads[1].out.weight.add_(1.0)
    model.update_targets(torch.tensor(True))
    torch.testing.assert_close(model.target_heads[1].out.weight, before + 0.25, atol=1e-6, rtol=0)
    assert not model.target_heads[1].out.weight.requires_grad


def test_target_heads_start_as_the_heads_and_stay_where_no_step_was_taken(llama: LlamaForCausalLM) -> None:
    model = ActorCritic(llama, CriticConfig(heads=2, target_tau=0.25))
    out = model(some_tokens(llama.config.vocab_size), temperature=1.0)
    assert torch.equal(model.target_values(out.state), out.values)
    with torch.no_grad():
        for parameter in model.critic_parameters():
            parameter.add_(1.0)
    model.update_targets(torch.tensor(False))
    assert torch.equal(model.target_values(out.state), out.values)
    moved = torch.stack([head(out.state) for head in model.heads])
    assert (moved - out.values).abs().min() > 0.1


def test_a_value_is_that_of_a_normalised_state_through_two_layers(llama: LlamaForCausalLM) -> None:
    model = ActorCritic(llama, CriticConfig(heads=2))
    with torch.no_grad():
        for parameter in model.critic_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    out = model(some_tokens(llama.config.vocab_size), temperature=0.5)
    for number, head in enumerate(model.heads):
        norm, up, last = ([p.detach().double() for p in part.parameters()] for part in (head.norm, head.up, head.out))
        x = out.state[1, 0].double()
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm[0] + norm[1]
        x = up[0] @ x + up[1]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        expected = (last[0] @ x + last[1]).item()
        assert out.values[number, 1, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("reaches", [False, True])
def test_the_heads_read_a_bfloat16_policys_state_in_float32(llama: LlamaForCausalLM, reaches: bool) -> None:
    model = ActorCritic(lora(llama.bfloat16()), CriticConfig(heads=2, backbone_gradient=reaches), autocast=True)
    out = model(some_tokens(llama.config.vocab_size), temperature=1.0)
    assert out.state.dtype == out.values.dtype == torch.float32
    wide = copy.deepcopy(model.heads).double()
    expected = torch.stack([head(out.state.double()) for head in wide])
    torch.testing.assert_close(out.values.double(), expected, atol=1e-6, rtol=0)  # bfloat16 would be off by 1e-3


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_two_heads_are_combined_at_the_critics_temperature(llama: LlamaForCausalLM, temperature: float) -> None:
    model = ActorCritic(llama, CriticConfig(heads=2, temperature=temperature))
    pairs = [(0.5, -0.25), (-1.0, 0.0), (2.0, 2.0)]
    combined = model.combine(torch.tensor(pairs, dtype=torch.float64).T[:, None])
    assert combined[0].tolist() == pytest.approx([oracle.soft_min(*pair, temperature) for pair in pairs], abs=1e-12)


@pytest.mark.parametrize("adapted", [False, True])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(llama: LlamaForCausalLM, adapted: bool) -> None:
    model = ActorCritic(lora(llama) if adapted else llama, CriticConfig())
    tokens = some_tokens(llama.config.vocab_size)
    kept, gradients = {}, {}
    for enabled in (False, True):
        held: list[int] = []

        def count(tensor: Tensor, held: list[int] = held) -> Tensor:
            held.append(tensor.numel())
            return tensor

        with model.checkpointing(enabled), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = model(tokens, temperature=1.0).logp[tokens.mask].sum()
            kept[enabled] = sum(held)
            loss.backward()
        gradients[enabled] = [p.grad.clone() for p in model.policy_parameters()]
        model.zero_grad()
    assert kept[True] < 0.6 * kept[False]
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        assert torch.equal(plain, recomputed)


def test_sampling_keeps_its_cache_when_checkpointing_is_on_for_the_update(llama: LlamaForCausalLM) -> None:
    model = ActorCritic(llama, CriticConfig())
    with model.checkpointing(True):
        pass
    assert llama(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values.get_seq_length() == 2


def test_the_trained_state_round_trips_and_another_models_is_refused(llama: LlamaForCausalLM) -> None:
    model = ActorCritic(llama, CriticConfig())
    saved = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    model.load_trained_state(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.trained_state().items())
    with pytest.raises(ValueError, match="another model or adapter"):
        model.load_trained_state({"x": torch.zeros(1)})


def test_the_trained_state_is_the_trained_policy_the_heads_and_their_targets(llama: LlamaForCausalLM) -> None:
    everything = {name for name, _ in ActorCritic(copy.deepcopy(llama), CriticConfig()).named_parameters()}
    full = ActorCritic(copy.deepcopy(llama), CriticConfig()).trained_state()
    assert full.keys() == everything
    adapted = ActorCritic(lora(copy.deepcopy(llama)), CriticConfig(heads=2))
    names = {name for name, _ in adapted.named_parameters() if not name.startswith("policy.") or "lora_" in name}
    assert adapted.trained_state().keys() == names
    assert len([name for name in names if name.startswith("target_heads.")]) == 2 * 6
    assert not any(tensor.requires_grad for tensor in full.values())


def test_the_norm_is_over_every_number_of_the_trained_state(llama: LlamaForCausalLM) -> None:
    model = ActorCritic(lora(llama), CriticConfig())
    numbers = [number for tensor in model.trained_state().values() for number in tensor.flatten().tolist()]
    assert model.norm() == pytest.approx(math.sqrt(math.fsum(number**2 for number in numbers)), rel=1e-5)
    model.target_heads[0].out.bias.data.fill_(torch.inf)
    assert model.norm() == math.inf


def test_a_trained_state_with_a_name_or_a_shape_that_differs_is_refused_before_anything_is_copied(
    llama: LlamaForCausalLM,
) -> None:
    model = ActorCritic(llama, CriticConfig())
    own = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    last = list(own)[-1]
    others = [{**own, "more": torch.zeros(1)}, {name: tensor for name, tensor in own.items() if name != last}]
    for other in others:
        with pytest.raises(ValueError, match="another model or adapter"):
            model.load_trained_state({name: tensor + 1 for name, tensor in other.items()})
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.trained_state().items())
    with pytest.raises(ValueError, match=r"heads.0.up.weight is \(1, 16\) in the checkpoint, \(4, 16\) here"):
        model.load_trained_state({**own, "heads.0.up.weight": torch.zeros(1, 16)})


def test_the_fingerprint_tells_references_apart_and_ignores_the_adapter(llama: LlamaForCausalLM) -> None:
    base = ActorCritic(copy.deepcopy(llama), CriticConfig()).reference_fingerprint()
    new = ActorCritic(new_lora(copy.deepcopy(llama)), CriticConfig())
    before = new.reference_fingerprint()
    learn(new)
    assert new.reference_fingerprint() == before
    one, two = (ActorCritic(lora(copy.deepcopy(llama), s), CriticConfig()).reference_fingerprint() for s in (1, 2))
    assert one != two  # adapters that have learned are part of their references
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert ActorCritic(llama, CriticConfig()).reference_fingerprint() != base


@pytest.mark.parametrize("row", [0, 1, -1])
def test_the_fingerprint_sees_a_change_in_any_part_of_a_small_weight(llama: LlamaForCausalLM, row: int) -> None:
    model = ActorCritic(llama, CriticConfig())
    before = model.reference_fingerprint()
    with model.reference() as reference, torch.no_grad():
        reference.model.layers[1].mlp.up_proj.weight[row, -1] += 1e-3
    assert model.reference_fingerprint() != before


def test_the_fingerprint_ignores_a_module_that_is_trained_whole_with_the_adapter(llama: LlamaForCausalLM) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"], task_type="CAUSAL_LM")
    model = ActorCritic(get_peft_model(llama, settings), CriticConfig())
    before = model.reference_fingerprint()
    trained = [p for name, p in model.named_parameters() if ".modules_to_save." in name and p.requires_grad]
    assert len(trained) == 2
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1.0)
    assert model.reference_fingerprint() == before


def test_a_head_that_the_chunked_lm_head_does_not_compute_is_refused() -> None:
    good = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    check_lm_head(good)
    plain = good.lm_head.forward
    good.lm_head.forward = lambda hidden: 0.5 * plain(hidden)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel: its logits differ"):
        check_lm_head(good)


def test_a_policy_loads_from_a_folder_with_or_without_an_adapter(tiny_folder: Path) -> None:
    full, low = load_policy(ModelConfig(name=str(tiny_folder), device="cpu"))
    assert isinstance(full, LlamaForCausalLM)
    assert not low
    adapted, _ = load_policy(ModelConfig(name=str(tiny_folder), lora_r=4, lora_target_modules=["q_proj"], device="cpu"))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("q_proj.lora_" in name for name in trained)
    assert adapted.peft_config["default"].lora_alpha == 8
    bf16, low = load_policy(ModelConfig(name=str(tiny_folder), lora_r=4, dtype="bfloat16", device="cpu"))
    assert low
    dtypes = {name.split(".")[-2]: p.dtype for name, p in bf16.named_parameters() if "q_proj" in name}
    assert dtypes == {"base_layer": torch.bfloat16, "default": torch.float32}


def test_pad_becomes_eos_where_the_tokenizer_has_none(
    tiny_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert loaded.padding_side == "left"


def test_a_peft_model_is_taken_as_it_is(llama: LlamaForCausalLM) -> None:
    adapted = lora(llama)
    assert wrap_policy(adapted, ModelConfig(lora_r=8)) is adapted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj"], "bias": "all"}, "trains biases"),
        ({"target_modules": ["lm_head"]}, "the adapter is on the LM head"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_that_the_forward_or_the_reference_would_pass_over_is_refused(
    llama: LlamaForCausalLM, settings: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap_policy(llama, ModelConfig(), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))


def test_a_frozen_adapter_is_refused(llama: LlamaForCausalLM) -> None:
    adapted = lora(llama).requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight of the policy is trainable"):
        wrap_policy(adapted, ModelConfig())


def test_another_kind_of_adapter_is_refused_by_name(llama: LlamaForCausalLM) -> None:
    prompt_tuning = get_peft_model(llama, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="PROMPT_TUNING: the forward applies only LoRA; give a LoRA adapter"):
        wrap_policy(prompt_tuning, ModelConfig())


def test_many_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: this release trains in one process"):
        SAFETrainer("builtin")
