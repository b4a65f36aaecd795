"""Windows along one side of an image."""


def starts(side: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of the windows that cover ``side`` pixels; the last ends at its
    border."""
    last = max(side - window, 0)
    return sorted({min(start, last) for start in range(0, last + stride, stride)})
