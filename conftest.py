"""Set before anything loads OpenMP, for these processes and for those that they start."""

import os

# Threads that wait for each other spin by default. On a machine that does much else they would take the
# processor from the very thread that they wait for, and a test of a second would take minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
