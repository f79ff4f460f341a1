"""Agreement of listeners, counted by hand; and which rows are votes on one pair."""

import torch

from musicrl_hf.audio import audio_bytes
from musicrl_hf.preferences.agreement import Agreement, PairVote, count_agreement, pair_votes
from musicrl_hf.preferences.schema import preferences_from_rows


def votes(*rows):
    return [PairVote((pair,), clip, who) for pair, clip, who in rows]


def test_every_two_listeners_of_a_pair_are_compared():
    # p: anna and bo agree, anna and cy do not, bo and cy do not; q: alone; r: bo and cy agree.
    rows = [
        ("p", "x", "anna"),
        ("p", "x", "bo"),
        ("p", "y", "cy"),
        ("q", "x", "anna"),
        ("r", "y", "bo"),
        ("r", "y", "cy"),
    ]
    assert count_agreement(votes(*rows)) == Agreement(2 / 4, 2, 4)


def test_nobody_agrees_with_themselves():
    assert count_agreement(votes(("p", "x", "anna"), ("p", "x", "anna"))) == Agreement(None, 0, 0)
    assert count_agreement([]) == Agreement(None, 0, 0)


def test_the_same_two_clips_are_one_pair_on_either_side():
    one, other = (audio_bytes(torch.full((1, 800), level), 8000) for level in (0.1, 0.2))
    row = {"chosen_model": "x", "rejected_model": "y", "source": "test", "created_at": "2026-01-01T00:00:00+00:00"}
    rows = [
        {"prompt": "p", "chosen": one, "rejected": other, "preference": "a", "listener": "anna"},
        {"prompt": "p", "chosen": other, "rejected": one, "preference": "b", "listener": "bo"},
        {"prompt": "p", "chosen": one, "rejected": other, "preference": "tie", "listener": "cy"},
        {"prompt": "q", "chosen": one, "rejected": other, "preference": "a", "listener": "bo"},
    ]
    found = pair_votes(preferences_from_rows(row | own for own in rows))
    assert [vote.listener for vote in found] == ["anna", "bo", "bo"], "a tie chooses nothing"
    assert found[0].pair == found[1].pair != found[2].pair
    assert found[0].choice == found[2].choice != found[1].choice
    assert count_agreement(found) == Agreement(0.0, 1, 1)
