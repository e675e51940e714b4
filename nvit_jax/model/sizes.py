"""Sizes of images and patches: one number where both sides are alike, else (height, width)."""

from typing import Any

from nvit_jax.model.values import whole

Size = int | tuple[int, int]


def sides(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def one(height: int, width: int) -> Size:
    """The inverse of `sides`."""
    return height if height == width else (height, width)


def size(name: str, value: Any, least: int, most: int) -> Size:
    """`value`, a number or two, as a Size. UserError, which begins with `name`, for others and out of [least, most]."""
    if isinstance(value, tuple | list) and len(value) == 2:
        height, width = (whole(f"{name}[{i}]", side, least, most) for i, side in enumerate(value))
        return one(height, width)
    return whole(name, value, least, most)


def parse(text: str) -> Size | None:
    """Of a text: a number, or height and width with an x between them, "256x128". None for others."""
    found = text.split("x")
    if len(found) > 2 or not all(side.isdecimal() and int(side) for side in found):
        return None
    return one(int(found[0]), int(found[-1]))


def words(size: Size) -> str:
    """ "224", or "224 x 160" (height and width)."""
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"
