"""The rules of a collection, answers and typed prompts."""

import pytest

from musicrl_hf.collect.rules import Answer, Rules, clean_prompt


def test_ratings_give_the_preference():
    assert [Answer.rated(a, b, 1, 1).preference for a, b in ((4, 2), (2, 4), (3, 3))] == ["a", "b", "tie"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (("c", 1, 1), "preference is 'c'"),
        (("a", -1, 1), "seconds_a is -1"),
        (("a", 1, float("nan")), "seconds_b is nan"),
        (("a", 1, 1, 6, 1), "rate both from 1 to 5"),
        (("a", 1, 1, 3, None), "rate both from 1 to 5"),
    ],
)
def test_answers_that_are_none_are_refused(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        Answer(*values)


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ({"licence": "mine"}, "`licence` is 'mine'"),
        ({"raters": 0}, "`raters` is 0"),
        ({"min_seconds": 31}, "`min_seconds` is 31"),
        ({"deal_hours": 0}, "`deal_hours` is 0"),
        ({"votes_per_minute": 0}, "`votes_per_minute` is 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, complaint):
    with pytest.raises(ValueError, match=complaint):
        Rules(**rules)


def test_typed_prompts_are_cleaned_and_limited():
    assert clean_prompt("  slow\n\n<b>air</b>\x00 ", 300) == "slow <b>air</b>"  # the page escapes what it shows
    for prompt, complaint in (
        ("", "in words"),
        (" \n\x07", "in words"),
        ("!!!", "in words"),
        ("a" * 301, "at most 300"),
    ):
        with pytest.raises(ValueError, match=complaint):
            clean_prompt(prompt, 300)
