"""Stage 2: clips. Each tune is set for an instrument and an accompaniment, played by a sound font and captioned.

    python recipes/render.py --work build/tiny

Writes clips_SPLIT.npy (int16, [N, 160000]) and rows_SPLIT.json. Needs Debian's `fluidr3mono-gm-soundfont` (MIT).
"""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import tinysoundfont
from captions import BACKINGS, DANCES, INSTRUMENTS, captions, mood_by_rule
from common import CLIP_S, SAMPLING_RATE, read_json, record, say, stage_arguments, start, write_array, write_json

SOUND_FONT = Path("/usr/share/fluidr3mono-gm-soundfont/FluidR3Mono_GM.sf3")
N_CLIPS = {"train": 4000, "validation": 200, "test": 200}
MODE_SHARES = {"major": 0.5, "minor": 0.34, "dorian": 0.08, "mixolydian": 0.08}  # the books: 83 % major
BPM = {"slow": (56, 72), "moderate": (78, 96), "fast": (104, 128)}  # beats a minute
COMPOUND_BPM = {"slow": (48, 60), "moderate": (68, 82), "fast": (92, 112)}  # a beat is a dotted quarter
TEMPO_SHARES = {"air": (0.7, 0.25, 0.05), "waltz": (0.35, 0.4, 0.25), "folk tune": (0.35, 0.35, 0.3)}
DANCE_TEMPO_SHARES = (0.2, 0.3, 0.5)
MAX_NOTES_PER_S = 6.5
NOTE_NAMES = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
CENTRE = {"cello": 52, "tin whistle": 81, "music box": 79, "flute": 76, "church organ": 64}  # MIDI pitch; else 69
RMS, PEAK = 0.1, 0.9  # loudness of every clip, full scale 1.0: no clip is chosen for being louder
DRUM_CHANNEL, KICK, SNARE, HI_HAT = 9, 36, 38, 42
Note = tuple[float, float, int, int]  # start (s), end (s), MIDI pitch, velocity


def beat_in_quarters(tune: dict, median_note: float) -> float:
    """A beat's length in quarters: dotted in compound metres, an eighth where a tune is written in sixteenths."""
    beats, unit = tune["metre"]
    if unit == 8 and beats % 3 == 0:
        return 1.5
    return 0.5 if unit == 4 and median_note <= 0.26 else 1.0


def melody(tune: dict, row: dict, begin: float, seconds_per_quarter: float, shift: int) -> list[Note]:
    """The tune from `begin` (quarters) for ten seconds, transposed by `shift` semitones."""
    notes = []
    for at, length, pitch in tune["notes"]:
        onset = (at - begin) * seconds_per_quarter
        if 0 <= onset < CLIP_S:
            notes.append((onset, onset + max(0.06, length * seconds_per_quarter), pitch + shift, 100))
    return notes


def harmony(notes: list[Note], tonic: int, mode: str, bar_s: float) -> list[tuple[int, int, int]]:
    """One triad a bar, the one of I, IV, V, vi, ii that covers most of the bar's melody; MIDI pitches from C3 up."""
    scale, triads = SCALES[mode], []
    for bar in range(int(CLIP_S / bar_s) + 1):
        weight = np.zeros(12)
        for begin, end, pitch, _ in notes:
            weight[pitch % 12] += max(0.0, min(end, (bar + 1) * bar_s) - max(begin, bar * bar_s))

        def covered(degree: int, weight: np.ndarray = weight) -> float:
            third_stack = [(tonic + scale[(degree + k) % 7]) % 12 for k in (0, 2, 4)]
            return weight[third_stack].sum() + (0.05 if degree == 0 else 0)

        degree = max((0, 3, 4, 5, 1), key=covered)
        root = 48 + (tonic + scale[degree]) % 12
        triads.append(tuple(root + (scale[(degree + k) % 7] - scale[degree]) % 12 for k in (0, 2, 4)))
    return triads


def accompaniment(
    backing: str, triads: list[tuple[int, int, int]], bar_s: float, n_beats: int
) -> dict[str, list[Note]]:
    """The notes of "chords", "bass" and "drums" that a backing has."""
    parts: dict[str, list[Note]] = {"chords": [], "bass": [], "drums": []}
    beat_s = bar_s / n_beats
    for bar, triad in enumerate(triads):
        begin = bar * bar_s
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


class Player:
    """The sound font, loaded once: notes to a mono waveform."""

    def __init__(self) -> None:
        self.synth = tinysoundfont.Synth(samplerate=SAMPLING_RATE)
        self.font = self.synth.sfload(str(SOUND_FONT))

    def play(self, parts: list[tuple[int, bool, list[Note]]]) -> np.ndarray:
        """(program, is drums, notes) for each part, to float32 [T] at 16 kHz, at the common loudness."""
        events, channel = [], 0
        for program, is_drums, notes in parts:
            use = DRUM_CHANNEL if is_drums else channel
            channel += not is_drums
            self.synth.program_select(use, self.font, 128 if is_drums else 0, program, is_drums)
            for begin, end, pitch, velocity in notes:
                events += [(begin, 1, use, pitch, velocity), (end, 0, use, pitch, 0)]
        sound, done, total = [], 0, CLIP_S * SAMPLING_RATE
        for at, is_on, use, pitch, velocity in [*sorted(events), (CLIP_S, 0, 0, 0, 0)]:
            until = min(int(at * SAMPLING_RATE), total)
            if until > done:
                sound.append(np.frombuffer(bytes(self.synth.generate(until - done)), np.float32).reshape(-1, 2).mean(1))
                done = until
            if done == total:
                break
            self.synth.noteon(use, pitch, velocity) if is_on else self.synth.noteoff(use, pitch)
        self.synth.sounds_off()
        clip = np.concatenate(sound)
        gain = min(RMS / max(np.sqrt((clip**2).mean()), 1e-6), PEAK / max(np.abs(clip).max(), 1e-6))
        return clip * gain


def arrange(tune: dict, instrument: str, backing: str, rng: random.Random) -> tuple[dict, list]:
    """Choose tempo, key and place; return the clip's row and its parts for the player."""
    lengths = [length for _, length, _ in tune["notes"]]
    shares = DANCE_TEMPO_SHARES if tune["kind"] in DANCES else TEMPO_SHARES.get(tune["kind"], TEMPO_SHARES["folk tune"])
    tempo = rng.choices(list(BPM), shares)[0]
    beat = beat_in_quarters(tune, float(np.median(lengths)))
    bpm = rng.uniform(*(COMPOUND_BPM if beat == 1.5 else BPM)[tempo])
    seconds_per_quarter = 60 / bpm / beat
    bar_quarters = tune["metre"][0] * 4 / tune["metre"][1]
    # Start where an eight-bar strain starts, so that a clip begins like a tune does.
    last = tune["notes"][-1][0] - CLIP_S / seconds_per_quarter
    begins = [0.0] + [8 * bar_quarters * k for k in range(1, 5) if 8 * bar_quarters * k < last]
    begin = rng.choice(begins)
    onsets = [at for at, _, _ in tune["notes"] if 0 <= (at - begin) * seconds_per_quarter < CLIP_S]
    begin = onsets[0] if onsets else 0.0
    tonic = rng.randrange(12)
    mean_pitch = np.mean([pitch for _, _, pitch in tune["notes"]])
    shift = (tonic - tune["tonic"]) % 12
    shift += 12 * round((CENTRE.get(instrument, 69) - mean_pitch - shift) / 12)
    row = {
        "instrument": instrument,
        "backing": backing,
        "bpm": round(bpm, 1),
        "tempo": tempo,
        "key": NOTE_NAMES[tonic],
        "mode": tune["mode"],
        "metre": "{}/{}".format(*tune["metre"]),
        "kind": tune["kind"],
        "mood": tune["printed_mood"] if rng.random() < 0.5 else "",
        "title": tune["title"],
        "book": tune["book"],
    }
    row["mood"] = row["mood"] or mood_by_rule(tune["mode"], tempo, instrument, rng)
    notes = melody(tune, row, begin, seconds_per_quarter, shift)
    bar_s = bar_quarters * seconds_per_quarter
    n_beats = max(2, round(bar_quarters / beat)) if beat != 0.5 else 2
    backed = accompaniment(backing, harmony(notes, tonic, tune["mode"], bar_s), bar_s, n_beats)
    chord_program = {"piano": 24, "synth lead": 81}.get(instrument, 0)
    parts = [(INSTRUMENTS[instrument], False, notes), (chord_program, False, backed["chords"])]
    parts += [(32, False, backed["bass"]), (0, True, backed["drums"])]
    return row, [part for part in parts if part[2]]


def render_split(
    split: str, tunes: list[dict], n_clips: int, player: Player, seed: int
) -> tuple[np.ndarray, list[dict]]:
    """`n_clips` clips [N, T] of a split: instruments and backings in turn, modes by share, tunes in shuffled turns."""
    rng = random.Random(f"{seed}-{split}")
    by_mode = {mode: [t for t in tunes if t["split"] == split and t["mode"] == mode] for mode in MODE_SHARES}
    by_mode = {mode: rng.sample(some, len(some)) for mode, some in by_mode.items() if some}
    turn: Counter = Counter()
    settings = [(name, backing) for name in INSTRUMENTS for backing in BACKINGS]
    clips, rows = np.zeros((n_clips, CLIP_S * SAMPLING_RATE), np.int16), []
    queue: list[tuple[str, str]] = []
    while len(rows) < n_clips:
        mode = rng.choices(list(by_mode), [MODE_SHARES[m] for m in by_mode])[0]
        tune = by_mode[mode][turn[mode] % len(by_mode[mode])]
        turn[mode] += 1
        queue = queue or rng.sample(settings, len(settings))
        row, parts = arrange(tune, *queue[-1], rng)
        melody_notes = parts[0][2]
        if len(melody_notes) < 8 or len(melody_notes) > MAX_NOTES_PER_S * CLIP_S or melody_notes[-1][1] < CLIP_S - 1.5:
            continue
        queue.pop()
        clips[len(rows)] = np.round(player.play(parts) * 32767).astype(np.int16)
        rows.append(row | {"captions": captions(row, 8, rng)})
        if len(rows) % 500 == 0:
            say(f"{split}: {len(rows)} of {n_clips} clips")
    return clips, rows


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0]).parse_args()
    start(args)
    tunes = read_json(args.work / "tunes.json")
    player = Player()
    measured = {}
    for split, n_clips in N_CLIPS.items():
        out = args.work / f"clips_{split}.npy"
        if out.exists() and not args.force:
            say(f"{out} is there")
            continue
        clips, rows = render_split(split, tunes, n_clips, player, args.seed)
        write_json(args.work / f"rows_{split}.json", rows)
        write_array(out, clips)
        measured[split] = {"clips": len(rows), "hours": round(len(rows) * CLIP_S / 3600, 2)}
        measured[split] |= {name: dict(Counter(r[name] for r in rows)) for name in ("mode", "tempo", "mood", "kind")}
    if len(measured) == len(N_CLIPS):
        record("render", measured)


if __name__ == "__main__":
    main()
