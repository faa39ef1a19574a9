"""What a section checks its fields with; every message names the setting."""

import math


class ConfigError(ValueError):
    """A setting that cannot work; the message names it and says what to do."""


def check(holds: bool, setting: str, expected: str, got: object, do: str = "") -> None:
    """Raise ConfigError unless a condition holds; `do` says what to change."""
    if not holds:
        hint = f"; {do}" if do else ""
        raise ConfigError(f"{setting}: expected {expected}, got {got!r}{hint}")


def check_ranges(section: str, values: object, **limits: tuple[float, float]) -> None:
    """Check that fields are finite numbers within (low, high), both included."""
    for name, (low, high) in limits.items():
        value = getattr(values, name)
        span = f"a number in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
        check(abs(value) < math.inf, f"{section}.{name}", "a finite number", value)
        check(low <= value <= high, f"{section}.{name}", span, value)


ANY = math.inf
"""No upper limit."""
