"""What a clip is called: several phrasings of one clip's facts, and the rules behind its mood word."""

import random

INSTRUMENTS = {  # name: General MIDI program
    "piano": 0, "accordion": 21, "acoustic guitar": 24, "violin": 40, "flute": 73, "synth lead": 81,
    "string ensemble": 48, "harp": 46, "clarinet": 71, "church organ": 19, "music box": 10, "trumpet": 56,
    "cello": 42, "harpsichord": 6, "choir": 52, "tin whistle": 78,
}  # fmt: skip
BACKINGS = ("none", "chords", "arpeggio", "bass", "drums", "band")
SYNONYMS = {
    "acoustic guitar": ["acoustic guitar", "guitar"],
    "violin": ["violin", "violin", "fiddle"],
    "synth lead": ["synth lead", "synth", "synthesizer", "melodic synth line"],
    "string ensemble": ["string ensemble", "strings section"],
    "church organ": ["church organ", "organ"],
    "trumpet": ["trumpet"],
    "tin whistle": ["tin whistle", "whistle"],
    "choir": ["choir", "vocal choir"],
}
BACKING_PHRASES = {
    "none": ["solo", "unaccompanied", "alone, without accompaniment"],
    "chords": ["with chords", "with chordal accompaniment", "over held chords"],
    "arpeggio": ["with arpeggios", "and arpeggio", "over an arpeggio accompaniment", "with broken chords"],
    "bass": ["with a bass line", "and bass", "over a walking bass"],
    "drums": ["with drums", "with a drum beat", "over a steady drum groove"],
    "band": ["with a band", "with chords, bass and drums", "backed by a full band", "and a band"],
}
TEMPO_PHRASES = {
    "slow": ["slow", "slow tempo", "at a slow pace", "downtempo"],
    "moderate": ["moderate", "medium tempo", "moderate tempo", "at a walking pace"],
    "fast": ["fast", "fast tempo", "up-tempo", "at a quick pace"],
}
DANCES = {"reel", "jig", "slip jig", "hornpipe", "strathspey", "clog", "fling", "polka"}
MOOD_WORDS = {  # what O'Neill's book prints above a tune, and the word used here
    "tenderly": "tender", "slow and tenderly": "tender", "gaily": "cheerful", "cheerful": "cheerful",
    "cheerfully": "cheerful", "with spirit": "spirited", "spirited": "spirited", "lively": "lively",
    "animated": "lively", "with feeling": "heartfelt", "slow with feeling": "heartfelt",
    "with expression": "expressive", "slow with expression": "expressive", "mournful": "mournful",
    "plaintively": "plaintive", "plaintive": "plaintive", "playful": "playful", "playfully": "playful",
    "gracefully": "graceful", "boldly": "bold",
}  # fmt: skip
NOSTALGIC = {"accordion", "music box", "clarinet", "violin", "harp", "acoustic guitar"}


def mood_by_rule(mode: str, tempo: str, instrument: str, rng: random.Random) -> str:
    """A mood word from mode, tempo and instrument. It is a rule, not a listener's judgement; "" for no word."""
    dark = mode in ("minor", "dorian")
    if tempo == "slow":
        if dark:
            return "nostalgic" if instrument in NOSTALGIC else rng.choice(["mournful", "melancholic", "sad"])
        return rng.choice(["calm", "tender", "peaceful"])
    if tempo == "fast":
        return rng.choice(["spirited", "driving", "dark"] if dark else ["cheerful", "lively", "happy"])
    return "" if rng.random() < 0.5 else rng.choice(["wistful", "serious"] if dark else ["bright", "graceful"])


def article(words: str) -> str:
    """The words behind "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(row: dict, rng: random.Random) -> str:
    """One phrasing of a clip's facts: tags, a sentence, a paraphrase or the bare minimum.

    Facts are left out at random, since people do not name them all; the instrument is always named.
    """
    instrument = rng.choice(SYNONYMS.get(row["instrument"], [row["instrument"]]))
    backing = rng.choice(BACKING_PHRASES[row["backing"]])
    tempo = rng.choice(TEMPO_PHRASES[row["tempo"]])
    kind = rng.choice(["dance tune", row["kind"]]) if row["kind"] in DANCES else row["kind"]
    kind = rng.choice([kind, kind, "tune", "melody"])
    mode = row["mode"] if row["mode"] in ("major", "minor") else f"{row['mode']} mode"
    key = rng.choice([f"{row['key']} {mode}", f"in {row['key']} {mode}", f"{mode} key"])
    mood = row["mood"]
    described = f"{mood} {kind}" if mood and rng.random() < 0.85 else kind
    player = f"{instrument} band" if row["backing"] == "band" and rng.random() < 0.4 else instrument
    style = rng.choices(["tags", "sentence", "played", "of", "minimal", "featuring"], [3, 3, 2, 2, 1, 2])[0]
    if style == "tags":
        optional = [word for word in (backing, tempo, key, mood, kind) if word and rng.random() < 0.7]
        rng.shuffle(optional)
        text = ", ".join([instrument, *optional])
    elif style == "sentence":
        tail = [part for part in (tempo, key) if rng.random() < 0.6]
        text = ", ".join([f"{article(described)} played by {article(player)} {backing}", *tail])
    elif style == "played":
        text = f"{article(described)} with {article(instrument)} {backing}"
        text += f", {tempo}" if rng.random() < 0.4 else ""
    elif style == "of":
        speed = row["tempo"] if row["tempo"] != "moderate" else "medium"
        words = " ".join(word for word in (mood, speed if rng.random() < 0.6 else "", instrument, kind) if word)
        text = f"{words} {backing}" + (f", {key}" if rng.random() < 0.5 else "")
    elif style == "featuring":
        text = f"{backing_first(row, rng)} {article(instrument)} plays {article(described)}"
        text += f" {rng.choice(['in', 'at'])} {article(row['tempo'])} tempo" if rng.random() < 0.5 else ""
    else:
        text = rng.choice([player, f"{player}, {tempo}", f"{article(described)} by {article(player)}"])
    return text.strip()


def backing_first(row: dict, rng: random.Random) -> str:
    """How a sentence opens that names the accompaniment first."""
    opening = {
        "none": ["all alone,", "solo:"],
        "chords": ["over chords,", "with chords behind it,"],
        "arpeggio": ["over arpeggios,", "with arpeggio accompaniment,"],
        "bass": ["over a bass line,", "with bass,"],
        "drums": ["over drums,", "with a drum beat,"],
        "band": ["with a full band,", "over chords, bass and drums,"],
    }
    return rng.choice(opening[row["backing"]])


def captions(row: dict, n: int, rng: random.Random) -> list[str]:
    """`n` different phrasings of one clip; the first is complete, for evaluation."""
    mode = row["mode"] if row["mode"] in ("major", "minor") else f"{row['mode']} mode"
    described = f"{row['mood']} {row['kind']}".strip()
    full = f"{article(described)} played by {article(row['instrument'])} {BACKING_PHRASES[row['backing']][0]}"
    texts = [f"{full}, {row['tempo']} tempo, {row['key']} {mode}"]
    while len(texts) < n:
        text = phrase(row, rng)
        if text not in texts:
            texts.append(text)
    return texts
