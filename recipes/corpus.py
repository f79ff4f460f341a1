"""Stage 1: tunes. Three ABC collections of music21's corpus become notes in beats, split by tune.

    python recipes/corpus.py --work build/tiny --corpus .../site-packages/music21/corpus

Needs Debian's `abcmidi`. The same tune stands in several books under one title or under several, so tunes that share a
normalised title or an incipit are one group, and a group is in one split.
"""

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pretty_midi
from captions import MOOD_WORDS
from common import read_json, record, say, stage_arguments, start, write_json

BOOKS = ("oneills1850", "ryansMammoth", "airdsAirs")  # O'Neill's, Ryan's, Aird's: see ATTRIBUTION.md
INCIPIT_NOTES = 12
MIN_NOTES = 24
HELD_OUT_SHARE = 0.07  # of the tunes, for validation and again for test
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
                        "abc": block,
                    }
                )
    return tunes


def add_notes(tunes: list[dict]) -> list[dict]:
    """Play each tune through abc2midi and keep its notes: [start, duration] in quarters, and MIDI pitch."""
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
        for mark in (("title", title), ("incipit", incipit)):
            parent[root(i)] = root(first_with.setdefault(mark, i))
    for i, tune in enumerate(tunes):
        # A hash of the group's title, not a draw: the split stays when tunes are added elsewhere.
        place = int(hashlib.sha256(tunes[root(i)]["title"].encode()).hexdigest(), 16) % 10_000 / 10_000
        held_out = "test" if place < 2 * HELD_OUT_SHARE else "train"
        tune["split"] = "validation" if place < HELD_OUT_SHARE else held_out


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
    tunes = add_notes(read_tunes(args.corpus or find_corpus()))
    split_by_tune(tunes)
    write_json(out, tunes)
    counts = {name: dict(Counter(t[name] for t in tunes)) for name in ("split", "mode", "kind", "book")}
    say(f"{len(tunes)} tunes: {counts}")
    record("corpus", {"tunes": len(tunes), **counts})


if __name__ == "__main__":
    main()
