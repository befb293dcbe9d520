"""`python -m bench layer-rates`: what layer-wise rates cost for other optimizers, and what they gain."""

from bench.layer_rates.command import main as main
