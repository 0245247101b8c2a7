import tracemalloc

import numpy as np
import pytest

from ant5m.data.order import BLOCK, LARGEST_PERMUTATION, Order


def epoch(order, number=0):
    return order.at(np.arange(number * order.count, (number + 1) * order.count)).tolist()


@pytest.mark.parametrize("name", ["permutation", "feistel"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 97, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 20_011])
def test_each_once_an_epoch(name, count):
    order = Order(count, [3], name)
    epochs = [epoch(order, number) for number in range(3)]
    assert all(sorted(numbers) == list(range(count)) for numbers in epochs)
    if count > 50:
        assert (
            len({tuple(numbers) for numbers in (*epochs, range(count), epoch(Order(count, [4], name)))}) == 5
        )


@pytest.mark.parametrize("name", ["permutation", "feistel"])
def test_any_places_in_any_grouping_give_the_same(name):
    order = Order(9_001, [7], name)
    whole = order.at(np.arange(3 * 9_001))
    places = np.random.default_rng(0).integers(0, 3 * 9_001, (50, 9))
    assert (Order(9_001, [7], name).at(places) == whole[places]).all()
    assert (order.at(places.ravel()[::-1].copy()) == whole[places.ravel()[::-1]]).all()


def test_the_orders_of_runs_that_exist_stay():
    """NumPy's permutation as in the checkpoints of ant5m 0.1.0, and the Feistel network since."""
    assert epoch(Order(29, [3]), 1) == np.random.default_rng([3, 1]).permutation(29).tolist()
    assert Order(LARGEST_PERMUTATION, [0]).name == "permutation"
    assert Order(LARGEST_PERMUTATION + 1, [0]).name == "feistel"
    far = Order(10**9, [1]).at(np.array([0, 10**9 - 1, 10**9, 5 * 10**9 + 7]))
    assert far.tolist() == [195742732, 853227285, 541266909, 360923180]


def test_the_network_mixes():
    """Order, neighbors and epochs do not tell anything about each other, within 4.5 standard deviations."""
    count = 100_003
    order = Order(count, [5], "feistel")
    first, second = (np.array(epoch(order, number)) for number in range(2))
    pairs = [(first, np.arange(count)), (first[1:], first[:-1]), (first, second)]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / count**0.5
    for values, bins in ((first[:5_000], 100), (np.diff(first) % count, 100)):
        found = np.histogram(values, bins, (0, count))[0]
        expected = len(values) / bins
        assert ((found - expected) ** 2 / expected).sum() < bins + 4.5 * (2 * bins) ** 0.5


def test_memory_does_not_grow_with_the_number_of_sequences():
    tracemalloc.start()
    order = Order(10**9, [1])
    order.at(np.random.default_rng(0).integers(0, 10**10, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
