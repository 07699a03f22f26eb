"""Lists in messages, cut before they fill the screen."""

from collections.abc import Iterable

MOST = 10


def cut(items: Iterable[str], separator: str = ", ", most: int = MOST) -> str:
    """The first `most` items, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])
