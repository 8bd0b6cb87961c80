"""Kept shares by layer that do the least damage within a budget: a pure function of what was measured.

Damage D_l and cost C_l of layer l are known at a few shares and run in straight lines between them. On the lower convex hull of
(C_l, D_l) every stretch has a slope, damage saved for cost paid, that falls as the share rises. So taking stretches in the order
of their slopes, over all layers together, is optimal for hulls; the last one taken is cut where the budget ends, and at most one
layer lies between two points of its hull:

    minimise sum_l D_l(r_l)   with   sum_l C_l(r_l) <= budget
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

# Of the budget, for sums of floats that meet it exactly on paper.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Stretch:
    layer: int
    slope: float
    cost: float
    place: int


def solve_shares(shares: list[list[float]], damages: list[list[float]], costs: list[list[float]], budget: float) -> list[float]:
    """The shares of least damage; where more of a layer saves nothing, the budget is not spent on it.

    Args:
        shares: By layer the shares that were looked at, rising.
        damages: By layer the damage at each of them.
        costs: By layer the cost at each of them, rising strictly, in the unit of the budget.
        budget: What all layers together may cost.

    Raises:
        ValueError: If the smallest shares cost more than the budget.
    """
    least = sum(of_layer[0] for of_layer in costs)
    room = budget - least
    if room < -_ROUNDING * abs(budget):
        raise ValueError(f"the smallest shares cost more than the budget; {least:g} > {budget:g}; raise the budget")
    hulls = [_lower_hull(cost, damage) for cost, damage in zip(costs, damages, strict=True)]
    stretches = [
        _Stretch(layer, -_slope(cost, damage, a, b), cost[b] - cost[a], place)
        for layer, (hull, cost, damage) in enumerate(zip(hulls, costs, damages, strict=True))
        for place, (a, b) in enumerate(pairwise(hull))
    ]
    spent = [of_layer[0] for of_layer in costs]
    for stretch in sorted(stretches, key=lambda one: (-one.slope, one.layer, one.place)):
        taken = min(stretch.cost, max(room, 0.0))
        spent[stretch.layer] += taken
        room -= taken
    return [_at(cost, share, amount) for cost, share, amount in zip(costs, shares, spent, strict=True)]


def _lower_hull(costs: list[float], damages: list[float]) -> list[int]:
    """Places of the points of the falling lower convex hull, the cheapest first."""
    hull: list[int] = []
    for place in range(len(costs)):
        # A point is above the line from the last but one to the new one, or on it.
        while len(hull) > 1 and _slope(costs, damages, hull[-2], hull[-1]) >= _slope(costs, damages, hull[-2], place):
            hull.pop()
        hull.append(place)
    while len(hull) > 1 and damages[hull[-1]] >= damages[hull[-2]]:
        hull.pop()
    return hull


def _slope(costs: list[float], damages: list[float], first: int, second: int) -> float:
    return (damages[second] - damages[first]) / (costs[second] - costs[first])


def _at(places: list[float], values: list[float], place: float) -> float:
    """The value at a place, in a straight line between known ones."""
    after = min(max(bisect_right(places, place), 1), len(places) - 1)
    if len(places) == 1:
        return values[0]
    weight = (place - places[after - 1]) / (places[after] - places[after - 1])
    return values[after - 1] + min(max(weight, 0.0), 1.0) * (values[after] - values[after - 1])
