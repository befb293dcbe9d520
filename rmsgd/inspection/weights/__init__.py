"""Weights as the network uses them: with masks, scales and norms applied, and without constants."""
