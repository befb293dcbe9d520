"""`python -m bench gate`: the CI check that fails when the optimizer gets slower.

`rule` holds the statistics, `figures` what is timed and when it is decided, `worker` and `cases` the
process that times, `processes` how it is started (also for another revision), `counts` and `callgrind`
what does not depend on the clock, `baseline` the file, `command` the command line, `trial` the
experiment that shows what the gate catches.
"""

from collections.abc import Sequence


def main(given: Sequence[str]) -> int:
    """See `bench.gate.command.main`, which the processes that time another revision do without."""
    from bench.gate import command

    return command.main(given)
