"""How far a mean or a share may be off, and what several tests say together."""

import math
from collections.abc import Sequence
from statistics import NormalDist

EXACT_FREEDOM = 100
"""up to so many degrees of freedom quantiles are exact"""


def t_tail(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t with so many degrees of freedom: the finite sums of Abramowitz and Stegun,
    26.7.3 and 26.7.4."""
    theta = math.atan(abs(t) / math.sqrt(freedom))
    square, odd = math.cos(theta) ** 2, freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for step in range(1, freedom // 2 + 1):
        total += term
        term *= square * (2 * step / (2 * step + 1) if odd else (2 * step - 1) / (2 * step))
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return max(0.0, 1 - inside)


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """Two-sided quantile of Student's t: |T| is below it with probability `level`.

    Beyond `EXACT_FREEDOM` Cornish and Fisher's expansion (A&S 26.7.5), right to eight digits there.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    guess = sum(term / freedom**power for power, term in enumerate(terms))
    if freedom > EXACT_FREEDOM:
        return guess
    low, high = 0.0, 2 * guess
    while t_tail(high, freedom) > 1 - level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (95 % by default): it holds near 0 and 1 too."""
    share, square = successes / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that all of those below 0.05 are right together with 95 %.

    Holm, "A simple sequentially rejective multiple test procedure" (1979): the smallest is multiplied by the
    number of tests, the next one by one less, and so on; none falls below a smaller one's.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted
