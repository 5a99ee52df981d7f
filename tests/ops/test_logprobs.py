from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stable_rlhf.ops import logprobs
from stable_rlhf.ops.logprobs import token_statistics
from tests.oracles import logprobs as oracle


class Case:
    """Random policy, reference and tokens, and one random weight per token of each statistic that has gradients."""

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

    def total(self, statistics) -> Tensor:
        return torch.stack([(pull * x).sum() for pull, x in zip(self.pull, statistics[:3], strict=True)]).sum()

    def gradients(self, statistics, **settings: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.total(statistics), (self.hidden, self.weight), **settings)

    def expected(self, temperature: float = 1.0):
        return oracle.token_statistics(
            self.hidden, self.weight, self.tokens, temperature, self.ref_hidden, self.ref_weight
        )

    def wide(self) -> Case:
        """The same numbers in float64."""
        case = copy.copy(self)
        for name in ("hidden", "weight", "ref_hidden", "ref_weight", "pull"):
            setattr(case, name, getattr(self, name).detach().double())
        case.hidden.requires_grad_()
        case.weight.requires_grad_()
        return case


@pytest.fixture
def narrow(monkeypatch):
    """bfloat16 takes CUDA's path: not widened, but for the one product that the CPU cannot do as CUDA does."""
    monkeypatch.setattr(logprobs, "_multiplies_narrow", lambda hidden, weight, dtype: hidden.dtype == torch.bfloat16)


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.5, 1.0, 1.7]), chunk=st.integers(1, 12))
def test_statistics_and_gradients_are_those_of_the_whole_logits_for_every_chunk_size(seed, temperature, chunk):
    case = Case(seed)
    result = case.run(temperature=temperature, chunk=chunk)
    expected = case.expected(temperature)
    torch.testing.assert_close(tuple(result), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(case.gradients(result), case.gradients(expected), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chunk", [2, 3])  # made again, kept
def test_gradients_agree_with_finite_differences(chunk):
    case = Case(batch=1, length=3, width=3, vocabulary=4)

    def statistics(hidden, weight):
        found = token_statistics(hidden, weight, case.tokens, 0.8, case.ref_hidden, case.ref_weight, chunk=chunk)
        return found[:3]

    assert torch.autograd.gradcheck(statistics, (case.hidden, case.weight))


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize(
    "asked", [("logp",), ("entropy",), ("kl",), ("logp", "entropy"), ("logp", "kl"), ("entropy", "kl")]
)
def test_the_gradient_of_some_statistics_alone_is_their_own(asked, chunk):
    case = Case(11)
    expected = dict(zip(("logp", "entropy", "kl"), case.expected(0.7)[:3], strict=True))
    result = case.run(chunk=chunk, temperature=0.7)
    both = (
        torch.autograd.grad(sum((case.pull[i] * x).sum() for i, x in enumerate(figures)), (case.hidden, case.weight))
        for figures in ([getattr(result, name) for name in asked], [expected[name] for name in asked])
    )
    torch.testing.assert_close(*both, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_gets_its_own(trained):
    case = Case(12)
    both = dict(zip(("hidden", "weight"), case.gradients(case.run()), strict=True))
    frozen = case.weight if trained == "hidden" else case.hidden
    frozen.requires_grad_(False)
    live = getattr(case, trained)
    case.total(case.run()).backward()
    assert frozen.grad is None
    torch.testing.assert_close(live.grad, both[trained], rtol=1e-13, atol=0)


def test_no_gradient_reaches_the_reference():
    case = Case(13)
    case.ref_hidden.requires_grad_()
    case.ref_weight.requires_grad_()
    result = case.run()
    assert result.kl is not None
    assert result.ref_logp is not None
    assert not result.ref_logp.requires_grad
    result.kl.sum().backward()
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
    assert alone.ref_logp is None
    assert torch.equal(alone.logp, same.logp)
    assert torch.equal(alone.entropy, same.entropy)
    gradient = torch.autograd.grad((alone.logp * alone.entropy).sum(), case.hidden)
    logp, entropy, *_ = oracle.token_statistics(case.hidden, case.weight, case.tokens)
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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("dtype", "half_step"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_every_narrower_dtype_gets_float32_logits_also_under_autocast(dtype, half_step, autocast, chunk, temperature):
    case = Case(17, width=64, vocabulary=200, dtype=dtype)
    wide = case.wide()
    expected = wide.expected(temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = case.run(chunk=chunk, temperature=temperature)
        gradients = case.gradients(result)
    for found, true in zip(result, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=3e-5)
    for found, true in zip(gradients, wide.gradients(expected), strict=True):
        assert found.dtype == dtype  # rounded once, at the end
        torch.testing.assert_close(found.double(), true, rtol=half_step, atol=1e-4)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_that_is_not_widened_gets_float32_logits_and_gradients_as_exact_as_bfloat16(
    autocast, chunk, temperature
):
    case = Case(17, width=64, vocabulary=200, dtype=torch.bfloat16)
    wide = case.wide()
    expected = wide.expected(temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = case.run(chunk=chunk, temperature=temperature)
        gradients = case.gradients(result)
    for found, true in zip(result, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=1e-5)

    # dL/dlogits, in float64: the oracle with the logits for hidden states and the identity for an LM head.
    whole = copy.copy(wide)
    whole.hidden = (wide.hidden @ wide.weight.T).detach().requires_grad_()
    whole.weight = torch.eye(200, dtype=torch.float64, requires_grad=True)
    by_logits = whole.gradients(whole.expected(temperature))[0].reshape(-1, 200)
    hidden, weight = wide.hidden.detach().reshape(-1, 64), wide.weight.detach()
    # The sum of what each rounded term may be off by.
    bounds = ((by_logits.abs() @ weight.abs()).view(wide.hidden.shape), by_logits.T.abs() @ hidden.abs())
    for found, true, bound in zip(gradients, wide.gradients(expected), bounds, strict=True):
        assert found.dtype == torch.bfloat16
        error = (found.double() - true).abs()
        assert (error <= 2**-8 * (bound + true.abs()) * 1.01 + 1e-6).all()
        assert error.norm() <= 2**-8 * true.norm()  # as a whole no more than the last rounding may be off


@pytest.mark.usefixtures("narrow")
def test_the_gradient_of_a_near_certain_token_keeps_its_digits_when_it_is_rounded_to_bfloat16():
    # p_a = 1 - 4e-4, which bfloat16 cannot tell from 1: rounded before the subtraction, the gradient would be 0.
    hidden = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    token_statistics(hidden, weight, torch.tensor([0])).logp.sum().backward()
    off = 1 / (1 + torch.tensor(8.0).exp().item())
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float(), torch.tensor([[off, -off]]), rtol=2**-7, atol=0)


def test_the_narrow_path_is_cuda_s_with_bfloat16_on_both_sides_alone():
    bfloat16, float32 = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    assert not logprobs._multiplies_narrow(bfloat16, bfloat16, torch.float32)  # the CPU has no such product
    if torch.cuda.is_available():
        bfloat16, float32 = bfloat16.cuda(), float32.cuda()
        assert logprobs._multiplies_narrow(bfloat16, bfloat16, torch.float32)
        assert not logprobs._multiplies_narrow(bfloat16, bfloat16, torch.float64)
        assert not logprobs._multiplies_narrow(bfloat16, float32, torch.float32)
        assert not logprobs._multiplies_narrow(bfloat16.half(), bfloat16.half(), torch.float32)


def test_one_chunk_gives_what_many_give():
    case = Case(21, batch=4, length=40, width=8, vocabulary=500)
    whole, parts = case.run(), case.run(chunk=7)
    torch.testing.assert_close(tuple(whole), tuple(parts), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(case.gradients(whole), case.gradients(parts), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [3, None])
def test_a_graph_can_be_asked_twice(chunk):
    case = Case(22)
    for figures in (case.run(chunk=chunk), (case.run(chunk=chunk).logp,) * 3):  # with entropy and KL, and without
        first = case.gradients(figures, retain_graph=True)
        second = case.gradients(figures)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_of_several_live_graphs_has_the_gradient_of_its_own_rows():
    case = Case(23, batch=3)
    alone = [torch.autograd.grad(case.run().logp[i].sum(), case.weight)[0] for i in range(3)]
    live = [token_statistics(case.hidden[i], case.weight, case.tokens[i]).logp.sum() for i in range(3)]
    for i in (1, 2, 0):
        gradient = torch.autograd.grad(live[i], case.weight)[0]
        torch.testing.assert_close(gradient, alone[i], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [3, None])
def test_after_an_update_of_the_weight_the_gradient_is_the_new_weight_s_and_an_old_graph_is_refused(chunk):
    case = Case(24)
    before = case.run(chunk=chunk)
    case.gradients(before, retain_graph=True)
    with torch.no_grad():
        case.weight.mul_(1.5).add_(0.1)
    expected = case.expected()
    after = case.run(chunk=chunk)
    torch.testing.assert_close(tuple(after), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(case.gradients(after), case.gradients(expected), rtol=1e-10, atol=1e-11)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.gradients(before)


def saved(run) -> list[int]:
    """The sizes of the tensors that a graph keeps, the inputs' among them."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sizes


def test_a_graph_keeps_one_chunk_of_logits_at_most_and_none_where_there_are_more_chunks():
    case = Case(25, batch=4, length=40, width=8, vocabulary=500)  # 160 rows; the largest input has 4,500 numbers
    assert [size for size in saved(case.run) if size > 4_500] == [160 * 500]
    assert [size for size in saved(lambda: case.run(chunk=160)) if size > 4_500] == [160 * 500]
    assert max(saved(lambda: case.run(chunk=159))) == 4_500


def test_without_a_gradient_nothing_is_kept():
    case = Case(26)
    with torch.no_grad():
        assert saved(case.run) == []
        assert not case.run().logp.requires_grad
    case.hidden.requires_grad_(False)
    case.weight.requires_grad_(False)
    assert saved(case.run) == []


class Recorder(TorchDispatchMode):
    """Records the operations, forward and backward, their largest result, and the memory of those of `size` numbers."""

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.size, self.largest, self.names, self.tensors = size, 0, set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() == self.size:  # held, so that no address comes twice
                    self.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return result


def test_no_tensor_is_as_large_as_the_logits_forward_or_backward():
    case = Case(18, batch=4, length=40, width=8, vocabulary=500)
    with Recorder() as chunked:
        case.gradients(case.run(chunk=16))
    with Recorder() as whole:
        case.gradients(case.expected())
    assert whole.largest == 4 * 40 * 500  # the recorder sees what the oracle holds
    assert chunked.largest == 16 * 500


def test_the_default_chunk_is_as_many_rows_as_fit_its_bytes_in_whole_tiles():
    assert logprobs._chunk_rows(151_936, torch.float32) == 512  # 526 rows fit 320 MB
    assert logprobs._chunk_rows(151_936, torch.float64) == 256
    assert logprobs._chunk_rows(49_152, torch.float32) == 1_536
    assert logprobs._chunk_rows(4_096, torch.float32) == 19_456
    assert logprobs._chunk_rows(800_000, torch.float32) == 100  # less than one tile
    assert logprobs._chunk_rows(100_000_000, torch.float32) == 1


def test_memory_is_bounded_by_the_default_too(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 16 * 500 * 8)  # float64
    case = Case(19, batch=4, length=40, width=8, vocabulary=500)
    with Recorder() as chunked:
        case.gradients(case.run())
    assert chunked.largest == 16 * 500


@pytest.mark.parametrize(("chunk", "made"), [(None, 1), (10, 2 * 2)])
def test_the_gradient_of_the_log_probability_makes_no_tensor_of_the_logits_size_that_it_can_do_without(chunk, made):
    # Kept: the probabilities. Made again: the logits and their log-softmax, in each of two chunks.
    case = Case(27, batch=4, length=5, width=8, vocabulary=50, dtype=torch.float32)
    logp = case.run(chunk=chunk).logp
    with Recorder((chunk or 20) * 50) as recorder:
        torch.autograd.grad(logp.sum(), (case.hidden, case.weight))
    assert len(recorder.tensors) == made


@pytest.mark.parametrize("chunk", [3, None])
def test_the_host_never_waits_for_a_value(chunk):
    waits = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal", "masked_select"}
    case = Case(28)
    with Recorder() as recorder:
        bool(case.tokens.sum() > 0)
    assert recorder.names & waits == {"_local_scalar_dense"}  # the recorder sees one that does
    with Recorder() as recorder:
        case.gradients(case.run(chunk=chunk, temperature=0.7))
        case.gradients((case.run(chunk=chunk).logp,) * 3)
    assert recorder.names & waits == set()


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
