"""The policy as parts of a run: the weights that training changes, and the reference that must stay."""

from __future__ import annotations

from torch import Tensor

from stable_rlhf.errors import CheckpointError
from stable_rlhf.policy.actor_critic import ActorCritic


class TrainedState:
    """The weights that training changes, as a part of the run."""

    def __init__(self, model: ActorCritic) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.trained_state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_trained_state(state)


class Reference:
    """A part that only checks: a checkpoint's reference model must be the run's."""

    def __init__(self, model: ActorCritic) -> None:
        self.fingerprint = model.reference_fingerprint()

    def state_dict(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, saved: dict[str, str]) -> None:
        """Raises CheckpointError where the reference is another model."""
        if saved["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                "the checkpoint is of another run: its reference model differs; give the model that it began with"
            )
