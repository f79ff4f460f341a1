"""From a tune to the notes of a clip: tempo, key and place in the tune, and an accompaniment by rule."""

import random

import numpy as np
from captions import INSTRUMENTS, mood_by_rule
from common import CLIP_S

BPM = {"slow": (56, 72), "moderate": (78, 96), "fast": (104, 128)}  # beats a minute
COMPOUND_BPM = {"slow": (48, 60), "moderate": (68, 82), "fast": (92, 112)}  # a beat is a dotted quarter
NOTE_NAMES = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
CENTRE = {"cello": 52, "tin whistle": 81, "music box": 79, "flute": 76, "church organ": 64}  # MIDI pitch; else 69
KICK, SNARE, HI_HAT = 36, 38, 42
BASS_PROGRAM, CHORD_PROGRAM = 32, {"piano": 24, "synth lead": 81}  # chords are a piano's, but not beside a piano
MAX_NOTES_PER_S, MIN_NOTES, MAX_LAST_GAP_S = 6.5, 8, 1.5
Note = tuple[float, float, int, int]  # start (s), end (s), MIDI pitch, velocity
Part = tuple[int, bool, list[Note]]  # General MIDI program, is drums, notes


def beat_in_quarters(tune: dict, median_note: float) -> float:
    """A beat's length in quarters: dotted in compound metres, an eighth where a tune is written in sixteenths."""
    beats, unit = tune["metre"]
    if unit == 8 and beats % 3 == 0:
        return 1.5
    return 0.5 if unit == 4 and median_note <= 0.26 else 1.0


def excerpt(voice: list, begin: float, seconds_per_quarter: float, shift: int, velocity: int) -> list[Note]:
    """A voice from `begin` (quarters) for ten seconds, transposed by `shift` semitones."""
    notes = []
    for at, length, pitch in voice:
        onset = (at - begin) * seconds_per_quarter
        if 0 <= onset < CLIP_S:
            notes.append((onset, onset + max(0.06, length * seconds_per_quarter), pitch + shift, velocity))
    return notes


def harmony(notes: list[Note], tonic: int, mode: str, first_bar: float, bar_s: float) -> list[tuple[int, int, int]]:
    """One triad a bar, the one of I, IV, V, vi, ii that covers most of the bar's melody; MIDI pitches from C3 up.

    Args:
        first_bar: seconds before the first bar line (an upbeat); bars run from there.
    """
    scale, triads = SCALES[mode], []
    for bar in range(int((CLIP_S - first_bar) / bar_s) + 1):
        bar_begin = first_bar + bar * bar_s
        weight = np.zeros(12)
        for begin, end, pitch, _ in notes:
            weight[pitch % 12] += max(0.0, min(end, bar_begin + bar_s) - max(begin, bar_begin))

        def covered(degree: int, weight: np.ndarray = weight) -> float:
            third_stack = [(tonic + scale[(degree + k) % 7]) % 12 for k in (0, 2, 4)]
            return weight[third_stack].sum() + (0.05 if degree == 0 else 0)

        degree = max((0, 3, 4, 5, 1), key=covered)
        root = 48 + (tonic + scale[degree]) % 12
        triads.append(tuple(root + (scale[(degree + k) % 7] - scale[degree]) % 12 for k in (0, 2, 4)))
    return triads


def accompaniment(
    backing: str, triads: list[tuple[int, int, int]], first_bar: float, bar_s: float, n_beats: int
) -> dict[str, list[Note]]:
    """The notes of "chords", "bass" and "drums" that a backing has."""
    parts: dict[str, list[Note]] = {"chords": [], "bass": [], "drums": []}
    beat_s = bar_s / n_beats
    for bar, triad in enumerate(triads):
        begin = first_bar + bar * bar_s
        for half in (0, 1):
            at = begin + half * bar_s / 2
            if backing in ("chords", "band"):
                parts["chords"] += [(at, at + bar_s * 0.475, pitch, 62) for pitch in triad]
            if backing in ("bass", "band"):
                parts["bass"].append((at, at + bar_s * 0.45, (triad[0], triad[2])[half] - 12, 92))
        if backing == "arpeggio":
            figure = (triad[0], triad[1], triad[2], triad[0] + 12, triad[2], triad[1])
            for step in range(2 * n_beats):
                at = begin + step * beat_s / 2
                parts["chords"].append((at, at + beat_s * 0.55, figure[step % len(figure)], 74))
        if backing in ("drums", "band"):
            for beat in range(n_beats):
                at = begin + beat * beat_s
                parts["drums"].append((at, at + 0.1, KICK if beat % 2 == 0 else SNARE, 92))
                parts["drums"] += [(at, at + 0.05, HI_HAT, 55), (at + beat_s / 2, at + beat_s / 2 + 0.05, HI_HAT, 45)]
    return parts


def arrange(
    tune: dict, instrument: str, backing: str, tempo: str, rng: random.Random
) -> tuple[dict, list[Part]] | None:
    """Choose speed, key and place; the clip's facts and its parts, or None where the tune does not fit the tempo."""
    lengths = [length for _, length, _ in tune["notes"]]
    beat = beat_in_quarters(tune, float(np.median(lengths)))
    bpm = rng.uniform(*(COMPOUND_BPM if beat == 1.5 else BPM)[tempo])
    seconds_per_quarter = 60 / bpm / beat
    bar_quarters = tune["metre"][0] * 4 / tune["metre"][1]
    bar_s = bar_quarters * seconds_per_quarter
    # Start where an eight-bar strain starts, so that a clip begins like a tune does.
    last = tune["notes"][-1][0] - CLIP_S / seconds_per_quarter
    begins = [0.0] + [8 * bar_quarters * k for k in range(1, 5) if 8 * bar_quarters * k < last]
    begin = rng.choice(begins)
    tonic = rng.randrange(12)
    mean_pitch = np.mean([pitch for _, _, pitch in tune["notes"]])
    shift = (tonic - tune["tonic"]) % 12
    shift += 12 * round((CENTRE.get(instrument, 69) - mean_pitch - shift) / 12)
    notes = excerpt(tune["notes"], begin, seconds_per_quarter, shift, 100)
    too_many = len(notes) > MAX_NOTES_PER_S * CLIP_S
    if too_many or len(notes) < MIN_NOTES or notes[-1][1] < CLIP_S - MAX_LAST_GAP_S or notes[0][0] > 1:
        return None
    first_bar = tune["pickup"] * seconds_per_quarter
    printed = tune["printed_mood"] if rng.random() < 0.5 else ""
    row = {
        "instrument": instrument,
        "backing": backing,
        "bpm": round(bpm, 1),
        "tempo": tempo,
        "key": NOTE_NAMES[tonic],
        "mode": tune["mode"],
        "metre": "{}/{}".format(*tune["metre"]),
        "kind": tune["kind"],
        "mood": printed or mood_by_rule(tune["mode"], tempo, instrument, rng),
        "mood_source": "printed" if printed else "rule",
        "title": tune["title"],
        "book": tune["book"],
        "first_bar_s": round(first_bar, 4),
        "beats_in_bar": max(1, round(bar_quarters / beat)),
    }
    n_beats = max(2, round(bar_quarters / beat)) if beat != 0.5 else 2
    triads = harmony(notes, tonic, tune["mode"], first_bar, bar_s)
    backed = accompaniment(backing, triads, first_bar, bar_s, n_beats)
    if backing == "chords" and "voices" in tune:  # a chorale brings its own
        lower = [excerpt(voice, begin, seconds_per_quarter, shift, 72) for voice in tune["voices"]]
        backed["chords"] = [note for voice in lower for note in voice]
    parts = [(INSTRUMENTS[instrument], False, notes), (CHORD_PROGRAM.get(instrument, 0), False, backed["chords"])]
    parts += [(BASS_PROGRAM, False, backed["bass"]), (0, True, backed["drums"])]
    return row, [part for part in parts if part[2]]
