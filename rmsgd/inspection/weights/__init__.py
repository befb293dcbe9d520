"""Weights as the network uses them: masks, scales and norms applied, constants told apart."""
