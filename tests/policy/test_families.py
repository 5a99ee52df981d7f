"""No family of causal language models in Transformers is trained or sampled wrongly: each is right or refused."""

from __future__ import annotations

import pytest

from tests.policy import families


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families.NAMES)
def test_a_family_is_trained_and_sampled_as_its_own_forward_says_or_refused(family: str) -> None:
    kind, why = families.verdict(family)
    if kind == "not built":
        pytest.skip(f"it could not be made tiny: {why}")
    assert kind in ("right", "refused"), why
