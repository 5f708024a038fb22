"""The dice anew, in Python integers, and a test of counts against probabilities."""

import numpy as np

Z_MILLION = 4.7534  # the normal quantile that chance exceeds once in a million times


def splitmix(*address) -> float:
    """uniforms() of one address."""
    key, whole = 0, 2**64 - 1
    for part in address:
        x = ((key ^ (part & whole)) + 0x9E3779B97F4A7C15) & whole
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        key = x ^ (x >> 31)
    return (key >> 11) / 2**53


def chi_square_limit(cells: int) -> float:
    """What a chi-square of cells - 1 degrees of freedom exceeds once in a million seeds (Wilson and Hilferty 1931)."""
    df = cells - 1
    return df * (1 - 2 / (9 * df) + Z_MILLION * (2 / (9 * df)) ** 0.5) ** 3


def assert_frequencies(counts, p) -> None:
    """Pearson's test of counts against probabilities, rare cells pooled; false alarm: one seed in a million."""
    counts, p = np.asarray(counts, float).ravel(), np.asarray(p, float).ravel()
    n = counts.sum()
    assert abs(p.sum() - 1) < 1e-9
    order = np.argsort(p)
    pooled = int((p[order].cumsum() * n < 8).sum()) + 1  # the rarest cells, until together they are not rare
    counts, p = (np.append(x[order][pooled:], x[order][:pooled].sum()) for x in (counts, p))
    assert len(p) > 2
    assert (((counts - n * p) ** 2) / (n * p)).sum() < chi_square_limit(len(p))
