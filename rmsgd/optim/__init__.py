"""RMSGD and all that serves it: options, state, checkpoints, the step and the epoch end."""
