"""`python -m bench gpu`: build, GPU tests and every measurement of the CUDA kernels, in 6 minutes.

`command` holds the command line, the stages and the order of their sections, `budget` how they share the
time, `checks` the build and the tests, `smoke` the training loop that shows whether the kernels run at all,
`measurements` and `clocks` the timing, `processes` how a section is started and ended, `targets` the figures
to reach, `tables` the output, and `stress` epoch ends under load. Without a GPU, `counting` estimates an
epoch end on the `cards` by count, and `before` does so for an older design.

Every section runs in processes of its own, since an illegal access spoils the CUDA context of its process,
and a kernel that hangs ends with its process. Rows are kept as they come.
"""

from bench.gpu.command import main

__all__ = ["main"]
