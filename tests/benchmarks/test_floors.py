"""benchmarks/floors.py and shapes.py: bytes and operations are those of real models, shapes are the published ones."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import floors
import shapes

CPU = torch.device("cpu")
TINY = shapes.shape_config("tiny")
WORK = floors.Work(batch=4, prompt=6, response=8, iterations=2, rank=4)

# -- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),
    [("135m", 134_515_008), ("0.5b", 494_032_768), ("3b", 3_085_938_688), ("7b", 7_615_616_512)],
)
def test_a_shape_has_the_published_number_of_weights_and_all_but_a_lookup_table_are_read(
    name: str, published: int
) -> None:
    config = shapes.shape_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    assert sum(sizes.values()) == 2 * published
    table = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    assert 2 * floors.read_weights(floors.Geometry.of(config)) == sum(sizes.values()) - table
    adapted = get_peft_model(model, LoraConfig(r=128, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert floors.lora_weights(floors.Geometry.of(config), 128) == trained


def test_weights_are_normal_and_given_by_the_seed() -> None:
    model, again = shapes.build_policy(TINY, CPU, seed=3), shapes.build_policy(TINY, CPU, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, shapes.build_policy(TINY, CPU, seed=4).lm_head.weight)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    assert torch.isfinite(model(torch.arange(24)[None]).logits).all()


def test_a_word_is_a_token_and_encoding_undoes_decoding() -> None:
    tokenizer = shapes.build_tokenizer(512)
    prompts = shapes.random_prompts(512, count=5, length=17, seed=1)
    ids = tokenizer(prompts)["input_ids"]
    assert len(tokenizer) == 512
    assert {len(row) for row in ids} == {17}
    assert tokenizer.batch_decode(ids) == prompts
    assert ids == [[int(word[1:]) for word in prompt.split()] for prompt in prompts]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (TINY.pad_token_id, TINY.eos_token_id) == (0, 1)
    assert prompts != shapes.random_prompts(512, count=5, length=17, seed=2)


def test_the_reward_is_the_share_of_even_words() -> None:
    assert shapes.even_words(["", ""], ["w2 w13 w4 w40", ""]) == [0.75, 0.0]


def test_an_unknown_shape_or_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model '1b': choose one of tiny, 135m, 0\.5b, 3b, 7b"):
        shapes.shape_config("1b")
    with pytest.raises(ValueError, match="model type 'gpt2': only llama and qwen2 are counted here"):
        floors.Geometry.of(argparse.Namespace(model_type="gpt2"))  # type: ignore[arg-type]


# -- floors -------------------------------------------------------------------------------------------------------


def counted_by(counter: FlopCounterMode) -> int:
    """All that PyTorch counted but positions x frequencies, a matrix product in some releases of Transformers."""
    rotary = {name: sum(found.values()) for name, found in counter.get_flop_counts().items() if "rotary" in name}
    return counter.get_total_flops() - sum(rotary.values())


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_operations_are_those_that_pytorch_counts(name: str) -> None:
    config = TINY
    if name == "llama":
        sizes = {key: getattr(TINY, key) for key in shapes.SHAPES["tiny"][1]}
        config = shapes.shape_config("135m", **sizes)
    shape = floors.Geometry.of(config)
    base = shapes.build_policy(config, CPU, attn_implementation="eager")  # which multiplies the whole square
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids, response = torch.arange(3 * 10).view(3, 10), 4
    tokens, square = 30, 3 * 10 * 10

    def run() -> torch.Tensor:
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return (hidden[:, -response:] @ base.lm_head.weight.T).sum()

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        run()
    assert floors.forward_flops(shape, tokens, square, 3 * response, rank=4) == counted_by(forward)
    with FlopCounterMode(display=False) as plain, torch.no_grad(), model.disable_adapter():
        run()
    assert floors.forward_flops(shape, tokens, square, 3 * response) == counted_by(plain)
    with FlopCounterMode(display=False) as training:
        run().backward()
    assert floors.training_flops(shape, tokens, square, 3 * response, rank=4) == counted_by(training)


def test_sampling_is_counted_token_by_token() -> None:
    """Oracle: the cache and the weights of a real model, step by step. WORK's attention is the triangle, not a square,
    so a step's pairs are the cache's length."""
    shape, model = floors.Geometry.of(TINY), shapes.build_policy(TINY, CPU, attn_implementation="eager")
    weights = sum(weight.numel() * 4 for weight in model.parameters())
    ids = torch.arange(4 * 6).view(4, 6)
    with torch.no_grad():
        with FlopCounterMode(display=False) as prefill:
            out = model(ids, use_cache=True, logits_to_keep=1)
        moved, flops = 0, 0
        for _ in range(WORK.response - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            with FlopCounterMode(display=False) as decode:
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            layers = out.past_key_values.layers
            moved += weights + sum(layer.keys.numel() * 4 + layer.values.numel() * 4 for layer in layers)
            flops += counted_by(decode)
    assert floors.decode_bytes(shape, WORK, 4) == moved
    assert floors.decode_flops(shape, WORK) == flops
    above = floors.attention_flops(shape, 4 * (6 * 6 - floors.causal_pairs(6)))  # the triangle that eager computes too
    assert floors.prefill_flops(shape, WORK) == counted_by(prefill) - above


def test_a_floor_is_the_slower_of_bytes_and_operations() -> None:
    ceilings = floors.Ceilings(bandwidth=10.0, arithmetic=100.0)
    assert floors.slower(200, 50, ceilings) == floors.Floor(seconds=5.0, flops=200, bytes=50, bound="bytes")
    assert floors.slower(900, 50, ceilings) == floors.Floor(seconds=9.0, flops=900, bytes=50, bound="operations")


def test_the_3b_step_at_the_speed_of_one_h100_has_the_floors_of_a_calculation_by_hand() -> None:
    """L (2 h q + 2 h k + 3 h i) = 36 (2 x 2048^2 + 2 x 2048 x 256 + 3 x 2048 x 11008) = 2,774,532,096 weights, and
    151,936 x 2,048 = 311,164,928 of the head: 6.17 GB with biases and norms, read 127 times at 3 TB/s = 0.261 s."""
    shape, ceilings = floors.Geometry.of(shapes.shape_config("3b")), floors.Ceilings(bandwidth=3e12, arithmetic=7e14)
    assert floors.linear_weights(shape) == 2_774_532_096
    assert floors.head_weights(shape) == 311_164_928
    work = floors.Work(batch=16, prompt=96, response=128, iterations=2, rank=128)
    made = floors.floors(shape, work, ceilings, 2)
    cache = 2 * 2 * 36 * 256 * 16 * sum(range(97, 224)) / 3e12  # bytes of keys and values of each step
    prefill = (2 * 1536 * 2_774_532_096 + 2 * 16 * 311_164_928 + 4 * 36 * 2048 * 16 * 96 * 97 / 2) / 7e14
    assert made["rollout"].seconds == pytest.approx(127 * 2 * 3_085_938_688 / 3e12 + cache + prefill, rel=1e-12)
    assert (made["rollout"].bound, made["update"].bound) == ("bytes", "operations")
    twice = floors.floors(shape, dataclasses.replace(work, iterations=4), ceilings, 2)
    assert twice["update"].seconds == pytest.approx(2 * made["update"].seconds, rel=1e-12)
    assert twice["rollout"] == made["rollout"]


def test_ceilings_count_bytes_both_ways_and_two_operations_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(floors, "best_seconds", lambda call, device, repeats: calls.append(call()) or 0.5)
    assert floors.measure_ceilings(CPU) == floors.Ceilings(bandwidth=2 * 2**26 / 0.5, arithmetic=2 * 2**30 / 0.5)
    assert [tuple(made.shape) for made in calls] == [(1024, 1024), (2**26,)]


def test_the_best_of_the_repeats_leaves_out_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 40.0, 50.0, 60.0])  # a warm-up of 5 s, then 30 s and 10 s
    monkeypatch.setattr(floors.time, "perf_counter", lambda: next(clock))
    assert floors.best_seconds(lambda: None, CPU, repeats=2, inner=10) == 1.0
