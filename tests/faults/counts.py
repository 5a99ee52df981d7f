"""How often something was made to go wrong, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    tried: int
    """Faults that were made."""
    survived: int
    """Faults after which all was as it should be."""
    lost: tuple[str, ...] = ()
    """A sentence on each fault after which it was not."""
    how: str = ""
    """What else there is to say of them."""

    def __str__(self) -> str:
        line = f"{self.tried} tried, {self.survived} survived, {len(self.lost)} lost"
        return line + "".join(f"\n  {sentence}" for sentence in self.lost)
