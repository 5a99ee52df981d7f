"""doctor for the arguments of TRL's own script: `stable-rlhf doctor --trl FILE`."""

from stable_rlhf.doctor.trl.arguments import SCRIPTS, TRLArguments, read_arguments
from stable_rlhf.doctor.trl.checks import examine_trl

__all__ = [
    "SCRIPTS",
    "TRLArguments",
    "examine_trl",
    "read_arguments",
]
