"""The page of an evaluation: one HTML file that works from a disk, on a phone and with a screen reader."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from ..records import agreement_in_words

Row = Mapping[str, Any]
FEW_PROMPTS = 10  # below it, an interval over prompts says little
METRIC_LABELS = {  # name in results.json -> what a reader calls it, with its unit
    "diatonic_share": "Pitch energy in one scale (share, 0 to 1)",
    "spectral_flatness": "Noise rather than tones (0 to 1)",
    "rhythmic_steadiness": "Steadiness of the beat (0 to 1)",
    "silence_share": "Silence (share of the time, 0 to 1)",
    "clipping_share": "Clipping (share of the samples, 0 to 1)",
    "timbre_distance_db": "Difference in timbre between clips of a prompt (dB)",
    "harmony_distance": "Difference in harmony between clips of a prompt (0 to 1)",
    "distinct_ngrams": "Variety of the codes over all clips (share, 0 to 1)",
}
_PAIR_HEADS = ("Win / tie / loss %", "Win rate", "Comparisons", "Wilcoxon p")


def render_page(result: Mapping[str, Any], players: Sequence[Row] = ()) -> str:
    """The page of `results.json`.

    Args:
        result: what `evaluate_models` or `evaluate_votes` returns.
        players: for each prompt to play: `prompt`, `clips` (model -> base64 FLAC) and `scores` (model -> name -> number).

    Returns:
        HTML without external assets. Whatever came from outside (prompts, names) is escaped.
    """
    title = "Votes between music generators" if result["kind"] == "votes" else "Music generators, side by side"
    body = [
        _summary(result),
        _section("Who is preferred", _matrix(result) + _pairs(result)) if result["win_rates"] else "",
        _section("Mean opinion score", _mos(result)) if "mos" in result else "",
        _section("Win rate against all others", _overall(result)) if "overall" in result else "",
        _section("Ranking", _ranking(result)),
        _section("Agreement of the listeners", _agreement(result)) if "agreement" in result else "",
        _section("Listen", _players(players)) if players else "",
        _section("Rewards", _rewards(result)) if result.get("rewards") else "",
        _section("Objective metrics", _metrics(result)) if "metrics" in result else "",
        _section("How to read this page", _notes(result)),
    ]
    page = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(title), figures=figure_style(), body="\n".join(part for part in body if part))


def render_standings(result: Mapping[str, Any]) -> str:
    """The tables and plots alone, to stand in another page with `figure_style`.

    Args:
        result: what `count_votes` returns.

    Returns:
        HTML: how often each model beats each other, the ranking, and opinion scores where clips were rated. Names are
        escaped.
    """
    parts = [
        _section("Strength", _ranking(result)),
        _section("Who is preferred", _matrix(result)) if result["win_rates"] else "",
        _section("Mean opinion score", _mos(result)) if "mos" in result else "",
    ]
    return f"{_few(result)}{''.join(parts)}"


def figure_style() -> str:
    """CSS of the tables and plots. It takes its colours from variables that the page sets."""
    return (files(__package__) / "figures.css").read_text(encoding="utf-8")


def few_prompts(result: Mapping[str, Any]) -> str:
    """A sentence of warning where the comparison rests on too few prompts, or on too few votes without prompts, else ""."""
    unit, number = ("vote", result["votes"]) if result["prompts"] is None else ("prompt", result["prompts"])
    if number >= FEW_PROMPTS:
        return ""
    return (
        f"{_count(number, unit)}: too few to tell systems apart. Intervals are drawn over {unit}s, and with fewer than "
        f"{FEW_PROMPTS} they are wide, or too narrow to be trusted."
    )


def headline(result: Mapping[str, Any]) -> str:
    """What came out, for the terminal: a line for each later generator against the first one, or for the best in votes;
    before it a warning where there are few prompts.

    Args:
        result: what `evaluate_models` or `evaluate_votes` returns.
    """
    warning = [f"Warning: {few_prompts(result)}"] if few_prompts(result) else []
    raters = result["raters"]
    who = (
        f"{raters['simulated']} of {_count(raters['listeners'], 'listener')}"
        if result["kind"] == "votes"
        else "the listeners"
    )
    simulated = f" ({who} are simulated)" if raters["simulated"] else ""
    if len(result["models"]) == 1:
        (score,) = result["mos"]
        mean = f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}] of {_count(score['count'], 'rating')}"
        lines = [f"{score['model']} has a mean rating of {mean}; give a second generator to compare it with"]
    elif result["kind"] == "models":
        first = result["models"][0]
        lines = [_preferred(rate, "rating") for rate in result["win_rates"] if rate["against"] == first]
    elif len(result["models"]) == 2:
        lines = [_preferred(result["win_rates"][0], "vote")]
    else:
        lines = [_preferred(result["overall"][0] | {"against": "the others"}, "vote")]
    return "\n".join([*warning, *(f"{line}{simulated}" for line in lines)])


def _preferred(rate: Row, unit: str) -> str:
    pair, ties = f"{rate['model']} preferred to {rate['against']}", _count(rate["ties"], "tie")
    if rate["win_rate"] is None:
        return f"{pair} in no {unit}: {ties} and nothing else"
    low, high = (round(100 * rate[name]) for name in ("low", "high"))
    decided = _count(rate["wins"] + rate["losses"], f"decided {unit}")
    beside = f", {ties} beside them" if rate["ties"] else ""
    return f"{pair} in {100 * rate['win_rate']:.0f} % [{low}, {high}] of {decided}{beside}"


def _section(title: str, content: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>'


def _summary(result: Mapping[str, Any]) -> str:
    few, raters = _few(result), result["raters"]
    if result["kind"] == "votes":
        prompts = "" if result["prompts"] is None else f" on {_count(result['prompts'], 'prompt')}"
        text = f"{_count(result['votes'], 'vote')}{prompts} between "
        of_all = f"of the {_count(raters['listeners'], 'listener')}"
        simulated = _simulated(f"{raters['simulated']} {of_all}") if raters["simulated"] else ""
        rewards = _chosen_by_rewards(f"{raters['rewards']} {of_all}") if raters["rewards"] else ""
        return f'<p class="lede">{text}{len(result["models"])} systems.</p>{few}{simulated}{rewards}'
    text = (
        f"{_count(len(result['models']), 'generator')} on the same {_count(result['prompts'], 'prompt')}, "
        f"{_count(raters['clips_per_prompt'], 'clip')} of {result['settings']['duration_s']:g} s each, "
        f"{_count(raters['per_clip'], 'rating')} a clip."
    )
    if raters["clips_per_prompt"] > 1:
        text += f" This page plays the first of the {raters['clips_per_prompt']} clips."
    who = f"The {raters['listeners']} listeners ({escape(raters['simulated'] or '')})"
    warning = _simulated(who) if raters["simulated"] else ""
    return f'<p class="lede">{text}</p>{few}{warning}'


def _simulated(who: str) -> str:
    return (
        f'<p class="notice"><strong>{who} are simulated</strong>: rules on the waveform and the prompt, not people. The page '
        "shows whether their taste was learned; it does not show what people would prefer.</p>"
    )


def _chosen_by_rewards(who: str) -> str:
    return (
        f'<p class="notice"><strong>{who} are rewards</strong>: they chose the clip that a model scored higher, in place of '
        "people.</p>"
    )


def _few(result: Mapping[str, Any]) -> str:
    return f'<p class="notice"><strong>{escape(few_prompts(result))}</strong></p>' if few_prompts(result) else ""


def _matrix(result: Mapping[str, Any]) -> str:
    rates = {(rate["model"], rate["against"]): rate for rate in result["win_rates"]}
    models = result["models"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in models)
    rows = []
    for model in models:
        cells = "".join(_matrix_cell(rates.get((model, other))) for other in models)
        rows.append(f'<tr><th scope="row">{escape(model)}</th>{cells}</tr>')
    caption = "How often the model of the row wins against the model of the column: win rate, 95 % interval, decided comparisons"
    return _table(caption, f"<td></td>{head}", rows, "matrix")


def _matrix_cell(rate: Row | None) -> str:
    if rate is None:
        return '<td class="empty">–</td>'
    if rate["win_rate"] is None:
        return f'<td class="empty">only ties<small>{rate["ties"]}</small></td>'
    side = "win" if rate["win_rate"] >= 0.5 else "loss"
    strength = round(abs(rate["win_rate"] - 0.5) * 2 * 0.55, 2)
    return (
        f'<td class="{side}" style="--strength:{strength}">{_percent(rate["win_rate"])}'
        f"<small>{_percent_range(rate)}</small><small>{rate['wins']} of {rate['wins'] + rate['losses']}</small></td>"
    )


def _pairs(result: Mapping[str, Any]) -> str:
    order = {name: i for i, name in enumerate(result["models"])}
    rows = []
    for rate in result["win_rates"]:
        if order[rate["model"]] < order[rate["against"]]:
            continue  # each pair once: the later model, usually the tuned one, against the earlier
        total = rate["wins"] + rate["ties"] + rate["losses"]
        shares = " / ".join(f"{100 * rate[name] / total:.0f}" for name in ("wins", "ties", "losses"))
        value = "–" if rate["win_rate"] is None else f"{_percent(rate['win_rate'])} ({_percent_range(rate)})"
        cells = [shares, value, str(total)]
        if "wilcoxon_p" in rate:
            cells.append(_p_value(rate["wilcoxon_p"]))
        # On a phone each pair becomes a list, and each cell brings its head along.
        cells = [f'<td data-head="{head}">{cell}</td>' for head, cell in zip(_PAIR_HEADS, cells)]
        rows.append(
            f'<tr><th scope="row">{escape(rate["model"])} – {escape(rate["against"])}</th>{"".join(cells)}</tr>'
        )
    shown = _PAIR_HEADS if any("wilcoxon_p" in rate for rate in result["win_rates"]) else _PAIR_HEADS[:-1]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Pair", *shown))
    table = _table("The first model of each pair against the second", head, rows, "pairs")
    if len(rows) <= 10:
        return table
    return f"<details><summary>All {len(rows)} pairs</summary>{table}</details>"


def _mos(result: Mapping[str, Any]) -> str:
    rows = [(score["model"], score["mean"], score["low"], score["high"], "") for score in result["mos"]]
    return _dot_plot("Mean opinion score, 1 (bad) to 5 (excellent), with 95 % intervals", rows, 1, 5, [1, 2, 3, 4, 5])


def _overall(result: Mapping[str, Any]) -> str:
    rows = [
        (rate["model"], rate["win_rate"], rate["low"], rate["high"], f"{rate['wins']} won, {rate['losses']} lost")
        for rate in result["overall"]
        if rate["win_rate"] is not None
    ]
    rows = [(name, *(None if v is None else 100 * v for v in values), note) for name, *values, note in rows]
    return _dot_plot("Wins / (wins + losses) in %, with 95 % intervals", rows, 0, 100, [0, 25, 50, 75, 100], digits=0)


def _ranking(result: Mapping[str, Any]) -> str:
    if result["ranking"] is None:
        return f"<p>No Bradley-Terry ranking: {escape(result['ranking_note'])}.</p>"
    rows = [(row["model"], row["strength"], row["low"], row["high"], "") for row in result["ranking"]]
    values = [value for _, *numbers, _ in rows for value in numbers if value is not None]
    reach = max(1.0, -(-max(map(abs, values)) // 0.5) * 0.5)
    ticks = [-reach, -reach / 2, 0, reach / 2, reach]
    return _dot_plot(
        "Bradley-Terry strength in log-odds, 0 on average; 1 more means odds of 2.7 to 1", rows, -reach, reach, ticks
    )


def _agreement(result: Mapping[str, Any]) -> str:
    found = result["agreement"]
    told = agreement_in_words(found["krippendorff_alpha"], found["shared_pairs"])
    passed, failed = (sum(counts[kind] for counts in found["checks"].values()) for kind in ("passed", "failed"))
    checks = f"{passed} of {_count(passed + failed, 'check')} of attention {'was' if passed == 1 else 'were'} passed."
    return f"<p>{escape(told[0].upper() + told[1:])}: 1 where all agree, 0 where they agree as by chance.</p>" + (
        f"<p>{checks}</p>" if passed + failed else "<p>Attention was not checked.</p>"
    )


def _rewards(result: Mapping[str, Any]) -> str:
    head = '<th scope="col">Model</th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in result["rewards"])
    means = {name: {mean["model"]: mean for mean in entry["means"]} for name, entry in result["rewards"].items()}
    rows = []
    for model in result["models"]:
        cells = "".join(_interval_cell(means[name][model]) for name in means)
        rows.append(f'<tr><th scope="row">{escape(model)}</th>{cells}</tr>')
    return _table("Mean reward over the prompts, with its 95 % interval", head, rows)


def _metrics(result: Mapping[str, Any]) -> str:
    names = list(next(iter(result["metrics"].values())))
    head = '<th scope="col">Metric</th>'
    head += "".join(f'<th scope="col">{escape(model)}</th>' for model in result["models"])
    rows = []
    for name in names:
        label = f"{METRIC_LABELS[name]}<small>{escape(result['metric_notes'][name])}</small>"
        cells = "".join(_interval_cell(result["metrics"][model][name]) for model in result["models"])
        rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    return _table("Means over the prompts, with 95 % intervals", head, rows)


def _players(players: Sequence[Row]) -> str:
    return "".join(_player(number, entry) for number, entry in enumerate(players, 1))


def _player(number: int, entry: Row) -> str:
    figures = []
    for model, data in entry["clips"].items():
        scores = ", ".join(f"{escape(name)} {value:.2f}" for name, value in entry["scores"][model].items())
        label = escape(f"{model}, prompt {number}", quote=True)
        figures.append(
            f"<figure><figcaption>{escape(model)}<small>{scores}</small></figcaption>"
            f'<audio controls preload="metadata" aria-label="{label}" src="data:audio/flac;base64,{data}"></audio></figure>'
        )
    return f'<article><h3>{escape(entry["prompt"])}</h3><div class="clips">{"".join(figures)}</div></article>'


def _notes(result: Mapping[str, Any]) -> str:
    notes = [
        "A win rate is wins / (wins + losses); ties are left out of it and shown beside it.",
        f"Intervals hold 95 % of the values that resampled {'votes' if result['prompts'] is None else 'prompts'} give; where "
        "one side won everything, they are exact binomial ones.",
    ]
    if result["kind"] == "models":
        notes.append("Raters heard, and this page plays, all clips at the same loudness (-23 LUFS).")
    if best := result.get("best_of"):
        notes.append(
            f"{escape(best['model'])}: of {best['n']} clips that {escape(best['of'])} plays, the one that the reward "
            f"{escape(best['reward'])} scores highest. That reward's own column says how well it was followed, not how good "
            "the clips are."
        )
    if "mos" in result:
        notes.append("The Wilcoxon signed rank test compares the prompts' mean ratings.")
    settings = [*result.get("settings", {}).items(), ("created", result["created_at"])]
    listed = "".join(f"<li>{note}</li>" for note in notes)
    facts = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in settings)
    return f"<ul>{listed}</ul><dl>{facts}</dl>"


def _dot_plot(
    caption: str,
    rows: Iterable[tuple[str, float, float | None, float | None, str]],
    start: float,
    end: float,
    ticks: Sequence[float],
    digits: int = 2,
) -> str:
    """One line a model: a dot for the value and a bar for the interval. Numbers stand beside it as text."""

    def place(value: float) -> str:
        return f"{100 * min(max((value - start) / (end - start), 0), 1):.2f}%"

    grid = "".join(f'<line class="grid" x1="{place(t)}" x2="{place(t)}" y1="0" y2="100%"/>' for t in ticks)
    lines = []
    for name, value, low, high, note in rows:
        span, text = "", f"{value:.{digits}f}"
        if low is not None and high is not None:
            span = f'<line class="span" x1="{place(low)}" x2="{place(high)}" y1="50%" y2="50%"/>'
            text += f" <small>{low:.{digits}f} to {high:.{digits}f}</small>"
        lines.append(
            f'<li><span class="name">{escape(name)}<small>{escape(note)}</small></span>'
            f'<svg aria-hidden="true" focusable="false">{grid}{span}<circle cx="{place(value)}" cy="50%" r="6"/></svg>'
            f'<span class="value">{text}</span></li>'
        )
    axis = "".join(f'<span style="left:{place(t)}">{t:g}</span>' for t in ticks)
    return (
        f'<figure class="plot"><figcaption>{caption}</figcaption><ul>{"".join(lines)}</ul>'
        f'<div class="axis" aria-hidden="true"><div>{axis}</div></div></figure>'
    )


def _table(caption: str, head: str, rows: Sequence[str], kind: str = "") -> str:
    # The caption stands above the table: inside, it would be as narrow as the table is. The region around the table takes
    # focus, for one that is wider than a phone has to scroll by keyboard too.
    return (
        f'<figure class="table"><figcaption>{caption}</figcaption>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table class="{kind}" aria-label="{caption}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def _interval_cell(value: Row | float) -> str:
    if isinstance(value, float):
        return f"<td>{value:.3f}</td>"
    return f"<td>{value['mean']:.3f}<small>{value['low']:.3f} to {value['high']:.3f}</small></td>"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _percent_range(rate: Row) -> str:
    return f"{100 * rate['low']:.0f}–{100 * rate['high']:.0f}"


def _p_value(p: float) -> str:
    return "&lt; .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
