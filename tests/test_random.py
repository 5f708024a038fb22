"""The dice: numbers that belong to their address, and tokens drawn with them."""

import numpy as np
import pytest
import torch

from sample import DEPTHS, HELD_OUT, RESPONSES, draw, uniforms
from tests.chance import assert_frequencies, splitmix


def test_uniforms_are_a_function_of_their_address_alone():
    """A row's sample would change with the batch around it, and no run could be repeated."""
    whole = uniforms((7, 11), np.arange(40)[:, None], np.arange(30), 4)
    assert whole.shape == (40, 30, 4) and whole.dtype == torch.float64
    for row, position, i in ((0, 0, 0), (39, 29, 3), (17, 3, 1)):
        assert float(whole[row, position, i]) == splitmix(7, 11, row, position, i)
    assert torch.equal(uniforms((7, 11), [17, 3], [3, 5], 2), torch.stack([whole[17, 3, :2], whole[3, 5, :2]]))
    assert torch.equal(uniforms((7, 11), torch.tensor([17]), torch.tensor([3]), 4), whole[17, 3][None])
    assert (RESPONSES, DEPTHS, HELD_OUT) == (0, 1, 2)  # other numbers, and no recorded run could be repeated


def test_uniforms_differ_in_every_part_of_their_address():
    """A part that is dropped, or parts that can swap, would give two samples the same dice."""
    addresses = [(s, t, r, p) for s in (0, 1, 2) for t in (0, 1, 2) for r in (0, 1, 2, 64) for p in (0, 1, 2, 64)]
    drawn = [u for s, t, r, p in addresses for u in uniforms((s, t), r, p, 3).tolist()]
    assert len(set(drawn)) == len(drawn) == 3 * len(addresses)
    assert float(uniforms((0,), 0, 0, 1)) != float(uniforms((0, 0), 0, 0, 1))


@pytest.mark.parametrize("axis", range(5))
def test_uniforms_are_uniform_and_neighbours_independent_along_each_part(axis):
    """Biased or correlated dice bias every estimate quietly.

    Kolmogorov-Smirnov on 50,000 numbers, limit 2.7 / sqrt(n): false alarm 2 exp(-2 * 2.7^2), one seed in a million;
    and Pearson's test of neighbouring pairs on a 16 x 16 grid.
    """
    n = 50_000
    if axis < 2:
        u = np.array([float(uniforms([(i, 5), (5, i)][axis], 3, 9, 1)) for i in range(n // 10)])
    else:
        u = [uniforms((5, 6), np.arange(n), 9, 1)[:, 0], uniforms((5, 6), 3, np.arange(n), 1)[:, 0],
             uniforms((5, 6), 3, 9, n)][axis - 2].numpy()
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    ordered = np.sort(u)
    distance = max((np.arange(1, n + 1) / n - ordered).max(), (ordered - np.arange(n) / n).max())
    assert distance * n**0.5 < 2.7
    pairs = np.zeros((16, 16))
    np.add.at(pairs, ((u[0::2] * 16).astype(int), (u[1::2] * 16).astype(int)), 1)
    assert_frequencies(pairs, np.full((16, 16), 1 / 256))


def test_draw_inverts_the_cumulative_distribution():
    """Each token owns an interval as long as its probability; one of probability 0 owns none, not even at u = 0."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(p.log().expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]


def test_rare_tokens_are_drawn_from_sums_that_do_not_swallow_them():
    """In float32, behind half of the probability, tokens below 2^-25 own no interval, and tails are never sampled."""
    p = torch.tensor([0.5, 2.0**-26, 2.0**-26, 0.5 - 2.0**-25])
    u = 0.5 + torch.tensor([-1, 1, 3, 5], dtype=torch.float64) * 2.0**-27
    assert draw(p.log().expand(4, -1), u).tolist() == [0, 1, 2, 3]
