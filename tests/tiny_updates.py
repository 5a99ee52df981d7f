"""What the tests of the update share: a rollout made by hand, a policy that has left its reference, an update."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stable_rlhf import Config
from stable_rlhf.control import Decision
from stable_rlhf.learner import Learning, Passes, Preview, make_batch, make_passes, measure, optimizer_groups, update
from stable_rlhf.policy.actor_critic import ActorCritic
from stable_rlhf.records import Batch, Rollout, Tokens
from tests.tiny_runs import moved, new_lora, policy

ROWS = 8
ONE_STEP = {"num_iterations": 1, "num_mini_batches": 1, "max_grad_norm": 1e9}
"""One unclipped optimiser step on the whole rollout."""


def make_config(
    preset: str = "safe",
    optim: dict | None = None,
    critic: dict | None = None,
    rollout: dict | None = None,
    **sections: Any,
) -> Config:
    return Config.from_preset(
        preset,
        rollout={"batch_size": ROWS, **(rollout or {})},
        optim={"preview": False, **(optim or {})},
        critic={"max_grad_norm": 1e9, "zero_init": False, **(critic or {})},  # heads that say something
        **sections,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, config: Config, adapter: bool = False) -> ActorCritic:
    """A policy that has left its reference, and target heads that lag behind the heads."""
    base = policy(tokenizer)
    torch.manual_seed(1)
    given = new_lora(base) if adapter else base
    model = ActorCritic(given, config.critic, autocast=config.model.dtype == "bfloat16")
    if adapter:
        moved(model.policy)
    generator = torch.Generator().manual_seed(2)
    whole = [] if adapter else model.policy_parameters()
    for parameter in [*whole, *model.target_heads.parameters()]:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def learning(config: Config) -> Learning:
    """The settings that the learner reads of a configuration."""
    return Learning(
        optim=config.optim,
        critic=config.critic,
        kl=config.kl,
        temperature=config.rollout.temperature,
        num_generations=config.rollout.num_generations,
        max_completion_length=config.rollout.max_completion_length,
        seed=config.seed,
    )


def passes_of(model: ActorCritic, config: Config) -> Passes:
    return make_passes(model, config.model, learning(config))


def make_optimizer(model: ActorCritic, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(optimizer_groups(model, config.optim, config.critic), fused=True)


def make_rollout(vocabulary: int, skipped: tuple[int, ...] = ()) -> Rollout:
    """8 rows with prompts of 1 to 4 and responses of 1 to 6 tokens; the rows in ``skipped`` have no reward."""
    generator = torch.Generator().manual_seed(3)
    prompt_lengths, lengths = torch.tensor([1, 3, 4, 2, 4, 1, 3, 2]), torch.tensor([6, 1, 4, 3, 5, 2, 6, 4])
    valid = [row not in skipped for row in range(ROWS)]
    scores = [
        score if keep else 0.0 for score, keep in zip([1.0, -0.5, 0.3, 2.0, 0.0, -1.0, 0.7, 0.1], valid, strict=True)
    ]
    tokens = Tokens.pack(
        torch.randint(3, vocabulary, (ROWS, 4), generator=generator),
        torch.arange(4) >= 4 - prompt_lengths[:, None],
        torch.randint(3, vocabulary, (ROWS, 6), generator=generator),
        torch.arange(6) < lengths[:, None],
    )
    return Rollout(
        indices=list(range(ROWS)),
        prompts=["p"] * ROWS,
        completions=["c"] * ROWS,
        tokens=tokens,
        ended=[True] * ROWS,
        scores=scores,
        valid=valid,
        per_function={"r": [score if keep else None for score, keep in zip(scores, valid, strict=True)]},
        truncated=0,
    )


def some_rows(rollout: Rollout, keep: list[int]) -> Rollout:
    """The rollout with these rows alone."""
    tokens = {f.name: getattr(rollout.tokens, f.name)[keep] for f in dataclasses.fields(Tokens)}
    lists = {
        name: [getattr(rollout, name)[i] for i in keep]
        for name in ("prompts", "completions", "ended", "scores", "valid")
    }
    per_function = {name: [values[i] for i in keep] for name, values in rollout.per_function.items()}
    return dataclasses.replace(rollout, indices=keep, tokens=Tokens(**tokens), per_function=per_function, **lists)


def some_tokens(rows: int, width: int, length: int, seed: int = 0) -> Tokens:
    """Random tokens of this shape."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, width), generator=generator)
    start = torch.randint(1, width - length + 1, (rows,), generator=generator)
    at = start[:, None] + torch.arange(length)
    counts = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = torch.arange(length) < counts
    return Tokens(ids=ids, start=start, response=ids.gather(1, at.clamp(max=width - 1)), mask=mask)


def some_batch(rows: int, width: int, length: int, seed: int = 0, heads: int = 1) -> Batch:
    """Random tokens with random figures of so many heads."""
    generator = torch.Generator().manual_seed(seed)

    def grid(*shape: int) -> Tensor:
        return torch.randn(*shape, rows, length, generator=generator)

    names = ("logp", "ref_logp", "entropy", "advantages", "returns")
    grids = {name: grid() - (4.0 if name.endswith("logp") else 0.0) for name in names}
    tokens = some_tokens(rows, width, length, seed)
    return Batch(tokens=tokens, values=grid(heads), counts=torch.ones_like(tokens.mask), **grids)


def decide(kl_coef: float, update_kl: float | None = None) -> Decision:
    return Decision(
        kl_coef=kl_coef, threshold=None, excess=0.0, kl_short=0.0, kl_long=0.0, gate=1.0, phase="NONE",
        pid_p=0.0, pid_i=0.0, pid_d=0.0, entropy_floor=None, reason="", update_kl=update_kl,
    )  # fmt: skip


def prepare(model: ActorCritic, rollout: Rollout, config: Config, kl_coef: float = 0.0, step: int = 0) -> Batch:
    return measured_batch(passes_of(model, config), rollout, kl_coef, step)


def measured_batch(
    passes: Passes, rollout: Rollout, kl_coef: float = 0.0, step: int = 0, preview: Preview | None = None
) -> Batch:
    """The batch of a rollout as it is measured at a step."""
    measured = measure(passes, rollout, step, preview)
    return make_batch(passes.model, measured, rollout.scores, decide(kl_coef), passes.learning)[0]


def learn(
    model: ActorCritic, rollout: Rollout, config: Config, kl_coef: float = 0.0, step: int = 0, sgd: float | None = None
) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """(metrics, the gradients of every optimiser step after clipping, by parameter name) of one update."""
    optimizer = make_optimizer(model, config)
    if sgd is not None:  # Adam divides each gradient by its size, rounding errors too: no tolerance would hold
        groups = optimizer_groups(model, config.optim, config.critic)
        optimizer = torch.optim.SGD([{**group, "lr": sgd} for group in groups], fused=True)
    steps: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    batch = prepare(model, rollout, config, kl_coef, step)
    return update(passes_of(model, config), optimizer, batch, decide(kl_coef), step).metrics, steps


def weights(model: ActorCritic) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
