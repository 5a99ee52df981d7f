"""The mathematics of sampling and of the update: tensors in, tensors out.

Nothing here reads files, clocks, ranks or hidden random numbers.

- `masked`: sums, means, variances, whitening and distinct-n over the True entries of a mask.
- `logprobs`: log-probability, entropy and exact KL per token, chunked through the LM head.
- `advantages`: rewards per token, generalised advantage estimation, advantages of groups and of the batch.
- `objective`: the policy's losses and their denominators, soft-min, KL estimators and penalty.
- `critic`: the value loss, explained variance.
- `sampling`: drawing tokens from logits.

Wherever a mask appears it is boolean, and True marks a response token (EOS included). An entry outside the mask never
influences a result, NaN or not, and is 0 in a result of the same shape.
"""

from __future__ import annotations

from . import advantages, critic, logprobs, masked, objective

__all__ = ["advantages", "critic", "logprobs", "masked", "objective"]
