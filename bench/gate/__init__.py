"""`python -m bench gate`: the CI check that fails when the optimizer gets slower.

`rule` holds the statistics, `figures` the ratios that are timed and when they are decided, `worker` and
`cases` the process that times, `processes` how it is started (also for another revision), `counts` and
`callgrind` the counts that do not depend on the clock, `baseline` the file, `command` the command line, and
`trial` the experiment that shows what the gate catches.
"""

from collections.abc import Sequence


def main(given: Sequence[str]) -> int:
    """Runs the gate and returns its exit status, 0, 1, 2 or 130; see `bench.gate.command.main`."""
    from bench.gate import command

    return command.main(given)
