"""SAFE's control in TRL's GRPOTrainer and RLOOTrainer.

trainer = GRPOTrainer(...)
trainer.add_callback(SAFECallback(trainer, budget=0.3))   # holds the KL, and stops a run that fails
guarded(trainer, budget=0.3)                              # the same, but goes back to the last good state
SafeGRPO = safe_trainer(GRPOTrainer, budget=0.3)          # and bounds each update
"""

from stable_rlhf.integrations.trl.callback import SAFECallback, guarded, safe_trainer

__all__ = ["SAFECallback", "guarded", "safe_trainer"]
