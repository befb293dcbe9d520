"""`python -m bench gate`: the CI check that fails when the optimizer gets slower.

`rule` holds the statistics, `figures` what is timed and when it is decided, `worker` and `cases` the
process that times, `processes` how it is started (also for another revision), `counts` and `callgrind`
what does not depend on the clock, `baseline` the file, `command` the command line, `trial` the
experiment that shows what the gate catches.
"""

from bench.gate.command import main

__all__ = ["main"]
