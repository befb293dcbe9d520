"""`python -m bench gpu`: build, GPU tests and every measurement of the CUDA kernels, in 6 minutes.

`command` holds the command line, the stages and the order of their sections, `budget` how they share the
time, `checks` the build and the tests, `smoke` the training loop that says whether the kernels run at all,
`measurements` and `clocks` what is timed and how, `processes` how a section is started and ended,
`targets` what is to be reached, `tables` what is printed, `stress` epoch ends under load. Without a GPU
`counting` tells what an epoch end takes on the `cards` by count, `before` what it took in an older design.

Every section runs in processes of its own: an illegal access spoils the CUDA context of its process, and a
kernel that hangs ends with it. Rows are kept as they come.
"""

from bench.gpu.command import main

__all__ = ["main"]
