"""Text that comes out of a file, for people to read."""


def printable(text: str) -> str:
    """Text from a file, with characters that could steer a terminal written as visible escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
