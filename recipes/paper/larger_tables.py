"""The tables of what was made on the larger budget, from results/paper.json."""

from collections.abc import Callable, Sequence
from typing import Any

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
NAMES = {
    "base": "base",
    "r": "R",
    "small_u": "U, 40 steps of 64 clips",
    "small_ru": "RU, 80 steps of 64 clips",
    "r_larger": "R, 80 steps of 256 clips",
    "u": "U, 150 steps",
    "ru_first": "RU, first round, 60 steps",
    "ru_anew": "RU from R, on both rounds' votes, 150 steps",
    "ru2": "RU, second round, 150 steps",
    "ru3": "the same, 20 steps more",
    "ru": "the same, 10 steps more with an entropy bonus",
}
DIVERSITY = {"timbre_distance_db": "timbre", "harmony_distance": "harmony", "distinct_ngrams": "n-grams"}
HEARD = {"instrument": "instrument", "backing": "accompaniment", "tempo_within_8%": "tempo", "key_neighbour": "key"}


def preferred(found: dict[str, Any], table: Table) -> str:
    """Against base, R and the first U; rewards; divergence; diversity as a share of the base's."""
    rates = {(row["a"], row["b"]): row for row in found["win_rates"]}
    base = next(row for row in found["systems"] if row["method"] == "base")
    rows = []
    for row in found["systems"]:
        name = row["method"]
        kept = ", ".join(f"{100 * row[key] / base[key]:.0f}" for key in DIVERSITY)
        scores = [f"{row[key]:.2f}" for key in ("panel_taste", "other_taste")]
        scores += [f"{row[key]:.3f}" for key in ("adherence", "quality")]
        against = [_rate(rates.get((name, other))) for other in ("base", "r", "small_u")]
        rows.append([NAMES[name], *against, f"{row['mean_rating']:.2f}", *scores, f"{row.get('kl', 0):.0f}", kept])
    head = ["", "against base [95 %]", "against R", "against U of 40 steps", "rating", "held-out panel"]
    head += [
        "panel of another taste",
        "adherence",
        "quality",
        "KL (nats)",
        f"{', '.join(DIVERSITY.values())}, % of base",
    ]
    return table(head, rows)


def _rate(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['win_rate']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def judged(found: dict[str, Any], table: Table) -> str:
    """What the recipe's judges heard of the same systems."""
    heard = found["judged"]["seeds"]["0"]
    rows = [
        [
            NAMES[name],
            *(f"{100 * heard[name][key]['share']:.0f} %" for key in HEARD),
            ", ".join(str(heard[name]["faulty_clips"][fault]) for fault in ("silent", "clipped", "stuck")),
            f"{heard[name]['frechet_distance']:.0f}",
            *(f"{heard[name][panel]:.2f}" for panel in ("panel_taste", "other_taste")),
        ]
        for name in NAMES
        if name in heard
    ]
    head = [
        "",
        *HEARD.values(),
        "silent, clipped, stuck",
        "Frechet distance",
        "held-out panel",
        "panel of another taste",
    ]
    return table(head, rows)


def sections(found: dict[str, Any], table: Table) -> list[str]:
    """What results/README.md says of the larger budget."""
    rewards, right = found["rewards"], {name: f"{row['accuracy']:.1%}" for name, row in found["rewards"].items()}
    first = rewards["reward"]
    parts = [
        "## On a larger budget",
        "2,048 prompts in place of 128 (`recipes/paper/many_prompts.py`, none of them among the held-out ones), four pairs of each and three "
        "votes a pair; steps of 256 clips, eight of a prompt, in place of 64 and, as the small budget had then, four; a nat of KL at .01 to .02, and beside every preference reward "
        "`variety` at .2 to .35, the distance of a prompt's clips from each other (`recipes/paper/larger.py` has each run's). One seed of everything. The first "
        f"reward is right in {right['reward']} of {first['n_votes']:,} votes on held-out prompts (the panel's own taste in "
        f"{first['baselines']['panel_taste']['accuracy']:.1%}), one that hears rhythm too in {right['reward_rhythm']} of the same. The first RU learned from the "
        f"former; its own clips were voted on, and from all votes two rewards with rhythm were learned, right in {right['reward_2']} of "
        f"{rewards['reward_2']['n_votes']:,} votes and {right['reward_2_seed1']} of {rewards['reward_2_seed1']['n_votes']:,}: what follows has half of each. All "
        "are compared in one evaluation on the bundled held-out prompts; R and the small U and RU are the first seed's, in half precision. What ships as "
        "`musicrl-tiny-ru` goes on from the last of them: [guidance in the weights](FINDINGS.md#guidance-in-the-weights).",
        *([found["note"]] if "note" in found else []),
        preferred(found, table),
    ]
    if found["judged"]:
        parts += [
            f"The judges ({found['judged']['prompts']} held-out prompts, guidance 1) were trained anew for this, so that their figures are "
            "to be compared with each other, not with those above.",
            judged(found, table),
        ]
    return parts
