"""The data that networks learn from, as a whole for `bench train` and as batches for `bench study`.

A data set is a module of `bench.data.sets`.
"""

from bench.data.batches import Batches
from bench.data.split import Split
from bench.data.whole import Dataset, load, sizes

__all__ = ["Batches", "Dataset", "Split", "load", "sizes"]
