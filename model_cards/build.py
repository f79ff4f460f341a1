"""Write the cards of the bundled models from what the recipes measured.

    python model_cards/build.py

For each bundled model this leaves `result.json` beside the weights, from `recipes/results/*.json` and, for the adapters, from
`results/paper.json`, and the card in this folder, which is what `musicrl push` would publish with it. Run it again after a recipe; a test
compares.
"""

import json
from pathlib import Path

from musicrl_hf.audio import atomic_path
from musicrl_hf.bundled import BUNDLED, CHECKPOINTS, write_manifest
from musicrl_hf.cards import check_card, model_card
from musicrl_hf.places import base_of_adapter
from musicrl_hf.records import Record, write_record

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "recipes" / "results"
PAPER = HERE.parent / "results" / "paper.json"
STAGES = {  # what was measured for each model, in this order
    "musicrl-tiny": ["codec", "decoder", "text_encoder", "generator", "judge"],
    "musicrl-tiny-adherence": ["adherence"],
    "musicrl-tiny-quality": ["quality"],
}
NOT_MEASURED = (
    "command",
    "date",
    "hardware",
    "versions",
    "seed",
    "log",
    "bytes",
    "clips",
    "clips_medians",
    "clips_scores",
    "first_prompts",
    "before",
    "ear_distances",
)
JUDGED = {  # groups of clips that the judges heard, and what a card calls them
    "real": "real clips",
    "real_through_codec": "real clips through the codec",
    "generated_guidance_1": "generated at guidance 1",
    "generated_guidance_2": "generated at guidance 2",
    "generated_guidance_3": "generated at guidance 3",
}
SHARES = ("instrument", "backing", "tempo_within_3%", "tempo_within_8%", "key_neighbour", "key_signature")
DATA = (
    "{clips:,} clips of 10 s ({hours:g} h), 16 kHz mono, rendered for this purpose from {tunes:,} tunes of three printed "
    "collections in the public domain (O'Neill's Music of Ireland, Ryan's Mammoth Collection, Aird's Airs) and of Bach's "
    "four-part chorales (no tune is in both training and test) with the sound font FluidR3Mono_GM (MIT). The captions were written by rules from "
    "each tune's metre, mode and tempo and from the instruments; a mood word such as \"nostalgic\" is a rule, not a listener's "
    "judgement. No recording of a person, no licensed music. ATTRIBUTION.md of the project names who encoded the tunes."
)
BELOW = (  # of an adapter's data
    " The generator below it was trained on tunes of three printed collections in the public domain and Bach's four-part chorales, "
    "rendered with the sound font FluidR3Mono_GM (MIT): ATTRIBUTION.md of the project names who encoded them."
)
LIMITS = {
    "musicrl-tiny": [
        "Made to try the whole loop on a laptop and to test it, not to listen to for pleasure: it knows folk melodies on "
        "sixteen General MIDI instruments and nothing else, neither singing nor any other style.",
        "16 kHz mono at 2 kbit/s: the sound is grainy, and an instrument is not always to be told from its neighbours.",
        "It follows the instrument that a prompt names in three clips of four, at guidance 3 in six of seven, the accompaniment in "
        "four of seven and in three of five, a key or its neighbour in seven of ten and in five of six, and a number of beats a "
        "minute within 8 % in four of seven and in six of seven (see the judges; chance is less than half there).",
        "At guidance 3 one clip in twenty-five, mostly of a slow tune without accompaniment, stays on one note for half of its length.",
    ],
    "musicrl-tiny-adherence": [
        "It knows the words and sounds of its own captions only; anything else in a prompt is passed over.",
    ],
    "musicrl-tiny-quality": [
        "Its ratings are simulated: a ladder of degradations (recipes/degradations.py: noise, clipping, narrow band, few bits, "
        "gaps, warped pitch, lost or scrambled codes), whose costs are ViSQOL's on four clips, and for warped pitch and scrambled "
        "codes a choice. Nobody rated anything. It knows those faults, not taste; of one that it never heard, crackle, see above.",
    ],
}


BASES = {"musicrl-tiny-quality": "musicrl-tiny-adherence"}  # whose sound encoder it keeps
KEYS = {f"musicrl-tiny-{key}": key for key in ("r", "u", "ru")}  # adapter -> its name in results/paper.json
LEARNED = "the 128 prompts of the package, and "
TUNED_ON = {
    "r": LEARNED + "adherence and quality, the rewards musicrl-tiny-adherence and musicrl-tiny-quality",
    "u": LEARNED + "a preference reward that was learned from the choices",
    "ru": "2,048 prompts that rules wrote (recipes/paper/many_prompts.py), and in six rounds, starting from musicrl-tiny-r, preference "
    "rewards that were learned from the choices (.5, .45, .55, then .5, .6, .54), text adherence (.3, .25, .15, then .35, .25, .22) and "
    "variety among the clips of a prompt (.2, .3, .3, then .15, .15, .24, in the fourth and fifth one for which another key is no news); "
    "between the third and the fourth what makes musicrl-tiny play without guidance nearly what it plays at guidance 3 (not the key), "
    "distilled from it, was added to the weights. From that point two more seeds were tuned in two rounds each, on rewards from more "
    "choices (.5, .6; adherence .3, .25; variety .2, .15); half of what each of the three had changed since was added up, and tuned in a "
    "last round (.5, .26, .24), of which three quarters are kept",
}
BETWEEN = {  # clips that the simulated listeners chose between
    "ru": "clips of musicrl-tiny, of the first round's, of what the guidance was added to and of the sixth round's"
}
SIMULATED_LIMITS = [
    "All listeners are SIMULATED: a documented function of the sound (listeners.py). Nobody listened, and nothing here says that "
    "people would prefer it.",
    "What the judges hear of it, which no reward knows, stands above beside the base model's own figures: where they fell, the "
    "simulated taste was bought with what a prompt asks for.",
]
TUNED_LIMITS = [
    "It was tuned on the musicrl-tiny-adherence, which heard the instrument and nothing else of a prompt, and the musicrl-tiny-quality before "
    "those that ship now, and through the codec's decoder before the one that musicrl-tiny has now; but for the rates by training seed, "
    "all that stands above was measured by and through those that ship.",
]
VARIED_LIMITS = [
    "Variety was paid for by its distance in harmony, which is therefore no independent measure of it; the distance in timbre and the "
    "distinct n-grams are.",
    "From the second round on the preference rewards hear how a clip's onsets repeat, by an autocorrelation, and so do the simulated "
    "listeners: people who hear a beat otherwise may gain less.",
]
EARLIER_HARDWARE = "rounds 1 and 2: 1 x NVIDIA H200"


def adapter_record(name: str) -> Record:
    """What an adapter's `result.json` says: figures of the very weights that ship.

    Raises:
        FileNotFoundError: the paper's runs have not been gathered.
    """
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    small = paper["shipped"]  # the loop whose first seed musicrl-tiny-r and -u are
    key = KEYS[name]
    found, others = paper["guided"], {"base": "musicrl-tiny"} | {each: label for label, each in KEYS.items()}
    systems = {row["method"]: row for row in found["systems"]}
    system, base, heard = systems[key], systems["base"], found["judged"]["seeds"]["0"]
    scores = {name: name for name in ("adherence", "quality")}
    scores |= {"panel_taste": "simulated held-out panel", "other_taste": "simulated panel of another taste"}
    diversity = ("timbre_distance_db", "harmony_distance", "distinct_ngrams")

    def rates(evaluation: dict) -> dict[str, str]:
        rows = [row for row in evaluation["win_rates"] if row["a"] == key and row["b"] in others]
        return {f"win rate against {others[row['b']]}": _rate(row) for row in rows}

    by_seed = {
        f"win rate against {others[row['b']]}": f"{_rate(row)}; {', '.join(map(_percent, row['by_seed']))}"
        for row in small["win_rates"]
        if row["a"] == key and row["b"] in others
    }
    ratings, clips = {row["model"]: round(row["mean"], 2) for row in found["mos"]}, found["judged"]["clips"]
    made = found if key == "ru" else small
    return Record(
        base_model=base_of_adapter(CHECKPOINTS / name),
        method="PPO",
        training_data=f"{TUNED_ON[key][0].upper()}{TUNED_ON[key][1:]}. The choices are of simulated listeners ({paper['listeners']}) between "
        f"{BETWEEN.get(key, 'clips of musicrl-tiny')}; no clip or vote of a person was used." + BELOW,
        license="apache-2.0",
        metrics={
            "simulated listeners": rates(found)
            | {f"mean rating of {other}, 1 to 5": ratings[other] for other in ("base", key)},
            "simulated listeners, prompts that nothing was sought on": rates(found["fresh"]),
            **({} if key == "ru" else {"simulated listeners, all training seeds and each": by_seed}),
            "this adapter": {label: system[score] for score, label in scores.items()} | {"kl": system["kl"]},
            "musicrl-tiny": {label: base[score] for score, label in scores.items()},
            "share of musicrl-tiny's diversity": {part: _percent(system[part] / base[part]) for part in diversity},
            f"independent judges of {clips} clips": _heard(heard[key]),
            f"independent judges of {clips} clips, musicrl-tiny": _heard(heard["base"]),
        },
        limits=SIMULATED_LIMITS + (VARIED_LIMITS + _limits_of_rounds(found) if key == "ru" else TUNED_LIMITS),
        clips=_results("judge")["clips"],
        command="as in recipes/paper/guided.py" if key == "ru" else small["command"],
        date=made["date"],
        hardware=f"{made['hardware']}; {EARLIER_HARDWARE}" if key == "ru" else made["hardware"],
    )


def _limits_of_rounds(found: dict) -> list[str]:
    """What is to be known of guidance in the weights, and of the rounds, with the figures of results/paper.json."""
    at_3, own = (
        next(_rate(row) for row in found[evaluation]["win_rates"] if (row["a"], row["b"]) == ("ru", "base"))
        for evaluation in ("at_3", "as_played")
    )
    return [
        "It is played at guidance 1 by default, as its generation_config.json says: guidance is in its weights. So it is preferred to "
        f"musicrl-tiny at 3 in {own}, and keeps less of the prompt than that; at 3 itself it is preferred in {at_3}. "
        "Whoever loads it with PEFT alone has to ask for guidance_scale=1.",
        "R below it and its first three rounds were tuned, and their rewards learned, on the sound of the codec's decoder before the one that "
        "musicrl-tiny has now; all that stands above was measured through the latter. Ten steps of the third were chosen of four trials by "
        "their win rate on 64 training prompts.",
        "Shares of the three and steps of the last round were chosen by 64 of the prompts that were tuned on, and by the judges on others than "
        "above; three quarters of the last round in place of all of it, as of the latter a prompt's clips kept 79 % of their distance in "
        "timbre on the held-out prompts. Its adapters are one of rank 96, which keeps 96 % or more of the square of what they change in a layer.",
    ]


def _rate(row: dict) -> str:
    return f"{_percent(row['win_rate'])} [{_percent(row['low'])}, {_percent(row['high'])}]"


def _heard(heard: dict) -> dict:
    shares = {name: "{share} ({chance})".format(**heard[name]) for name in SHARES if heard[name]}
    return shares | {name: heard[name] for name in ("scale_share", "frechet_distance", "faulty_clips")}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def record(name: str) -> Record:
    """What a bundled model's `result.json` says.

    Raises:
        FileNotFoundError: a recipe has not been run.
    """
    if name in KEYS:
        return adapter_record(name)
    corpus, clips = _results("corpus"), _results("render")["train"]
    stages = [_results(stage) for stage in STAGES[name]]
    measured = {
        stage: _judged(results) if stage == "judge" else {k: v for k, v in results.items() if k not in NOT_MEASURED}
        for stage, results in zip(STAGES[name], stages, strict=True)
    }
    if "decoder" in measured:  # the last word on what both measure
        repeated = measured["decoder"].keys() - {"minutes"}
        measured["codec"] = {k: v for k, v in measured["codec"].items() if k not in repeated}
    last = stages[-1]
    return Record(
        base_model=BASES.get(name),
        method=None if name in BASES else "trained from scratch",
        training_data=DATA.format(clips=clips["clips"], hours=clips["hours"], tunes=corpus["split"]["train"]),
        license="apache-2.0",
        metrics=measured if len(measured) > 1 else measured[STAGES[name][0]],
        limits=LIMITS[name],
        clips=_clips(name),
        command="; ".join(stage["command"] for stage in stages),
        date=last["date"],
        hardware=last["hardware"],
    )


def _clips(name: str) -> dict[str, str]:
    """The generator's clips that come with each model: path and prompt, and where the model scores, what it gave."""
    heard = _results("judge")
    scores = heard["clips_scores"].get(name)
    if scores is None:
        return heard["clips"]
    kind = name.removeprefix("musicrl-tiny-")
    return {
        path: f"{text} ({kind} {score:.2f})" for (path, text), score in zip(heard["clips"].items(), scores, strict=True)
    }


def _judged(results: dict) -> dict:
    """What independent judges heard, the share that is right first and in brackets what chance gives."""
    found: dict = {"prompts": results["prompts"], "seconds": results["seconds"]}
    for group, words in JUDGED.items():
        heard = results["groups"][group]
        shares = {name: "{share} ({chance})".format(**heard[name]) for name in SHARES}
        others = {name: heard[name] for name in ("scale_share_of_real", "frechet_distance_of_codec", "faulty_clips")}
        found[words] = shares | others
    return found


def bundled_card(name: str) -> str:
    """The card, with the clips where they lie as seen from this folder."""
    card = model_card(CHECKPOINTS / name, name)
    check_card(card)
    return card.replace("(samples/", f"(../src/musicrl_hf/checkpoints/{name}/samples/")


def _results(stage: str) -> dict:
    path = RESULTS / f"{stage}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run recipes/{stage}.py first.")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    for name in BUNDLED:
        write_record(CHECKPOINTS / name, record(name))
        card = bundled_card(name)
        with atomic_path(HERE / f"{name}.md") as temporary:
            temporary.write_text(card, encoding="utf-8")
        print(f"Wrote {HERE / name}.md")
    write_manifest()  # the records are among what it lists


if __name__ == "__main__":
    main()
