from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stable_rlhf.ops.logprobs import token_statistics
from tests.oracles import logprobs as oracle


class Case:
    """Random policy, reference and tokens, and one random weight per statistic and token, to pull gradients with."""

    def __init__(self, seed: int = 0, batch=2, length=5, width=4, vocabulary=7, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = normal(batch, length, width).requires_grad_()
        self.weight = normal(vocabulary, width).requires_grad_()
        self.ref_hidden = normal(batch, length, width + 1)  # a reference may be of another width
        self.ref_weight = normal(vocabulary, width + 1)
        self.tokens = torch.randint(vocabulary, (batch, length), generator=generator)
        self.pull = normal(3, batch, length)

    def run(self, **settings: Any):
        return token_statistics(
            self.hidden,
            self.weight,
            self.tokens,
            ref_hidden=self.ref_hidden,
            ref_lm_head_weight=self.ref_weight,
            **settings,
        )

    def gradients(self, statistics) -> tuple[Tensor, ...]:
        total = torch.stack([(pull * x).sum() for pull, x in zip(self.pull, statistics, strict=True)]).sum()
        return torch.autograd.grad(total, (self.hidden, self.weight))


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.5, 1.0, 1.7]), chunk=st.integers(1, 12))
def test_statistics_and_gradients_are_those_of_the_whole_logits_for_every_chunk_size(seed, temperature, chunk):
    case = Case(seed)
    result = case.run(temperature=temperature, chunk=chunk)
    expected = oracle.token_statistics(
        case.hidden, case.weight, case.tokens, temperature, case.ref_hidden, case.ref_weight
    )
    torch.testing.assert_close(tuple(result), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(case.gradients(result), case.gradients(expected), rtol=1e-10, atol=1e-11)


def test_gradients_agree_with_finite_differences():
    case = Case(batch=1, length=3, width=3, vocabulary=4)

    def statistics(hidden, weight):
        return token_statistics(hidden, weight, case.tokens, 0.8, case.ref_hidden, case.ref_weight, chunk=2)

    assert torch.autograd.gradcheck(statistics, (case.hidden, case.weight))


@pytest.mark.parametrize("asked", ["logp", "entropy", "kl"])
def test_the_gradient_of_one_statistic_alone_is_its_own(asked):
    case = Case(11)
    names = ("logp", "entropy", "kl")
    expected = dict(
        zip(
            names,
            oracle.token_statistics(case.hidden, case.weight, case.tokens, 1.0, case.ref_hidden, case.ref_weight),
            strict=True,
        )
    )
    result = torch.autograd.grad(getattr(case.run(chunk=3), asked).sum(), (case.hidden, case.weight))
    reference = torch.autograd.grad(expected[asked].sum(), (case.hidden, case.weight))
    torch.testing.assert_close(result, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_gets_its_own(trained):
    case = Case(12)
    both = dict(zip(("hidden", "weight"), case.gradients(case.run()), strict=True))
    frozen = case.weight if trained == "hidden" else case.hidden
    frozen.requires_grad_(False)
    live = getattr(case, trained)
    total = torch.stack([(pull * x).sum() for pull, x in zip(case.pull, case.run(), strict=True)]).sum()
    total.backward()
    assert frozen.grad is None
    torch.testing.assert_close(live.grad, both[trained], rtol=1e-13, atol=0)


def test_no_gradient_reaches_the_reference():
    case = Case(13)
    case.ref_hidden.requires_grad_()
    case.ref_weight.requires_grad_()
    kl = case.run().kl
    assert kl is not None
    kl.sum().backward()
    assert case.hidden.grad is not None
    assert case.hidden.grad.abs().sum() > 0
    assert case.ref_hidden.grad is None
    assert case.ref_weight.grad is None


def test_the_kl_to_itself_is_exactly_zero_and_without_a_reference_there_is_none():
    case = Case(14)
    same = token_statistics(case.hidden, case.weight, case.tokens, 1.0, case.hidden, case.weight)
    alone = token_statistics(case.hidden, case.weight, case.tokens)
    assert same.kl is not None
    assert same.kl.abs().max().item() == 0.0
    assert alone.kl is None
    assert torch.equal(alone.logp, same.logp)
    assert torch.equal(alone.entropy, same.entropy)
    gradient = torch.autograd.grad((alone.logp * alone.entropy).sum(), case.hidden)
    logp, entropy, _ = oracle.token_statistics(case.hidden, case.weight, case.tokens)
    torch.testing.assert_close(gradient, torch.autograd.grad((logp * entropy).sum(), case.hidden), rtol=1e-11, atol=0)


def test_uniform_logits_give_the_logarithm_of_the_vocabulary():
    result = token_statistics(torch.ones(1, 2, 3), torch.ones(8, 3), torch.tensor([[0, 7]]))
    torch.testing.assert_close(result.logp, torch.full((1, 2), -2.0794415416798357))  # -log 8
    torch.testing.assert_close(result.entropy, torch.full((1, 2), 2.0794415416798357))


def test_selected_rows_give_the_figures_they_have_inside_the_batch():
    case = Case(15)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = case.run()
    selected = token_statistics(
        case.hidden[mask], case.weight, case.tokens[mask], 1.0, case.ref_hidden[mask], case.ref_weight
    )
    for inside, alone in zip(whole, selected, strict=True):
        torch.testing.assert_close(inside[mask], alone, rtol=1e-13, atol=1e-13)


def test_no_rows_give_no_figures_and_a_zero_gradient():
    case = Case(16)
    empty = torch.zeros(2, 5, dtype=torch.bool)
    result = token_statistics(case.hidden[empty], case.weight, case.tokens[empty])
    gradient = torch.autograd.grad(result.logp.sum(), case.weight)[0]
    assert result.logp.shape == (0,)
    assert gradient.abs().max().item() == 0.0


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_get_float32_logits_also_under_autocast(autocast):
    case = Case(17, width=64, vocabulary=200, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (case.hidden, case.weight)]
    expected = oracle.token_statistics(
        wide[0], wide[1], case.tokens, 1.0, case.ref_hidden.double(), case.ref_weight.double()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = case.run(chunk=4)
        hidden_gradient, weight_gradient = case.gradients(result)
    for found, true in zip(result, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=3e-5)
    total = torch.stack([(pull.double() * x).sum() for pull, x in zip(case.pull, expected, strict=True)]).sum()
    true_gradients = torch.autograd.grad(total, wide)
    for found, true in zip((hidden_gradient, weight_gradient), true_gradients, strict=True):
        assert found.dtype == torch.bfloat16  # rounded once, at the end: half of 2^-8 relative
        torch.testing.assert_close(found.double(), true, rtol=2**-8, atol=1e-4)


class LargestOutput(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, forward or backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_is_as_large_as_the_logits_forward_or_backward():
    case = Case(18, batch=4, length=40, width=8, vocabulary=500)
    with LargestOutput() as chunked:
        case.gradients(case.run(chunk=16))
    with LargestOutput() as whole:
        case.gradients(
            oracle.token_statistics(case.hidden, case.weight, case.tokens, 1.0, case.ref_hidden, case.ref_weight)
        )
    assert whole.largest == 4 * 40 * 500  # the recorder sees what the oracle holds
    assert chunked.largest == 16 * 500


def test_memory_and_chunks_are_bounded_by_the_default_too():
    case = Case(19, batch=4, length=40, width=8, vocabulary=500)
    with LargestOutput() as chunked:
        case.gradients(case.run())
    assert chunked.largest == 128 * 500


def test_inputs_that_do_not_fit_are_refused_with_their_shapes():
    case = Case(20)
    with pytest.raises(ValueError, match="temperature is 0"):
        case.run(temperature=0)
    with pytest.raises(ValueError, match="chunk is 0"):
        case.run(chunk=0)
    with pytest.raises(ValueError, match="give both or neither"):
        token_statistics(case.hidden, case.weight, case.tokens, ref_hidden=case.ref_hidden)
    with pytest.raises(ValueError, match=r"tokens \(2, 4\) do not match"):
        token_statistics(case.hidden, case.weight, case.tokens[:, :4])
    with pytest.raises(ValueError, match=r"ref_hidden \(2, 5, 5\), ref_lm_head_weight \(7, 4\)"):
        token_statistics(case.hidden, case.weight, case.tokens, 1.0, case.ref_hidden, case.weight)
    with pytest.raises(ValueError, match="7 tokens and the reference's 6"):
        token_statistics(case.hidden, case.weight, case.tokens, 1.0, case.ref_hidden, case.ref_weight[:6])
