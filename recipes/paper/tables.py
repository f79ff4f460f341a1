"""Tables and plots of results/paper.json, from that file alone: results/README.md, results/*.svg, and tables of README.md and FINDINGS.md.

python recipes/paper/tables.py
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import curve_tables
import guided_tables
import larger_tables

from musicrl_hf.audio import atomic_path

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"base": "base", "r": "R", "u": "U", "ru": "RU", "ru2": "RU, second round"}
REWARDS = {
    "adherence": "adherence",
    "quality": "quality",
    "preference": "learned preference",
    "preference2": "preference, second round",
    "panel_taste": "held-out panel",
    "other_taste": "panel of another taste",
}
METHODS = {
    "ppo": "PPO",
    "reinforce": "REINFORCE (the paper's objective)",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dpo": "DPO on the votes",
    "dpo_iterated_2": "DPO, two rounds on pairs that the reward labels",
    "one": "PPO without KL, at twice the rate, to its end",
    "ru": "RU",
    "ru_voters": "RU on the voters' own taste",
    "ru_longer": "RU, twice the steps",
    "ru_voters_longer": "both",
}
JUDGED = {
    "instrument": "instrument",
    "backing": "accompaniment",
    "tempo_within_8%": "tempo within 8 %",
    "key_neighbour": "key or neighbour",
}

INTERVALS = "Intervals come from prompts drawn anew, and say nothing of how far training seeds differ: each one's figure stands beside them."
_SAME = 0.05  # adherence: more than between two draws of the base's clips, less than between two adherence models
PANELS = ("panel_taste", "other_taste")  # simulated, of listeners who take no part in a run


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}".replace("%", " %")


def win_rates(found: dict[str, Any]) -> str:
    rows = []
    for row in found["win_rates"]:
        rows.append(
            [
                f"{NAMES[row['a']]} against {NAMES[row['b']]}",
                f"**{percent(row['win_rate'])}** [{100 * row['low']:.0f}, {100 * row['high']:.0f}]",
                f"{row['wins']} / {row['ties']} / {row['losses']}",
                ", ".join(percent(value) for value in row["by_seed"]),
                "< .0001" if row["wilcoxon_p"] < 1e-4 else f"{row['wilcoxon_p']:.2g}",
                "" if row["paper"] is None else f"{row['paper']:g} %",
            ]
        )
    return table(["", "win rate [95 %]", "won / tied / lost", "by seed", "Wilcoxon p", "MusicRL (people)"], rows)


def opinion_scores(found: dict[str, Any]) -> str:
    rows = [
        [
            NAMES[row["model"]],
            f"**{row['mean']:.2f}** [{row['low']:.2f}, {row['high']:.2f}]",
            ", ".join(f"{value:.2f}" for value in row["by_seed"]),
            "" if row["paper"] is None else f"{row['paper']:.2f}",
        ]
        for row in found["mos"]
    ]
    return table(["", "mean rating, 1 to 5 [95 %]", "by seed", "MusicRL (people)"], rows)


def systems(found: dict[str, Any]) -> str:
    keys = [key for key in REWARDS if any(key in row for row in found["systems"].values())]
    base = found["systems"]["base"]
    rows = [
        [
            NAMES[name],
            f"{row['kl']:.1f}",
            *(f"{row[key]:.3f}" if key in row else "" for key in keys),
            *(percent(row[key] / base[key]) for key in ("timbre_distance_db", "harmony_distance", "distinct_ngrams")),
        ]
        for name, row in found["systems"].items()
    ]
    kept = ["timbre kept apart", "harmony kept apart", "n-grams kept distinct"]
    return table(["", "KL to the base (nats a clip)", *(REWARDS[key] for key in keys), *kept], rows)


def methods(systems: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in systems:
        rate = (
            f"{percent(row['win_rate'])} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" if "win_rate" in row else ""
        )
        rows.append(
            [
                METHODS.get(row["method"], row["method"]),
                rate,
                f"{row['mean_rating']:.2f}",
                *(f"{row[key]:.3f}" if key in row else "" for key in ("preference", *PANELS, "adherence", "quality")),
                f"{row['kl']:.1f}" if "kl" in row else "",
                kept_of(systems[0], row),
                f"{row['seconds'] / 60:.0f}" if "seconds" in row else "",
                str(row.get("peak_memory_mb", "")),
            ]
        )
    head = [
        "method",
        "win rate against the base",
        "rating",
        *(REWARDS[key] for key in ("preference", *PANELS)),
        "adherence",
        "quality",
    ]
    return table([*head, "KL (nats)", "timbre, harmony, n-grams kept", "minutes", "peak MB"], rows)


def kept_of(base: dict[str, Any], row: dict[str, Any]) -> str:
    """How far apart a prompt's clips stay, in timbre and in harmony, and how many n-grams of codes are distinct: in % of the base's."""
    kept = (100 * row[key] / base[key] for key in ("timbre_distance_db", "harmony_distance", "distinct_ngrams"))
    return "" if row is base else f"{', '.join(f'{share:.0f}' for share in kept)} %"


def rewards(found: dict[str, Any]) -> str:
    def line(name: str, row: dict[str, Any]) -> list[str]:
        low, high = row["chance_interval"]
        agreement, by_models = row["judged_by"]["agreement"], row["by_models"]
        others = ", ".join(
            f"{REWARDS.get(other, other)} {percent(value['accuracy'])}"
            for other, value in row.get("baselines", {}).items()
        )
        return [
            name,
            percent(row["accuracy"]),
            f"{100 * low:.0f} to {100 * high:.0f} %",
            f"{row['n_votes']} on {row['n_pairs']}",
            percent(agreement),
            percent(row["accuracy"] / agreement),
            ", ".join(
                f"{models.partition(' / ')[0]} {percent(part['accuracy'])}" for models, part in by_models.items()
            ),
            others,
            f"{row['calibration']['ece']:.3f}",
        ]

    rows = [line(f"seed {name}", row) for name, row in found["rewards"]["by_seed"].items()]
    rows += [line(name.replace("_", " "), row) for name, row in found["rewards"]["ablations"].items()]
    head = ["preference reward", "right on held-out prompts", "a coin", "votes on pairs", "two listeners agree"]
    return table([*head, "share of that", "right on clips of", "the higher one wins", "calibration error"], rows)


def judged(found: dict[str, Any]) -> str:
    rows = []
    for seed, heard in found["judged"].get("seeds", {}).items():
        for name, row in heard.items():
            shares = [percent(row[key]["share"]) if row[key] else "" for key in JUDGED]
            faults = ", ".join(str(row["faulty_clips"][fault]) for fault in ("silent", "clipped", "stuck"))
            panels = [f"{row[panel]:.2f}" if panel in row else "" for panel in PANELS]
            rows.append([NAMES[name], seed, *shares, faults, f"{row['frechet_distance']:.0f}", *panels])
    panels = [REWARDS[panel] for panel in PANELS]
    return table(["", "seed", *JUDGED.values(), "silent, clipped, stuck", "Frechet distance", *panels], rows)


def judged_ranges(found: dict[str, Any]) -> str:
    """The same in one row a system: the mean over the seeds and, where they differ, the lowest and the highest."""
    parts = {label: lambda row, key=key: 100 * row[key]["share"] for key, label in JUDGED.items()}
    parts |= {
        "stuck on one note": lambda row: row["faulty_clips"]["stuck"],
        "Frechet distance": lambda row: row["frechet_distance"],
    }
    parts |= {REWARDS[panel]: lambda row, panel=panel: row[panel] for panel in PANELS}
    seeds = list(found["judged"]["seeds"].values())
    rows = []
    for name in [name for name in NAMES if all(name in heard for heard in seeds)]:
        cells = [NAMES[name]]
        for label, part in parts.items():
            values = [part(heard[name]) for heard in seeds]
            digits, unit = (2, "") if "panel" in label else (0, " %" if label in JUDGED.values() else "")
            mean, low, high = (f"{v:.{digits}f}" for v in (sum(values) / len(values), min(values), max(values)))
            cells.append(f"**{mean}**{unit}" + (f" [{low}, {high}]" if low != high else ""))
        rows.append(cells)
    return table(["", *parts], rows)


def summary(found: dict[str, Any]) -> str:
    """What README.md shows."""
    seeds = len(found["seeds"])
    note = (
        f"{seeds} training seed{'' if seeds == 1 else 's'} of `musicrl align --recipe {' and '.join(found['recipes'])}`, listeners "
        f"{found['listeners']}: **simulated**, nobody listened. Win rates leave ties out. "
        f"{INTERVALS} MusicRL's figures are people's opinions of another model: they stand there for their order, not to be compared. "
        "More of what was measured: [results/README.md](results/README.md)."
    )
    return "\n\n".join([win_rates(found), opinion_scores(found), note])


def of_other_votes(rewards: dict[str, Any]) -> list[str]:
    """A sentence where the rows without a seed were learned from other votes than the first seed's there."""
    noted = [
        f"{name.replace('_', ' ').capitalize()}: {row['note']}"
        for name, row in rewards["ablations"].items()
        if "note" in row
    ]
    votes, others = rewards["by_seed"]["0"]["n_votes"], {row["n_votes"] for row in rewards["ablations"].values()}
    if votes in others or not others:
        return noted
    return [
        *noted,
        "The rows without a seed are of the first seed's votes on clips through the codec's decoder before the one that ships.",
    ]


def made_before(found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence where a part was gathered from runs on other models than the loop's, told by what the base has in adherence."""
    here, there = (rows[0] if rows else found["systems"]["base"])["adherence"], found["systems"]["base"]["adherence"]
    if abs(here - there) < _SAME:
        return []
    return [
        "These runs are of the adherence and quality models, and of the codec's decoder, before those of the tables above: in adherence the "
        f"base has {here:.3f} here and {there:.3f} there."
    ]


def page(found: dict[str, Any], plots: Sequence[str]) -> str:
    """What results/README.md shows."""
    parts = [
        "# Results",
        "Made by `python recipes/paper/tables.py` from [paper.json](paper.json), which `make paper` writes. All listeners are "
        f"**simulated** ({found['listeners']}): nobody listened.",
        "## Which is preferred",
        win_rates(found),
        INTERVALS,
        opinion_scores(found),
        "## Every reward, trained on or not, and diversity as a share of the base's",
        systems(found),
        "## The learned rewards",
        rewards(found),
        *of_other_votes(found["rewards"]),
    ]
    if found["methods"]:
        parts += [
            "## Other ways to tune, on the same reward and as many sampled clips",
            "The first seed's preference reward alone, without variety, and 2,560 clips, four of a prompt. DPO on the votes has neither, but "
            "the 1,536 pairs that were voted on; the best of 4 trains nothing, and samples four clips for each that it plays.",
            *made_before(found, found["methods"]),
            methods(found["methods"]),
        ]
    if found["judged"]:
        parts += [
            f"## Independent judges ({found['judged']['prompts']} held-out prompts, guidance 1)",
            "What no reward heard: the judges of instrument, tempo and key, and simulated listeners who took part in no run; means over the "
            "seeds, lowest and highest; then each seed's.",
            judged_ranges(found),
            judged(found),
        ]
    if found["curves"]:
        images = "\n\n".join(f"![{name}]({name})" for name in plots)
        read_off = "Both runs went to their end: what each guard would have left of them is read off their evaluations."
        before = made_before(found, found["reach"])
        parts += ["## Too far", *before, images, read_off, curve_tables.guards(found, REWARDS, table)]
    if found["reach"]:
        parts += [
            "## How far these listeners can be moved",
            "The long run on one reward at its end, and of the base's clips those that the held-out panel itself scores highest: nobody "
            "trains on the panel, so this is no method, but what choosing can bring. And those that R's two rewards score highest.",
            *made_before(found, found["reach"]),
            methods(found["reach"]),
        ]
    if found.get("limits"):
        parts += [
            "## What holds RU back",
            "RU of the first seed on the very taste that its voters voted by, without noise, in place of the reward that was learned from "
            "their votes (.3 adherence and .2 variety beside either); and either for twice the steps, with a nat of KL at half the price. Nobody "
            "has such a reward: it shows what is left to learn, and what is left to tune. Votes, R and RU are of the same seed and recipe as "
            "above, made anew on another processor, which rounds otherwise: clips and votes are others from the first ones on.",
            *made_before(found, found["limits"]),
            methods(found["limits"]),
        ]
    if found.get("larger"):
        parts += larger_tables.sections(found["larger"], table)
    return "\n\n".join(parts) + "\n"


def shown(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Tables of texts that somebody wrote: of each text by its path, each table by its name there."""
    readme, findings = {"summary": summary(found)}, {}
    if guided := found.get("guided"):
        readme["shipped"] = guided_tables.shipped(guided, table)
        findings = {"as played": guided_tables.as_played(guided, table), "guided": guided_tables.tried(guided, table)}
    return {"README.md": readme, "results/FINDINGS.md": findings}


def filled(text: str, name: str, what: str) -> str:
    """`text` with `what` between the marks of that name.

    Raises:
        ValueError: the text has not just one place of that name.
    """
    begin, end = (f"<!-- {colon[0]}from results/paper.json, {name}{colon[1]} -->" for colon in (("", ":"), (":", "")))
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(end) < text.index(begin):
        raise ValueError(f"`text` must have {begin!r} once and {end!r} behind it once.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{what}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and results/")
    root = parser.parse_args().root
    found = json.loads((root / "results" / "paper.json").read_text())
    plots = curve_tables.draw_curves(found, REWARDS, root / "results")
    texts = {"results/README.md": page(found, plots)}
    for path, tables in shown(found).items():
        texts[path] = (root / path).read_text(encoding="utf-8")
        for name, what in tables.items():
            texts[path] = filled(texts[path], name, what)
    for path, text in texts.items():
        with atomic_path(root / path) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
