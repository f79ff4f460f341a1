"""What a clip is called: several phrasings of one clip's facts, and the rules behind its mood word.

All captions are written by these rules; nobody listened. `captions` is for training, `paraphrase` for tests alone: it
asks for the same facts in words and orders that no training caption has.
"""

import random

INSTRUMENTS = {  # name: General MIDI program
    "piano": 0, "accordion": 21, "acoustic guitar": 24, "violin": 40, "flute": 73, "synth lead": 81,
    "string ensemble": 48, "harp": 46, "clarinet": 71, "church organ": 19, "music box": 10, "trumpet": 56,
    "cello": 42, "harpsichord": 6, "choir": 52, "tin whistle": 78,
}  # fmt: skip
BACKINGS = ("none", "chords", "arpeggio", "bass", "drums", "band")
TEMPI = ("slow", "moderate", "fast")
SYNONYMS = {
    "piano": ["piano", "piano", "grand piano", "acoustic piano"],
    "accordion": ["accordion", "accordion", "squeezebox", "button accordion"],
    "acoustic guitar": ["acoustic guitar", "guitar", "nylon string guitar", "classical guitar"],
    "violin": ["violin", "violin", "fiddle", "solo violin"],
    "flute": ["flute", "flute", "concert flute"],
    "synth lead": ["synth lead", "synth", "synthesizer", "melodic synth line", "lead synth"],
    "string ensemble": ["string ensemble", "strings section", "strings", "string orchestra"],
    "harp": ["harp", "harp", "concert harp"],
    "church organ": ["church organ", "organ", "pipe organ"],
    "music box": ["music box", "music box", "musical box"],
    "trumpet": ["trumpet", "trumpet", "brass trumpet"],
    "cello": ["cello", "cello", "solo cello"],
    "tin whistle": ["tin whistle", "whistle", "penny whistle"],
    "choir": ["choir", "vocal choir", "choir of voices"],
}
BACKING_PHRASES = {
    "none": ["solo", "unaccompanied", "alone, without accompaniment"],
    "chords": ["with chords", "with chordal accompaniment", "over held chords"],
    "arpeggio": ["with arpeggios", "and arpeggio", "over an arpeggio accompaniment", "with broken chords"],
    "bass": ["with a bass line", "and bass", "over a walking bass"],
    "drums": ["with drums", "with a drum beat", "over a steady drum groove"],
    "band": ["with a band", "with chords, bass and drums", "backed by a full band", "and a band"],
}
OPENINGS = {
    "none": ["all alone,", "solo:"],
    "chords": ["over chords,", "with chords behind it,"],
    "arpeggio": ["over arpeggios,", "with arpeggio accompaniment,"],
    "bass": ["over a bass line,", "with bass,"],
    "drums": ["over drums,", "with a drum beat,"],
    "band": ["with a full band,", "over chords, bass and drums,"],
}
TEMPO_PHRASES = {
    "slow": ["slow", "slow tempo", "at a slow pace", "downtempo"],
    "moderate": ["moderate", "medium tempo", "moderate tempo", "at a walking pace"],
    "fast": ["fast", "fast tempo", "up-tempo", "at a quick pace"],
}
SPEED = {"slow": ["slow", "unhurried"], "moderate": ["medium-speed", "mid-tempo"], "fast": ["fast", "quick"]}
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
METRE_PHRASES = {"3/4": ["in 3/4", "in three-four time", "in waltz time"], "6/8": ["in 6/8", "in six-eight time"]}


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
    """The words behind "a" or "an"; plurals such as "strings" go without."""
    if words.split(",")[0].endswith("strings"):
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def key_of(row: dict) -> tuple[str, str]:
    """("G minor", "minor") or ("D dorian mode", "dorian mode")."""
    mode = row["mode"] if row["mode"] in ("major", "minor") else f"{row['mode']} mode"
    return f"{row['key']} {mode}", mode


def phrase(row: dict, style: str, rng: random.Random) -> str:
    """One phrasing of a clip's facts.

    Args:
        row: the clip's facts, as render.py keeps them.
        style: "tags", "sentence", "played", "of", "featuring", "request" or "minimal". Facts are left out at random,
            since people do not name them all; the instrument is always named.
    """
    instrument = rng.choice(SYNONYMS.get(row["instrument"], [row["instrument"]]))
    backing = rng.choice(BACKING_PHRASES[row["backing"]])
    tempo = rng.choice(TEMPO_PHRASES[row["tempo"]])
    kind = rng.choice(["dance tune", row["kind"]]) if row["kind"] in DANCES else row["kind"]
    kind = rng.choice([kind, kind, "tune", "melody"])
    key, mode = key_of(row)
    key = rng.choice([key, f"in {key}", f"{mode} key"])
    metre = rng.choice(METRE_PHRASES.get(row["metre"], [f"in {row['metre']}"]))
    mood = row["mood"]
    described = f"{mood} {kind}" if mood and rng.random() < 0.85 else kind
    player = f"{instrument} band" if row["backing"] == "band" and rng.random() < 0.4 else instrument
    if style == "tags":
        beats = f"{round(row['bpm'])} bpm"
        optional = [(backing, 0.7), (tempo, 0.6), (key, 0.5), (mood, 0.6), (kind, 0.7), (metre, 0.25), (beats, 0.25)]
        words = [word for word, share in optional if word and rng.random() < share]
        rng.shuffle(words)
        return ", ".join([instrument, *words])
    if style == "sentence":
        tail = [part for part, share in ((tempo, 0.6), (key, 0.5), (metre, 0.2)) if rng.random() < share]
        return ", ".join([f"{article(described)} played by {article(player)} {backing}", *tail])
    if style == "played":
        text = f"{article(described)} with {article(instrument)} {backing}"
        return text + (f", {tempo}" if rng.random() < 0.4 else "")
    if style == "of":
        words = (mood, rng.choice(SPEED[row["tempo"]]) if rng.random() < 0.6 else "", instrument, kind)
        text = f"{' '.join(word for word in words if word)} {backing}"
        return text + (f", {key}" if rng.random() < 0.4 else "")
    if style == "featuring":
        text = f"{rng.choice(OPENINGS[row['backing']])} {article(instrument)} plays {article(described)}"
        return text + (f" {rng.choice(['in', 'at'])} {article(row['tempo'])} tempo" if rng.random() < 0.5 else "")
    if style == "request":
        verb = rng.choice(["play me", "i want", "make", "give me"])
        text = f"{verb} {article(described)} on {article(instrument)}"
        return text + (f" {backing}" if rng.random() < 0.7 else "") + (f", {tempo}" if rng.random() < 0.5 else "")
    return rng.choice([player, f"{player}, {tempo}", f"{article(described)} by {article(player)}"])


STYLES = ("tags", "tags", "tags", "sentence", "sentence", "played", "of", "of", "featuring", "request", "minimal")


def complete(row: dict, rng: random.Random) -> str:
    """Tags that name instrument, accompaniment, tempo, beats a minute and key, and often more, in any order."""
    key, _ = key_of(row)
    words = [rng.choice(BACKING_PHRASES[row["backing"]]), rng.choice([key, f"in {key}"]), f"{round(row['bpm'])} bpm"]
    metre = rng.choice(METRE_PHRASES.get(row["metre"], [f"in {row['metre']}"]))
    optional = ((rng.choice(TEMPO_PHRASES[row["tempo"]]), 0.8), (row["mood"], 0.5), (row["kind"], 0.5), (metre, 0.3))
    words += [word for word, share in optional if word and rng.random() < share]
    rng.shuffle(words)
    return ", ".join([rng.choice(SYNONYMS.get(row["instrument"], [row["instrument"]])), *words])


def captions(row: dict, rng: random.Random) -> list[str]:
    """Twelve different phrasings of one clip, one of each of `STYLES`; the first is complete, for evaluation."""
    described = f"{row['mood']} {row['kind']}".strip()
    full = f"{article(described)} played by {article(row['instrument'])} {BACKING_PHRASES[row['backing']][0]}"
    texts = [f"{full}, {row['tempo']} tempo, {key_of(row)[0]}"]
    for style in STYLES:
        text = phrase(row, style, rng)
        while text in texts:
            # A bare "violin" has few forms: another style then takes its place.
            text = phrase(row, rng.choice(STYLES), rng)
        texts.append(text)
    return texts


def paraphrase(row: dict, rng: random.Random) -> str:
    """What somebody might type who has not read the training captions: for tests, never for training."""
    name = rng.choice(SYNONYMS.get(row["instrument"], [row["instrument"]]))
    speed = {
        "slow": ["that takes its time", "really slowly", "nice and slow"],
        "moderate": ["not too fast and not too slow", "at an easy speed"],
        "fast": ["that moves along fast", "really fast", "full of speed"],
    }
    company = {
        "none": ["just that, nothing else", "by itself"],
        "chords": ["some chords under it", "chords in the background"],
        "arpeggio": ["rippling arpeggios below", "some arpeggio underneath"],
        "bass": ["a bass going along", "bass notes below"],
        "drums": ["somebody drumming", "drums in the back"],
        "band": ["the whole band joining in", "bass, drums and chords around it"],
    }
    mode = {"major": "a major key", "minor": "a minor key"}.get(row["mode"], f"the {row['mode']} scale")
    mood = f"{row['mood']} " if row["mood"] else ""
    pace, others = rng.choice(speed[row["tempo"]]), rng.choice(company[row["backing"]])
    kind = row["kind"] if rng.random() < 0.7 else "piece"
    return rng.choice(
        [
            f"could you do something {mood or 'melodic '}for {name}, {pace}, {others}",
            f"{mood}music where the {name} carries the {kind}, {others}, {pace}",
            f"i'd love to hear the {name} in {mode}: {article(mood + kind)} {pace}, {others}",
            f"someone on {name}, {others}, {pace}, {mood}and in {mode}",
        ]
    )
