"""Showing what was measured: tables, plots, pages, series and comparisons."""
