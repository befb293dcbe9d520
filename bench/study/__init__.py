"""The paper's study, reproducible: `python -m bench study list | run | tune | report | nats`."""

from bench.study.command import main as main
