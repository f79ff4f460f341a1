"""Stage 1: tunes. Three ABC collections and the Bach chorales of music21's corpus become notes in beats, split by tune.

    python recipes/corpus.py --work build/tiny --corpus .../site-packages/music21/corpus

Needs Debian's `abcmidi`. The same tune stands in several books under one title or under several, so tunes that share a
normalised title or an incipit are one group, and a group is in one split: for training, for the judges that measure what
the trained models make, for validation, or for testing.
"""

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from captions import MOOD_WORDS
from chorales import read_chorales
from common import read_json, record, say, stage_arguments, start, write_json

BOOKS = ("oneills1850", "ryansMammoth", "airdsAirs")  # O'Neill's, Ryan's, Aird's: see ATTRIBUTION.md
INCIPIT_NOTES = 12
MIN_NOTES = 24
SPLIT_SHARES = {"test": 0.07, "validation": 0.05, "judges": 0.12}  # of the tunes; the rest is for training
TINY_TUNES = 400  # with --tiny: every so many of them that about these are left
PITCH_CLASS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
MODES = {"": "major", "maj": "major", "m": "minor", "min": "minor", "mix": "mixolydian", "dor": "dorian"}


def parse_key(text: str) -> tuple[int, str] | None:
    """ABC's K: field to tonic (0 = C) and mode; None for the few in other modes than the four used here."""
    found = re.match(r"\s*([A-G])([#b]?)\s*([A-Za-z]*)", text)
    if not found:
        return None
    mode = found[3].lower()
    mode = MODES.get(mode[:3] if mode != "m" else "m")
    if mode is None:
        return None
    return (PITCH_CLASS[found[1]] + {"#": 1, "b": -1, "": 0}[found[2]]) % 12, mode


def parse_metre(text: str) -> tuple[int, int]:
    """ABC's M: field to (beats, unit); C and C| are 4/4."""
    found = re.match(r"\s*(\d+)/(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (4, 4)


def parse_kind(rhythm: str, metre: tuple[int, int]) -> str:
    """ABC's R: field in one spelling; where it is empty, what the metre suggests."""
    rhythm = rhythm.lower().strip().replace("slipjig", "slip jig")
    for kind in ("slip jig", "jig", "reel", "hornpipe", "strathspey", "clog", "fling", "air", "waltz", "march"):
        if kind in rhythm:
            return kind
    return {(3, 4): "waltz", (9, 8): "slip jig"}.get(metre, "folk tune")


def duration(letters: str, unit: float) -> float:
    """Quarters that a stretch of ABC takes; `unit` is the length of a plain letter, in quarters."""
    letters = re.sub(r'"[^"]*"|\{[^}]*\}|![^!]*!|\[[A-Z]:[^\]]*\]', "", letters)
    letters = re.sub(r"\[([_^=]*[A-Ga-g][,']*[\d/]*)[^\]]*\]", r"\1", letters)  # a chord lasts as its first note does
    total, in_tuplet, squeeze = 0.0, 0, 1.0
    for tuplet, letter, times, slashes, parts in re.findall(
        r"\((\d)(?::\d*)*|([A-Ga-gzx])[,']*(\d*)(/*)(\d*)", letters
    ):
        if tuplet:
            in_tuplet = int(tuplet)
            squeeze = {2: 3 / 2, 3: 2 / 3, 4: 3 / 4}.get(in_tuplet, 2 / in_tuplet)
        elif letter:
            length = int(times or 1) / (int(parts) if parts else 2 ** len(slashes))
            total += length * unit * (squeeze if in_tuplet > 0 else 1.0)
            in_tuplet -= 1
    return total


def pickup(abc: str, metre: tuple[int, int]) -> float:
    """Quarters before the first full bar; 0 where the tune begins on the beat. Without it chords change off the bar."""
    unit_field = re.search(r"(?m)^L:\s*(\d+)/(\d+)", abc)
    bar = metre[0] * 4 / metre[1]
    unit = 4 * int(unit_field[1]) / int(unit_field[2]) if unit_field else (0.5 if metre[0] / metre[1] >= 0.75 else 0.25)
    body = abc[re.search(r"(?m)^K:.*$", abc).end() :]
    music = " ".join(line.split("%")[0] for line in body.splitlines() if not re.match(r"\s*([A-Za-z]:|%)", line))
    for bar_of_music in re.split(r"[|:\[\]]*\|[|:\]]*|::", re.sub(r'"[^"]*"', "", music)):
        length = duration(bar_of_music, unit)
        if length > 0:
            return round(length, 4) if length < bar - 0.01 else 0.0
    return 0.0


def read_tunes(corpus: Path) -> list[dict]:
    """Every tune of the three books with its header fields and its ABC text."""
    tunes = []
    for book in BOOKS:
        for path in sorted((corpus / book).glob("*.abc")):
            text = path.read_text(encoding="utf8", errors="replace")
            for block in re.split(r"(?m)^(?=X:\s*\d)", text)[1:]:
                fields: dict[str, list[str]] = {}
                for letter, value in re.findall(r"(?m)^([A-Z]):[ \t]*(.*)", block):
                    fields.setdefault(letter, []).append(value.strip().strip('"').strip())
                key = parse_key(fields.get("K", [""])[0])
                if key is None or not fields.get("T"):
                    continue
                words = [note.lower().rstrip(".").split('"')[0].strip() for note in fields.get("N", [])]
                metre = parse_metre(fields.get("M", ["4/4"])[0])
                tunes.append(
                    {
                        "title": fields["T"][0],
                        "book": book,
                        "file": path.name,
                        "tonic": key[0],
                        "mode": key[1],
                        "metre": list(metre),
                        "kind": parse_kind(fields.get("R", [""])[0], metre),
                        "printed_mood": next((MOOD_WORDS[w] for w in words if w in MOOD_WORDS), ""),
                        "pickup": pickup(block, metre),
                        "abc": block,
                    }
                )
    return tunes


def add_notes(tunes: list[dict]) -> list[dict]:
    """Play each tune through abc2midi and keep its notes: [start, duration] in quarters, and MIDI pitch."""
    import pretty_midi  # needed here only, and nowhere but in the recipes

    kept = []
    with tempfile.TemporaryDirectory() as folder:
        for i, tune in enumerate(tunes):
            # One process a tune: in a whole book abc2midi stops for good at the first tune that it cannot read.
            source, path = Path(folder) / f"{i}.abc", Path(folder) / f"{i}.mid"
            source.write_text(tune.pop("abc"), encoding="utf8")
            command = ["abc2midi", str(source), "-quiet", "-silent", "-NGRA", "-o", str(path)]
            subprocess.run(command, capture_output=True, check=False)
            if not path.exists():
                continue
            try:
                midi = pretty_midi.PrettyMIDI(str(path))
            except (ValueError, OSError, EOFError, IndexError):  # a few tunes are malformed
                continue
            notes = sorted((n for part in midi.instruments for n in part.notes), key=lambda n: n.start)
            if len(notes) < MIN_NOTES:
                continue
            quarter = 60 / midi.get_tempo_changes()[1][0]
            tune["notes"] = [
                [round((n.start - notes[0].start) / quarter, 4), round((n.end - n.start) / quarter, 4), n.pitch]
                for n in notes
            ]
            kept.append(tune)
    return kept


def beat_intervals(tune: dict) -> tuple:
    """Intervals between the pitches that sound on the first beats."""
    notes = tune["notes"]
    on_beats = [next((p for at, length, p in notes if at <= beat < at + length), None) for beat in range(INCIPIT_NOTES)]
    pitches = [pitch for pitch in on_beats if pitch is not None]
    return tuple(b - a for a, b in zip(pitches, pitches[1:], strict=False))


def split_by_tune(tunes: list[dict]) -> None:
    """Give each tune its "split": groups are tunes with the same title or the same first intervals (union-find)."""
    parent = list(range(len(tunes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[object, int] = {}
    for i, tune in enumerate(tunes):
        title = re.sub(r"\(.*?\)|\b(the|a|an|no|\d+)\b|[^a-z ]", "", tune["title"].lower())
        title = " ".join(sorted(title.split()))  # "Rover, The" is "The Rover"
        pitches = [pitch for _, _, pitch in tune["notes"][: INCIPIT_NOTES + 1]]
        incipit = tuple(b - a for a, b in zip(pitches, pitches[1:], strict=False))
        marks: list[tuple] = [("title", title), ("incipit", incipit)]
        if tune["kind"] == "chorale":  # one melody in several settings, with other passing notes in each
            marks = [("incipit", incipit), ("beats", beat_intervals(tune))]
        for mark in marks:
            parent[root(i)] = root(first_with.setdefault(mark, i))
    for i, tune in enumerate(tunes):
        # A hash of the group's title, not a draw: the split stays when tunes are added elsewhere.
        place = int(hashlib.sha256(tunes[root(i)]["title"].encode()).hexdigest(), 16) % 10_000 / 10_000
        tune["split"] = "train"
        for split, share in SPLIT_SHARES.items():
            if 0 <= place < share:
                tune["split"] = split
            place -= share


def find_corpus() -> Path:
    """Where music21 keeps its corpus in this environment (the package itself is not imported)."""
    spec = importlib.util.find_spec("music21")
    if spec is None:
        raise SystemExit("music21 is not installed: pip install music21, or name its corpus folder with --corpus")
    return Path(spec.origin).parent / "corpus"


def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="music21's corpus folder (default: the installed package's)")
    args = parser.parse_args()
    start(args)
    out = args.work / "tunes.json"
    if out.exists() and not args.force:
        return say(f"{out} is there: {len(read_json(out))} tunes")
    corpus = args.corpus or find_corpus()
    written, sung = read_tunes(corpus), read_chorales(corpus)
    if args.tiny:
        step = max(1, (len(written) + len(sung)) // TINY_TUNES)
        written, sung = written[::step], sung[::step]
    tunes = add_notes(written) + sung
    split_by_tune(tunes)
    write_json(out, tunes)
    counts = {name: dict(Counter(t[name] for t in tunes)) for name in ("split", "mode", "kind", "book")}
    say(f"{len(tunes)} tunes: {counts}")
    record(args, "corpus", {"tunes": len(tunes), **counts})


if __name__ == "__main__":
    main()
