"""The tables of guidance in the weights and of what ships as musicrl-tiny-ru, from results/paper.json."""

from collections.abc import Sequence
from typing import Any

from larger_tables import DIVERSITY, HEARD, Table

SHIPPED = {
    "base": "base",
    "r": "R: `musicrl-tiny-r`",
    "u": "U: `musicrl-tiny-u`, of the small budget",
    "ru_before": "RU, without guidance in its weights",
    "ru": "RU: **`musicrl-tiny-ru`**",
}
TRIED = {
    "base": "base",
    "distilled": "guidance distilled",
    "ru_before": "RU of the larger budget",
    "ru_whole": "with all of what is distilled",
    "ru_last": "165 steps on from there, in three rounds",
    "ru_one": "on more votes, another seed: 50 steps at .5, .3, variety .2, entropy .001 a nat, 30 at .6, .25, .15",
    "ru_two": "the same, a third seed",
    "ru_shares": "half of what each of the three learned, added up",
    "ru": "and three quarters of 40 steps from there, at .5, .26, variety .24, entropy .002 a nat: what ships",
}
PLAYED = {name: f"`musicrl-tiny-{name}`" for name in ("r", "u")} | {"ru": "`musicrl-tiny-ru` at 3"}
OWN = "`musicrl-tiny-ru` at its own guidance, 1, the others at 3"
PEOPLE = {"U": ("74 %", "54 %", "", "3.54"), "RU": ("87 %", "66 %", "62 %", "3.82")}  # Cideron et al. 2024, section 5.2


def _rates(found: dict[str, Any], interval: bool = True) -> dict[tuple[str, str], str]:
    """Each win rate of an evaluation, as it is shown."""
    shown = {}
    for row in found["win_rates"]:
        text = f"{100 * row['win_rate']:.0f} %"
        shown[row["a"], row["b"]] = text + (f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" if interval else "")
    return shown


def _kept(row: dict[str, float], base: dict[str, float], measures: Sequence[str] = tuple(DIVERSITY)) -> str:
    return ", ".join(f"{100 * row[key] / base[key]:.0f}" for key in measures) + " %"


class _Judges:
    """What judges heard of each system, in cells; empty ones where they were not asked."""

    def __init__(self, judged: dict[str, Any]):
        self.heard = judged.get("seeds", {}).get("0", {})
        self.head = [*HEARD.values(), f"stuck, of {judged['clips']}" if judged else "stuck"]

    def cells(self, name: str, frechet: bool = False) -> list[str]:
        """Shares, clips that stick to a note, and if wanted the Frechet distance."""
        if (row := self.heard.get(name)) is None:
            return [""] * (len(self.head) + frechet)
        found = [*(f"{100 * row[key]['share']:.0f} %" for key in HEARD), str(row["faulty_clips"]["stuck"])]
        return [*found, f"{row['frechet_distance']:.0f}"] if frechet else found


def _short(value: float, digits: int) -> str:
    """-.05 for -0.05."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def shipped(found: dict[str, Any], table: Table) -> str:
    """Base, R, U and RU as they ship, and people's opinions of MusicRL's."""
    systems = {row["method"]: row for row in found["systems"]}
    rates, judges, base = _rates(found), _Judges(found["judged"]), systems["base"]
    rows = []
    for name, label in SHIPPED.items():
        row, against = systems[name], [rates.get((name, other), "") for other in ("base", "r", "u")]
        if name == "ru":
            against = [f"**{text}**" for text in against]
        spent = ["", ""] if name == "base" else [f"{row['kl']:.0f}", _kept(row, base)]
        cells = [f"{row['mean_rating']:.2f}", _short(row["adherence"], 3), *judges.cells(name)]
        rows.append([label, *against, *cells, *spent])
    for name, figures in PEOPLE.items():
        cells = [f"*{text}*" if text else "" for text in figures]
        rows.append([f"*MusicRL's {name}, people*", *cells, *[""] * (len(rows[0]) - 1 - len(cells))])
    head = ["", "against the base", "against R", "against U", "rating, 1 to 5", "adherence", *judges.head]
    return table([*head, "KL (nats)", f"{', '.join(DIVERSITY.values())} kept"], rows)


def as_played(found: dict[str, Any], table: Table) -> str:
    """The bundled generators at guidance 3, and RU at its own beside them."""
    at_3, measures = found["at_3"], ("harmony_distance", "distinct_ngrams")
    judges, base = _Judges(found["judged_at_3"]), at_3["systems"]["base"]
    rows = [["base", "", "", "", *judges.cells("base", frechet=True), ""]]

    def line(label: str, name: str, evaluation: dict[str, Any], judges: _Judges) -> None:
        rates = _rates(evaluation)
        against = [rates.get((name, other), "") for other in ("base", "r", "u")]
        kept = _kept(evaluation["systems"][name], base, measures)
        rows.append([label, *against, *judges.cells(name, frechet=True), kept])

    for name, label in PLAYED.items():
        line(label, name, at_3, judges)
    line(OWN, "ru", found["as_played"], _Judges(found["judged"]))
    head = ["as played", "against the base", "against R", "against U", *judges.head, "Frechet distance"]
    return table([*head, f"{', '.join(DIVERSITY[key] for key in measures)} kept"], rows)


def tried(found: dict[str, Any], table: Table) -> str:
    """RU on its way to what ships, and guidance alone."""
    systems = {row["method"]: row for row in found["systems"]}
    rates, plain, judges = _rates(found), _rates(found, interval=False), _Judges(found["judged"])
    rows = []
    for name, label in TRIED.items():
        row = systems[name]
        against = [rates.get((name, "base"), ""), plain.get((name, "r"), ""), plain.get((name, "u"), "")]
        scores = [f"{row['mean_rating']:.2f}", _short(row["adherence"], 3), _short(row["other_taste"], 2)]
        kept = "" if name == "base" else _kept(row, systems["base"])
        spent = ["" if name == "base" else f"{row['kl']:.0f}", kept]
        cells = [*scores, *judges.cells(name, frechet=True), *spent]
        rows.append([label, *against, rates.get((name, "ru_before"), ""), *cells])
    head = ["", "against the base", "against R", "against U", "against RU before", "rating", "adherence"]
    head += ["another taste", *judges.head, "Frechet distance", "KL (nats)", f"{', '.join(DIVERSITY.values())} kept"]
    return table(head, rows)
