"""The module that verl's entry point group `verl.plugins` names. verl imports it and calls nothing, so importing acts.

verl hides what a plugin raises (it logs at DEBUG), so a failure is said here, once, before verl sees it.
"""

from stable_rlhf.integrations.verl_attach import attach, warn_once

try:
    attach()
except Exception as error:
    warn_once(f"stable-rlhf could not attach to verl: {type(error).__name__}: {error}")
    raise
