"""Numbers that say how sure they are: bounds that hold, and estimates with a likely value."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Bounds", "Estimate"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """A whole number that is certainly from `low` to `high`; exact if the two are one."""

    low: int
    high: int

    @classmethod
    def of(cls, value: int) -> Bounds:
        """Return an exact number."""
        return cls(value, value)

    @property
    def exact(self) -> bool:
        """Whether the number is known."""
        return self.low == self.high

    @property
    def middle(self) -> float:
        """The number between the bounds."""
        return (self.low + self.high) / 2

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: int) -> Bounds:
        return Bounds(self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that is likely about `likely`, and hardly below `low` or above `high`."""

    low: float
    likely: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.low * factor, self.likely * factor, self.high * factor)
