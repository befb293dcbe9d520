"""A module for each data set; `bench.data.registry` finds them automatically."""
