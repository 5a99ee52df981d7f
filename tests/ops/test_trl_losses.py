"""Losses, gradients and group advantages are those of TRL's own code on the same tensors, at 1e-5.

TRL's trainers are not made: their methods are called on an object that has the attributes which they read.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf import Config
from stable_rlhf.learner.objective import Scale, objective
from stable_rlhf.ops.advantages import dr_grpo, grpo, rloo
from stable_rlhf.ops.objective import loss_denominator
from stable_rlhf.policy.actor_critic import Output
from stable_rlhf.records import Batch
from tests.tiny_updates import learning, some_tokens

pytest.importorskip("trl")
ROWS, LENGTH, GROUP, MOST = 8, 6, 4, 9
"""Completions, their columns, completions of a prompt, and the most tokens that one may have."""


class Figures:
    """One set of tensors for both sides: log-probs now and before, of the reference, advantages, mask."""

    def __init__(self, first_step: bool, drift: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = some_tokens(ROWS, 12, LENGTH)
        self.mask = self.tokens.mask

        def grid() -> Tensor:
            return torch.randn(ROWS, LENGTH, generator=generator)

        self.logp = (grid() - 4.0).requires_grad_()
        self.old_logp = self.logp.detach() + (0.0 if first_step else drift) * grid()
        self.ref_logp = self.logp.detach() + 0.5 * grid()
        self.rewards = torch.randn(ROWS, generator=generator)
        self.valid = torch.ones(ROWS, dtype=torch.bool)


def theirs(trainer: str, given: Figures, advantages: Tensor, **attributes: Any) -> tuple[float, Tensor]:
    """(TRL's loss, its gradient for the log-probs)."""
    import trl

    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    accelerator.gather_for_metrics = accelerator.gather
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=attributes.pop("bias_corrected", True), steps_per_generation=1
    )
    stub = SimpleNamespace(
        accelerator=accelerator,
        args=args,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (given.logp, torch.zeros(ROWS, LENGTH), None),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        entropy_coef=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        max_completion_length=MOST,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
    for name, value in attributes.items():
        setattr(stub, name, value)
    mask = given.mask.long()
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": given.old_logp,
        "old_logps": (given.old_logp * mask).sum(1),
        "ref_per_token_logps": given.ref_logp,
        "num_items_in_batch": mask.sum(),
    }
    loss = getattr(trl, trainer)._compute_loss(stub, None, inputs)
    return loss.item(), torch.autograd.grad(loss, given.logp)[0]


def ours(config: Config, given: Figures, advantages: Tensor, kl_coef: float = 0.0) -> tuple[float, Tensor]:
    """(our loss, its gradient for the log-probs)."""
    nothing = torch.zeros(ROWS, LENGTH)
    state = torch.zeros(ROWS, LENGTH, 1)
    out = Output(logp=given.logp, entropy=nothing, values=torch.zeros(0, ROWS, LENGTH), state=state, exact_kl=None)
    batch = Batch(
        tokens=given.tokens,
        logp=given.old_logp,
        ref_logp=given.ref_logp,
        entropy=nothing,
        values=out.values,
        advantages=torch.where(given.mask, advantages[:, None], 0),
        returns=nothing,
        counts=torch.ones_like(given.mask),
    )
    tokens, settings = int(given.mask.sum()), learning(config)
    policy = loss_denominator(config.optim.denominator, tokens, ROWS, config.rollout.max_completion_length)
    numbers = (kl_coef, tokens, policy)
    scale = Scale(**dict(zip(("kl_coef", "tokens", "policy"), map(torch.tensor, map(float, numbers)), strict=True)))
    model: Any = SimpleNamespace(critic=config.critic)
    loss, _ = objective(out, batch, model, scale, settings, learns_policy=True)
    return loss.item(), torch.autograd.grad(loss, given.logp)[0]


def assert_equal(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)
    assert other[1].abs().max() > 1e-3


def config_of(preset: str, **optim: Any) -> Config:
    sampled = {"batch_size": ROWS, "num_generations": GROUP, "max_completion_length": MOST}
    return Config.from_preset(preset, rollout=sampled, optim=optim)


KINDS = {"dapo": "token", "bnpo": "token", "grpo": "sequence", "dr_grpo": "length"}


@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "denominator"), KINDS.items())
def test_the_clipped_loss_and_its_gradient(loss_type: str, denominator: str, level: str, first_step: bool) -> None:
    given = Figures(first_step)
    advantages = grpo(given.rewards, given.valid, GROUP)
    config = config_of("grpo", denominator=denominator, importance=level, epsilon_high=0.28)
    attributes = {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": 0.28}
    assert_equal(ours(config, given, advantages), theirs("GRPOTrainer", given, advantages, **attributes))


@pytest.mark.parametrize("preset", ["grpo", "dr-grpo", "rloo"])
@pytest.mark.parametrize("first_step", [True, False])
def test_a_preset_has_the_loss_and_the_gradient_of_trls_defaults(preset: str, first_step: bool) -> None:
    # RLOO's one ratio is the product of the tokens': near 1 only where each of them is
    given = Figures(first_step, drift=0.05)
    make = {"grpo": grpo, "dr-grpo": dr_grpo, "rloo": rloo}[preset]
    advantages = make(given.rewards, given.valid, GROUP)
    trainer, loss_type = "RLOOTrainer" if preset == "rloo" else "GRPOTrainer", "dapo"
    if preset == "dr-grpo":
        loss_type = "dr_grpo"
    assert_equal(ours(config_of(preset), given, advantages), theirs(trainer, given, advantages, loss_type=loss_type))


@pytest.mark.parametrize("first_step", [True, False])
def test_cispo_whose_bound_is_one_more_than_ours(first_step: bool) -> None:
    given = Figures(first_step)
    advantages = grpo(given.rewards, given.valid, GROUP)
    config = config_of("grpo", loss="cispo", epsilon_high=0.28)
    assert_equal(
        ours(config, given, advantages), theirs("GRPOTrainer", given, advantages, loss_type="cispo", epsilon_high=1.28)
    )


@pytest.mark.parametrize(("loss_type", "denominator"), KINDS.items())
def test_the_gradient_of_the_kl_in_the_loss_at_the_first_step(loss_type: str, denominator: str) -> None:
    """TRL's k3 times the ratio has at a ratio of 1 the gradient of k2; the values differ, as estimates of one KL do."""
    given = Figures(first_step=True)
    advantages = grpo(given.rewards, given.valid, GROUP)
    _, gradient = ours(config_of("grpo", denominator=denominator), given, advantages, kl_coef=0.4)
    _, expected = theirs("GRPOTrainer", given, advantages, loss_type=loss_type, beta=0.4)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    _, without = ours(config_of("grpo", denominator=denominator), given, advantages)
    assert (gradient - without).abs().max() > 1e-3


@pytest.mark.parametrize("skipped", [(), (1,), (0, 1, 2), (4, 5, 6, 7)])
def test_the_advantages_of_a_group(skipped: tuple[int, ...]) -> None:
    """TRL's code for them is a part of a method that samples: its three lines, with its own deviation."""
    from trl.trainer.utils import nanstd

    given = Figures(first_step=True)
    valid = torch.tensor([row not in skipped for row in range(ROWS)])
    grouped = torch.where(valid, given.rewards, torch.nan).view(-1, GROUP)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    deviations = nanstd(grouped, dim=1)[:, None]
    others = (grouped.nansum(1, keepdim=True) - grouped) / (valid.view(-1, GROUP).sum(1, keepdim=True) - 1)
    expected = {
        grpo: centred / (deviations.nan_to_num(0.0) + 1e-4),
        dr_grpo: centred,
        rloo: (grouped - others).nan_to_num(0.0, 0.0, 0.0),
    }
    for function, values in expected.items():
        found = function(given.rewards, valid, GROUP)
        torch.testing.assert_close(found, values.flatten().nan_to_num(0.0), rtol=1e-5, atol=1e-6)
