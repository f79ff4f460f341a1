"""How far listeners agree, and who was attentive."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .rules import Answer

_METRICS: Mapping[str, Callable] = {
    "nominal": lambda one, other: float(one != other),
    "interval": lambda one, other: float(one - other) ** 2,
}


def krippendorff_alpha(units: Iterable[Sequence[Hashable]], metric: str = "nominal") -> float | None:
    """Krippendorff's alpha: 1 where all agree, 0 where they agree as chance would have it.

    alpha = 1 - D_o / D_e, with the observed disagreement D_o within units and the expected one D_e over all values that
    can be paired (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011). Values may be missing.

    Args:
        units: for each unit, a pair of clips here, the values that its listeners gave, in any order.
        metric: "nominal" for choices, "interval" for ratings.

    Returns:
        None where it is not defined: no unit has two values, or all values are the same.

    Example:
        >>> krippendorff_alpha([["a", "a"], ["b", "b"], ["a", "b"]])
        0.4444444444444444
    """
    if metric not in _METRICS:
        raise ValueError(f"metric is {metric!r}: use one of {', '.join(_METRICS)}")
    difference = _METRICS[metric]
    counted = [Counter(values) for values in units]
    counted = [counts for counts in counted if counts.total() > 1]
    totals = sum(counted, Counter())
    n = totals.total()
    if len(totals) < 2:
        return None

    def disagreement(counts: Counter) -> float:
        """Sum over ordered pairs of values; a value is never paired with itself."""
        return sum(counts[one] * counts[other] * difference(one, other) for one in counts for other in counts)

    observed = sum(disagreement(counts) / (counts.total() - 1) for counts in counted) / n
    expected = disagreement(totals) / (n * (n - 1))
    return 1 - observed / expected


@dataclass(frozen=True)
class Attention:
    """How a listener did in the checks."""

    passed: int = 0
    failed: int = 0

    @property
    def share(self) -> float | None:
        """Of the checks that were passed; None where there was none."""
        total = self.passed + self.failed
        return self.passed / total if total else None


def passes(kind: str, swapped: bool, answer: Answer) -> bool:
    """Whether an answer to a check of attention is one that somebody gives who listened.

    Identical clips are no better than each other (ratings may differ by one); of an intact clip, which is the pair's
    first, and noise, the intact one is.
    """
    if kind == "broken":
        return answer.preference == ("b" if swapped else "a")
    if answer.score_a is not None and answer.score_b is not None:
        return abs(answer.score_a - answer.score_b) <= 1
    return answer.preference in ("tie", "both_bad")
