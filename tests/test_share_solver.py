import itertools
import random

import pytest

from lemo_hf.training.phases.share_solver import solve_shares


def problem(seed, layers=3, points=4):
    """Shares, damages that fall less and less, and rising costs."""
    numbers = random.Random(seed)
    shares, damages, costs = [], [], []
    for _ in range(layers):
        steps = sorted(numbers.uniform(0.1, 1) for _ in range(points - 1))
        falls = sorted((numbers.uniform(0, 5) for _ in range(points - 1)), reverse=True)
        paid = [numbers.randint(1, 4)] * (points - 1)
        shares.append(list(itertools.accumulate(steps, initial=0.05)))
        damages.append(list(itertools.accumulate((-fall for fall in falls), initial=20.0)))
        costs.append(list(itertools.accumulate(paid, initial=1.0)))
    return shares, damages, costs


def between(places, values, place):
    """Linear interpolation by torch's own means."""
    for (a, x), (b, y) in itertools.pairwise(zip(places, values, strict=True)):
        if a - 1e-9 <= place <= b + 1e-9:
            return x + (place - a) / (b - a) * (y - x)
    raise AssertionError("outside")


def totals(problem, found):
    shares, damages, costs = problem
    layers = range(len(found))
    return [sum(between(shares[layer], table[layer], found[layer]) for layer in layers) for table in (damages, costs)]


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_measured_shares_is_better(seed):
    given = problem(seed)
    budget = 3 + 2.5 * (seed % 8) + 0.5
    damage, cost = totals(given, solve_shares(*given, budget))
    assert cost <= budget + 1e-9
    most = sum(of_layer[-1] for of_layer in given[2])
    assert cost == pytest.approx(min(budget, most)), "all of it is spent where more always helps"
    choices = itertools.product(range(4), repeat=3)
    affordable = [places for places in choices if sum(given[2][layer][at] for layer, at in enumerate(places)) <= budget]
    best = min(sum(given[1][layer][at] for layer, at in enumerate(places)) for places in affordable)
    assert damage <= best + 1e-9


@pytest.mark.parametrize("budget", [3, 5, 8, 11])
def test_equal_steps_of_cost_give_the_very_best_choice(budget):
    shares, damages, _ = problem(7)
    costs = [[1.0, 2.0, 3.0, 4.0]] * 3
    found = solve_shares(shares, damages, costs, budget)
    places = [of_layer.index(pytest.approx(share)) for of_layer, share in zip(shares, found, strict=True)]
    everything = itertools.product(range(4), repeat=3)
    best = min((sum(damages[layer][at] for layer, at in enumerate(one)), one) for one in everything if sum(one) + 3 <= budget)
    assert tuple(places) == best[1]


def test_a_kink_at_the_start_keeps_the_start():
    tried, damage = [0.25, 0.5, 0.75], [2.0, 1.0, 0.9]
    assert solve_shares([tried] * 2, [damage, [1.8, 1.0, 0.85]], [tried] * 2, 1.0) == [0.5, 0.5]


def test_points_above_the_hull_are_passed_over_and_nothing_is_spent_in_vain():
    tried = [[0.2, 0.4, 0.6], [0.2, 0.4, 0.6]]
    # In the first layer 0.4 is no better than 0.2 but 0.6 is; in the second nothing helps.
    assert solve_shares(tried, [[5.0, 6.0, 1.0], [1.0, 1.0, 2.0]], tried, 1.2) == pytest.approx([0.6, 0.2])


def test_a_budget_below_the_smallest_shares_is_refused():
    with pytest.raises(ValueError, match="the smallest shares cost more than the budget"):
        solve_shares([[0.5, 1.0]], [[1.0, 0.0]], [[0.5, 1.0]], 0.4)
