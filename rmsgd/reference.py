"""The formulas in plain float64 NumPy, against which every kernel is tested and which numba compiles.

Everything here is written to be compared with the papers, not to be fast. Notation, for an L x M
matrix with L <= M and singular values ``gamma_1 >= ... >= gamma_L``:

    c_h = gamma_h^2 / M        alpha = L / M        x_h = c_h / sigma^2        s = 1 / sigma^2
    tau_ = 2.5129 sqrt(alpha)  x_ = (1 + tau_)(1 + alpha / tau_)

EVBMF is Nakajima, Sugiyama, Babacan, Tomioka, JMLR 14 (2013); Algorithm 1 and Eq. 2 to 5 are
Hosseini, Tuli, Plataniotis, "Exploiting Explainable Metrics for Augmented SGD", CVPR 2022.

Functions marked "compiled by numba" use only what numba's nopython mode knows. The formulas of the
learning-rate rules stand with the rules, in ``rmsgd.rules``.
"""

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]


def threshold(L: int, M: int) -> tuple[float, float, float]:
    """``(alpha, tau_, x_)`` of an L x M matrix, none of which has a unit. Compiled by numba."""
    alpha = L / M
    tau = 2.5129 * math.sqrt(alpha)
    return alpha, tau, (1.0 + tau) * (1.0 + alpha / tau)


def tau_of(x: Array, alpha: float) -> Array:
    """``tau(x)``, the larger root of ``tau + alpha / tau = x - (1 + alpha)``. Compiled by numba.

    ``x`` is (n,), squared singular values over ``M sigma^2``, without a unit, and so is the result.
    """
    t = x - (1.0 + alpha)
    return 0.5 * (t + np.sqrt(t * t - 4.0 * alpha))


def free_energy(noise_variance: float, c: Array, L: int, M: int) -> float:
    """Omega(sigma^2), up to a constant, for the squared singular values over M, ``c`` (L,)."""
    alpha, _, x_threshold = threshold(L, M)
    x = np.asarray(c, dtype=np.float64) / noise_variance
    above = x > x_threshold
    tau = tau_of(x[above], alpha)
    # The difference of two large numbers is taken exactly: x - tau = 1 + alpha + alpha / tau.
    kept = 1.0 + alpha + alpha / tau + np.log1p(tau) + alpha * np.log1p(tau / alpha)
    return float(x[~above].sum() + L * math.log(noise_variance) + kept.sum())


def slope(k: int, s: float, c: Array, tail: float, L: int, alpha: float) -> tuple[float, float]:
    """``G_k(s) = s dOmega/ds`` with k values above the threshold, and ``dG_k/ds``. Compiled by numba.

    ``c`` is (L,), descending, and ``tail`` the sum of ``c[k:]``, both in squared units of the weight.
    """
    tau = tau_of(c[:k] * s, alpha)
    inverse = (1.0 / tau).sum()
    curvature = (c[:k] / (tau * tau - alpha)).sum()
    return s * tail - (L - k) + alpha * (k + inverse), tail - alpha * curvature


def free_energy_of_rank(k: int, s: float, c: Array, tail: float, L: int, alpha: float) -> float:
    """Omega(1 / s) with the k largest values above the threshold. Compiled by numba.

    ``c`` (L,) and ``tail`` are as in ``slope``. Written with ``x - tau = 1 + alpha + alpha / tau``, so that a
    large value does not cancel.
    """
    tau = tau_of(c[:k] * s, alpha)
    kept = 1.0 + alpha + alpha / tau + np.log1p(tau) + alpha * np.log1p(tau / alpha)
    return float(s * tail - L * math.log(s) + kept.sum())


def minimise_free_energy(c: Array, L: int, M: int) -> tuple[int, float, float]:
    """The global minimum of Omega: ``(rank, noise_variance, free_energy)``. Compiled by numba.

    ``c`` is (L,) float64, ``gamma_h^2 / M`` in descending order, with values that count as zero set to 0.

    Every interval between breakpoints is searched. Where G_k is positive at the right end, its larger root
    is found by Newton's iteration from there. Where it is not, the right end itself is a candidate, since
    Omega steps up behind it. Among candidates within ``1e-12 (1 + |Omega|)`` the smaller rank wins. If fewer
    than ``L / (1 + alpha)`` values are nonzero, sigma^2 is 0 and their number is the rank.
    """
    alpha, _, x_threshold = threshold(L, M)
    tails = np.zeros(L + 1)
    for h in range(L - 1, -1, -1):
        tails[h] = tails[h + 1] + c[h]

    best_rank, best_variance, best_energy = -1, 0.0, math.inf
    for k in range(L):
        if k * (1.0 + alpha) >= L:
            break
        if tails[k] <= 0.0:
            return k, 0.0, -math.inf
        left = x_threshold / c[k - 1] if k > 0 else 0.0
        right = x_threshold / c[k]
        if not right > left:
            continue
        s = right
        value, derivative = slope(k, s, c, tails[k], L, alpha)
        while value > 0.0:
            if derivative <= 0.0:
                s = 0.0
                break
            following = s - value / derivative
            if not following > left:
                s = 0.0
                break
            if not s - following > 1e-15 * s:
                s = following
                break
            s = following
            value, derivative = slope(k, s, c, tails[k], L, alpha)
        if s > 0.0:
            energy = free_energy_of_rank(k, s, c, tails[k], L, alpha)
            if best_rank < 0 or energy < best_energy - 1e-12 * (1.0 + abs(best_energy)):
                best_rank, best_variance, best_energy = k, 1.0 / s, energy
    return best_rank, best_variance, best_energy


def shrink(c: Array, noise_variance: float, L: int, M: int) -> Array:
    """The factors ``d / gamma`` of the kept values ``c`` (rank,). Compiled by numba.

    ``d = gamma/2 [1 - (L+M) sigma^2/gamma^2 + sqrt((1 - (L+M) sigma^2/gamma^2)^2 - 4 L M sigma^4/gamma^4)]``
    """
    y = noise_variance / c
    b = 1.0 - (1.0 + L / M) * y
    return 0.5 * (b + np.sqrt(b * b - 4.0 * (L / M) * y * y))


def low_rank_metrics(d: Array, L: int) -> tuple[float, float, float]:
    """``(stable rank, condition, nuclear)`` of the shrunk values ``d`` (rank,). Compiled by numba.

    Stable rank ``sum d^2 / (L d_1^2)`` (Eq. 2), condition ``1 - d_r / d_1`` (Eq. 3), nuclear
    ``sum d / d_1``, which the released code divides by a channel count. An empty ``d`` gives ``(0, 1, 0)``.
    """
    if len(d) == 0:
        return 0.0, 1.0, 0.0
    ratio = d / d[0]
    return (ratio * ratio).sum() / L, 1.0 - ratio[-1], ratio.sum()


def measure_singular_values(gamma: Array, L: int, M: int) -> tuple[int, float, float, float, float]:
    """EVBMF and metrics of one matrix: rank, noise variance, stable rank, condition, nuclear.

    ``gamma`` is (L,) float64, the singular values in descending order, with those that count as zero set to
    0. Compiled by numba. A single row (L = 1) has no spectrum: its rank is 0 and ``sigma^2 = gamma^2 / M``.
    """
    if L == 1 or gamma[0] == 0.0:
        return 0, gamma[0] * gamma[0] / M, 0.0, 1.0, 0.0
    # A power of two brings the largest value to [1/2, 1): squares neither overflow nor vanish.
    exponent = math.frexp(gamma[0])[1]
    c = np.empty(L)
    for h in range(L):
        scaled = math.ldexp(gamma[h], -exponent)
        c[h] = scaled * scaled / M
    rank, variance, _ = minimise_free_energy(c, L, M)
    kept = c[:rank]
    d = np.sqrt(kept) * shrink(kept, variance, L, M)
    stable_rank, condition, nuclear = low_rank_metrics(d, L)
    unit = math.ldexp(1.0, exponent - 1)
    # The result is infinite where it exceeds a double: math.ldexp would raise, and NumPy would warn.
    return rank, 4.0 * float(variance) * unit * unit, stable_rank, condition, nuclear


def numerical_zero(gamma: Array, L: int, M: int, rounding: float) -> float:
    """The size up to which singular values are zero, from all of them: ``gamma`` (L,), descending, float64.

    An SVD in float64 knows them to within ``M 2^-52 gamma_1``. And rounding turns a weight of low rank into
    one of full rank: errors of up to ``rounding`` times an entry (see ``layers.rounding``), as good as
    independent, have no singular value above

        z = 2 rounding ||W||_F (1 / sqrt(L) + 1 / sqrt(M)),  ||W||_F^2 = sum gamma_h^2

    Where fewer than ``L / (1 + alpha)`` values are above z, the others are zero. Where there are more, the
    weight has noise of its own, and they are values as all others.
    """
    of_svd = M * 2.0**-52 * gamma[0]
    size = gamma[0] * math.sqrt(((gamma / gamma[0]) ** 2).sum()) if gamma[0] > 0.0 else 0.0
    z = 2.0 * rounding * size * (1.0 / math.sqrt(L) + 1.0 / math.sqrt(M))
    is_low_rank = np.count_nonzero(gamma > z) * (1.0 + L / M) < L
    return float(max(z, of_svd) if is_low_rank else of_svd)


def singular_values(matrix: Array, rounding: float = 0.0) -> Array:
    """Singular values of ``matrix`` (m, n), descending, those at or below ``numerical_zero`` set to 0."""
    matrix = np.asarray(matrix, dtype=np.float64)
    largest = np.abs(matrix).max()
    if largest == 0.0:
        return np.zeros(min(matrix.shape))
    exponent = math.frexp(largest)[1]
    gamma = scipy.linalg.svdvals(np.ldexp(matrix, -exponent))
    gamma[gamma <= numerical_zero(gamma, min(matrix.shape), max(matrix.shape), rounding)] = 0.0
    return np.asarray(np.ldexp(gamma, exponent))


def product_error(matrix: Array, vectors: Array, depth: int = 256) -> float:
    """How far rounding in fp32 may move the eigenvalues of what is left of a Gram matrix A A^T.

    ``matrix``: A (L, M); ``vectors``: V (L, k) with orthonormal columns, whose part was taken off. With
    P = 1 - V V^T and the squares e_bi of the rows i within the blocks b of ``depth`` columns, the bound is
    10 u sqrt(|P diag(s) P|_2), s_i = sum_b e_bi sum_j P_jj e_bj, u = 2^-24. The norm is taken as no more than
    the largest s_i of rows with P_ii >= 1/2 and the sum of P_ii s_i of the others.
    """
    left = np.maximum(1.0 - (vectors**2).sum(axis=1), 0.0)
    spread = np.zeros(len(matrix))
    for first in range(0, matrix.shape[1], depth):
        energies = (matrix[:, first : first + depth] ** 2).sum(axis=1)
        spread += energies * (left @ energies)
    taken = left < 0.5
    norm = spread[~taken].max(initial=0.0) + (left * spread)[taken].sum()
    return 10.0 * 2.0**-24 * math.sqrt(norm)


def full_stable_rank(gamma: Array) -> float:
    """``||W||_F^2 / ||W||_2^2``, of all singular values gamma (L,), descending.

    NaN for a weight of zeros, and for one whose norm is beyond float64.
    """
    return float(((gamma / gamma[0]) ** 2).sum()) if 0.0 < gamma[0] < math.inf else math.nan


def log_spectral_norm(gamma: Array) -> float:
    """``log10 ||W||_2^2``, of all singular values gamma (L,), descending; NaN for a weight of zeros."""
    return 2.0 * math.log10(gamma[0]) if gamma[0] > 0.0 else math.nan


def quality(stable_rank: float, condition: float) -> float:
    """Quality of a layer, ``q = arctan(s / kappa)`` in [0, pi/2] (Eq. 4); 0 for an empty low rank."""
    return math.atan2(stable_rank, condition)


def network_quality(qualities: Sequence[float]) -> float:
    """Quality of a network, ``Q = ||q||_2^2 / sqrt(layers)`` (Eq. 5), from its layers' q in rad; NaN without
    layers.
    """
    q = np.asarray(qualities, dtype=np.float64)
    return float((q * q).sum() / math.sqrt(len(q))) if len(q) else math.nan


def hill_alpha(gamma: Array) -> float:
    """The tail exponent of a spectrum: Hill's estimate over the upper half of its eigenvalues ``gamma^2``.

    With N singular values and the n = N - floor(N / 2) largest of them, ``x_min`` the smallest of those,

        alpha = 1 + n / sum_j ln(gamma_j^2 / x_min^2)

    A heavier tail has a smaller alpha. It does not depend on the scale of the matrix. inf where the upper
    half is one value n times, as in an orthogonal matrix. NaN with fewer than three values, or where
    ``x_min`` is 0: half of the spectrum has no tail then.

    This is ``PL_Alpha_Hill`` of Zhou et al., "Temperature Balancing, Layer-wise Weight Analysis, and Neural
    Network Training" (NeurIPS 2023), as their code computes it (its fit "median").

    Args:
        gamma: (N,) singular values, in any order.
    """
    values = np.sort(np.asarray(gamma, dtype=np.float64))
    tail = values[len(values) // 2 :]
    if len(values) < 3 or not tail[0] > 0.0:
        return math.nan
    total = 2.0 * float(np.log(tail / tail[0]).sum())
    return 1.0 + len(tail) / total if total > 0.0 else math.inf


def momentum_update(
    w: Array,
    grad: Array,
    v: Array,
    eta: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    fresh: bool,
    velocity_form: bool,
) -> tuple[Array, Array]:
    """One SGD step with momentum: the new ``(w, v)``. Compiled by numba, where w is one element.

    ``w``, ``grad`` and ``v`` have one shape, and ``eta`` is the rate that is applied: a step moves by rate
    times gradient.

    ``velocity_form`` is Algorithm 1, ``v <- momentum v - (1 - dampening) eta g, w <- w + v``;
    otherwise it is torch's ``v <- momentum v + (1 - dampening) g, w <- w - eta v``. A ``fresh`` v counts
    as zero, and its gradient is not dampened. Without momentum v is left as it is.
    """
    g = (-grad if maximize else grad) + weight_decay * w
    if momentum == 0.0:
        return w - eta * g, v
    damped = g if fresh else (1.0 - dampening) * g
    carried = 0.0 if fresh else momentum * v
    if velocity_form:
        v = carried - eta * damped
        return (w + momentum * v - eta * g if nesterov else w + v), v
    v = carried + damped
    return w - eta * (g + momentum * v if nesterov else v), v
