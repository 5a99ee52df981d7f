"""From a rollout to a changed policy: measure, batch, objective, passes, preview, update."""

from stable_rlhf.learner.adaptive_rate import AdaptiveRate
from stable_rlhf.learner.batch import make_batch
from stable_rlhf.learner.figures import plain, rollout_metrics
from stable_rlhf.learner.measure import check_finite, measure, observe
from stable_rlhf.learner.passes import Passes
from stable_rlhf.learner.replayed import make_passes
from stable_rlhf.learner.settings import Learning
from stable_rlhf.learner.step_preview import Preview, make_preview
from stable_rlhf.learner.update import optimizer_groups, update

__all__ = [
    "AdaptiveRate",
    "Learning",
    "Passes",
    "Preview",
    "check_finite",
    "make_batch",
    "make_passes",
    "make_preview",
    "measure",
    "observe",
    "optimizer_groups",
    "plain",
    "rollout_metrics",
    "update",
]
