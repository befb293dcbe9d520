"""`python -m bench noise-search`: which search finds the minimum of EVBMF's free energy.

The free energy of a spectrum has many local minima. Three searches minimise it for the same matrices:

    rmsgd        the global minimiser
    rmsgd-1.0.2  the authors' package: SciPy's bounded Brent search of absolute tolerance 1e-5, on
                 an fp32 spectrum
    vbmf         the search of the widely copied Python VBMF: the same Brent search in float64

Every result is judged by the exact free energy at its sigma^2. A search has missed the minimum if its free
energy is above the lowest by more than rounding.
"""

import argparse
import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import rmsgd
from bench import output, peers, readme, terminal
from bench.arguments import add_output
from bench.epoch_end import spectra
from bench.measure import machine
from bench.networks import network, networks
from bench.weights import make_trained_like
from rmsgd import reference
from rmsgd.layers import as_matrix

Array = npt.NDArray[np.float64]
MODELS = ("resnet18", "resnet50", "mobilenetv2", "vit-b16")


def brent(c: Array, L: int, M: int) -> float:
    """The bounded search of the Python VBMF implementations, by SciPy, in float64."""
    _, _, x_threshold = reference.threshold(L, M)
    last = min(math.ceil(L / (1 + L / M)) - 1, L) - 1
    low = max(c[last + 1] / x_threshold, float(np.mean(c[last + 1 :])))
    found = scipy.optimize.minimize_scalar(
        reference.free_energy, args=(c, L, M), bounds=(low, c.sum() / L), method="bounded"
    )
    return float(found.x)


def release(matrix: torch.Tensor) -> float:
    """The noise variance of rmsgd 1.0.2, caught inside its EVBMF when the search returns it."""
    factorisation: Any = import_module(f"{peers.load_rmsgd_1_0_2().__name__}.matrix_factorization")
    search = factorisation.minimize_scalar
    found: list[float] = []

    def remember(*arguments: Any, **options: Any) -> Any:
        result = search(*arguments, **options)
        found.append(float(result.x))
        return result

    factorisation.minimize_scalar = remember
    try:
        factorisation.EVBMF(matrix)
    finally:
        factorisation.minimize_scalar = search
    return found[0]


def compare(model: str, weights: str, description: str) -> dict[str, Any]:
    """One row of the table: how often each search misses the minimum, and by how much."""
    torch.manual_seed(0)
    module = network(model)
    if weights == "trained-like":
        make_trained_like(module)
    misses = dict.fromkeys(("rmsgd", "rmsgd-1.0.2", "vbmf"), 0)
    other_rank = dict(misses)
    error: dict[str, list[float]] = {name: [] for name in misses}
    parts = spectra(module)
    for weight, unfolding in track(parts, description, console=Console(stderr=True), transient=True):
        L, M = unfolding.L, unfolding.M
        matrix = as_matrix(weight.detach(), unfolding)
        gamma = reference.singular_values(matrix.double().numpy())
        exponent = math.frexp(gamma[0])[1]
        c = np.ldexp(gamma, -exponent) ** 2 / M
        rank, variance, lowest = reference.minimise_free_energy(c, L, M)
        in_units = 4.0**-exponent
        variances = {
            "rmsgd": rmsgd.evbmf(matrix).noise_variance * in_units,
            "rmsgd-1.0.2": release(matrix) * in_units,
            "vbmf": brent(gamma**2 / M, L, M) * in_units,
        }
        for name, found in variances.items():
            threshold = reference.threshold(L, M)[2] * found
            # Omega steps up at a breakpoint, where a minimiser may lie. The side on which it was found
            # counts.
            energy = min(reference.free_energy(v, c, L, M) for v in (found, found * (1 + 1e-12)))
            misses[name] += energy > lowest + 1e-6 * (1 + abs(lowest))
            other_rank[name] += int((c > threshold * (1 + 1e-12)).sum()) != rank
            error[name].append(abs(found / variance - 1))
    return {
        "model": model,
        "weights": weights,
        "spectra": len(parts),
        "above_the_minimum": misses,
        "another_rank": other_rank,
        "worst_error_of_variance": {name: max(values) for name, values in error.items()},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table."""
    title = "Spectra whose search ends above the lowest free energy (with another rank; worst sigma²)"
    cells = (
        [f"{row['model']}, {row['weights']}", str(row["spectra"]), *readme.search_cells(row)] for row in rows
    )
    return terminal.table(title, ("weights", "spectra", "rmsgd", "rmsgd 1.0.2", "Python VBMF"), cells)


def main(arguments: Sequence[str]) -> int:
    """Compares, prints the table, writes `noise-search.json`; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench noise-search",
        description="Compare the searches of rmsgd, rmsgd 1.0.2 and the Python VBMF for EVBMF's noise "
        "variance, by the free energy at which they end.",
    )
    parser.add_argument(
        "--models", type=networks, default=MODELS, help=f"comma-separated (default: {','.join(MODELS)})"
    )
    add_output(parser, "noise-search")
    options = parser.parse_args(arguments)
    output.check(options.out, options.readme, ["noise-search"])
    peers.load_rmsgd_1_0_2()
    rows = [
        compare(model, weights, f"{model}, {weights}")
        for model in options.models
        for weights in ("initial", "trained-like")
    ]
    result = {"schema": 1, "machine": machine(), "noise-search": rows}
    console = Console()
    console.print(table(rows))
    output.finish(options.out / "noise-search.json", result, console, page=options.readme)
    return 0
