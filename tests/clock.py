"""A clock that tests move, so that their times are the same on a quiet and on a busy machine."""

PATIENCE = 900.0
"""Seconds after which a wait in a test counts as hanging, also on a busy machine."""


class Clock:
    """Stands in for `time` in a module that reads it: `monkeypatch.setattr(module, "time", Clock())`.

    Args:
        tick: seconds that pass between one reading and the next.

    """

    def __init__(self, tick=0.0):
        self.now = 0.0
        self.tick = tick

    def perf_counter(self):
        self.now += self.tick
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds):
        self.now += seconds
