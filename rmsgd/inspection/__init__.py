"""What stands around `rmsgd.probe`: reading checkpoints, and showing what was measured in them."""
