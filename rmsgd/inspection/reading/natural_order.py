"""Names in the order in which people count."""

import re


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorting key under which numbers inside names, however long, count as numbers."""
    parts = [(part.lstrip("0"), part.isdecimal()) for part in re.split(r"(\d+)", name)]
    return [(len(part) if number else -1, part) for part, number in parts]
