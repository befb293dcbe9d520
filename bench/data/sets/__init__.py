"""A module for each data set; `bench.data.registry` finds them by themselves."""
