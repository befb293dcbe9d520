"""`rmsgd.probe`: reading checkpoints, measuring their weights, and showing the result."""
