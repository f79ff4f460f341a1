import random
from itertools import permutations

import pytest

from musicrl_hf.collect.reliability import Attention, krippendorff_alpha, passes
from musicrl_hf.collect.rules import Answer

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), part C: four observers, twelve units, values missing
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
PUBLISHED = [[value for value in unit if value is not None] for unit in zip(*OBSERVERS, strict=True)]


def test_alpha_is_the_published_one():
    assert krippendorff_alpha(PUBLISHED) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(PUBLISHED, "interval") == pytest.approx(0.849, abs=5e-4)


def slow_alpha(units, difference):
    """By the definition, over every ordered pair of values, without counting alike ones together."""
    kept = [unit for unit in units if len(unit) > 1]
    values = [value for unit in kept for value in unit]
    within = [(difference(a, b), 1 / (len(unit) - 1)) for unit in kept for a, b in permutations(unit, 2)]
    observed = sum(gap * weight for gap, weight in within) / len(values)
    expected = sum(difference(a, b) for a, b in permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


def test_alpha_equals_its_slow_twin():
    draw = random.Random(0)
    for _ in range(5):
        units = [[draw.randint(1, 5) for _ in range(draw.randint(0, 5))] for _ in range(12)]
        assert krippendorff_alpha(units) == pytest.approx(slow_alpha(units, lambda a, b: a != b))
        assert krippendorff_alpha(units, "interval") == pytest.approx(slow_alpha(units, lambda a, b: (a - b) ** 2))


def test_alpha_is_not_defined_without_anything_to_compare():
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    with pytest.raises(ValueError, match="metric is 'ratio'"):
        krippendorff_alpha([], "ratio")


def test_who_listens_passes():
    choices = {label: Answer(label, 5, 5) for label in ("a", "b", "tie", "both_bad")}
    assert [label for label, answer in choices.items() if passes("broken", False, answer)] == ["a"]
    assert [label for label, answer in choices.items() if passes("broken", True, answer)] == ["b"]
    assert [label for label, answer in choices.items() if passes("identical", True, answer)] == ["tie", "both_bad"]
    assert passes("identical", False, Answer.rated(3, 4, 5, 5))
    assert not passes("identical", False, Answer.rated(2, 4, 5, 5))
    assert Attention().share is None
    assert Attention(3, 1).share == 0.75
