"""`python -m bench same-lr`: RMSGD at its defaults compared with SGD at the same learning rate."""

from bench.same_lr.command import main as main
