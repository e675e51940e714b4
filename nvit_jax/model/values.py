"""Numbers of models as users and files give them: of the right type, finite, and of a size that can be."""

import numbers
from typing import Any

from nvit_jax.errors import UserError


def whole(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. UserError, which begins with `name`, for another type, and outside of [least, most]."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"{name}={_shown(value)} must be a whole number")
    value = int(value)
    if value < least:
        raise UserError(f"{name}={_shown(value)} is too small; it must be at least {least:,}")
    if value > most:
        raise UserError(f"{name}={_shown(value)} is too large; it must be at most {most:,}")
    return value


def real(name: str, value: Any, least: float, most: float) -> float:
    """`value` as a float. UserError, which begins with `name`, for another type, NaN, and outside of [least, most]."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"{name}={_shown(value)} must be a number")
    if not least <= value <= most:  # type: ignore[operator]  # NaN is neither
        raise UserError(f"{name}={_shown(value)} must be a number from {least:g} to {most:g}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """`value`. UserError, which begins with `name`, unless it is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={_shown(value)} must be true or false")
    return value


def _shown(value: Any) -> str:
    """In one short line, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
