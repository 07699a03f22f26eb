"""Lists in messages, cut before they fill the screen."""

from collections.abc import Iterable

MOST = 10


def cut(items: Iterable[str], separator: str = ", ") -> str:
    """The first ten items, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - MOST} more"] if len(items) > MOST else []
    return separator.join([*items[:MOST], *more])
