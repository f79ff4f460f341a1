"""Stage 2: clips. Each tune is set for an instrument and an accompaniment, played by a sound font and captioned.

    python recipes/render.py --work build/tiny

Writes clips_SPLIT.npy (int16, [N, 160000]) and rows_SPLIT.json. Needs Debian's `fluidr3mono-gm-soundfont` (MIT), and
`timgm6mb-soundfont` for one test set of another timbre: that font is under the GPL, and no training clip is played with
it. (MuseScore's smaller font would not do: nine of its sixteen instruments here are FluidR3's own samples.)

An interrupted run goes on behind the last clip that was written: which clips there are follows from the seed alone.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from arrange import Part, arrange
from captions import BACKINGS, INSTRUMENTS, TEMPI, captions, paraphrase
from common import CLIP_S, SAMPLING_RATE, read_json, record, say, stage_arguments, start, write_json

SOUND_FONT = Path("/usr/share/fluidr3mono-gm-soundfont/FluidR3Mono_GM.sf3")
OTHER_SOUND_FONT = Path("/usr/share/sounds/sf2/TimGM6mb.sf2")
N_CLIPS = {"train": 12_096, "judges": 1_728, "validation": 288, "test": 576}  # whole turns of the 288 settings
OTHER_TIMBRE_CLIPS = 288  # the first of the test clips, played by the other font
TINY_CLIPS = {"train": 288, "judges": 144, "validation": 16, "test": 32}
MODE_SHARES = {"major": 0.46, "minor": 0.34, "dorian": 0.1, "mixolydian": 0.1}  # the books: 83 % major
RMS, PEAK = 0.1, 0.9  # loudness of every clip, full scale 1.0: no clip is chosen for being louder
DRUM_CHANNEL = 9
SAVE_EVERY = 288  # clips
TAIL_S = 0.5  # played for nobody between two clips


class Player:
    """A sound font, loaded once: notes to a mono waveform."""

    def __init__(self, sound_font: Path) -> None:
        import tinysoundfont  # needed here only: what is arranged and captioned can be read without it

        if not sound_font.exists():
            raise SystemExit(f"{sound_font} is missing: apt-get install fluidr3mono-gm-soundfont timgm6mb-soundfont")
        self.synth = tinysoundfont.Synth(samplerate=SAMPLING_RATE)
        self.font = self.synth.sfload(str(sound_font))

    def sound(self, n_samples: int) -> np.ndarray:
        return np.frombuffer(bytes(self.synth.generate(n_samples)), np.float32).reshape(-1, 2).mean(1)

    def play(self, parts: list[Part]) -> np.ndarray:
        """The parts as float32 [T] at 16 kHz, at the common loudness."""
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
                sound.append(self.sound(until - done))
                done = until
            if done == total:
                break
            self.synth.noteon(use, pitch, velocity) if is_on else self.synth.noteoff(use, pitch)
        self.synth.sounds_off()
        # The voices fade for some milliseconds yet, which the next clip would begin with.
        self.sound(int(TAIL_S * SAMPLING_RATE))
        clip = np.concatenate(sound)
        gain = min(RMS / max(np.sqrt((clip**2).mean()), 1e-6), PEAK / max(np.abs(clip).max(), 1e-6))
        return clip * gain


def arrangements(split: str, tunes: list[dict], n_clips: int, seed: int) -> Iterator[tuple[dict, list[Part]]]:
    """`n_clips` rows and their parts: instruments, backings and tempi in turn, modes by share, tunes in shuffled turns."""
    rng = random.Random(f"{seed}-{split}")
    by_mode = {mode: [t for t in tunes if t["split"] == split and t["mode"] == mode] for mode in MODE_SHARES}
    by_mode = {mode: rng.sample(some, len(some)) for mode, some in by_mode.items() if some}
    if not by_mode:
        raise SystemExit(f"No tunes in split {split}: more tunes are needed than {len(tunes)}.")
    settings = [(name, backing, tempo) for name in INSTRUMENTS for backing in BACKINGS for tempo in TEMPI]
    turn: Counter = Counter()
    queue: list[tuple[str, str, str]] = []
    made = 0
    while made < n_clips:
        mode = rng.choices(list(by_mode), [MODE_SHARES[m] for m in by_mode])[0]
        tune = by_mode[mode][turn[mode] % len(by_mode[mode])]
        turn[mode] += 1
        queue = queue or rng.sample(settings, len(settings))
        arranged = arrange(tune, *queue[-1], rng)
        if arranged is None:  # too many notes for this tempo, or too short: another tune takes the setting
            continue
        queue.pop()
        row, parts = arranged
        row["captions"] = captions(row, rng)
        if split not in ("train", "judges"):
            row["paraphrase"] = paraphrase(row, rng)
        made += 1
        yield row, parts


def render_split(args, name: str, split: str, tunes: list[dict], n_clips: int, sound_font: Path) -> None:
    """Write clips_NAME.npy and rows_NAME.json with the first `n_clips` arrangements of `split`."""
    out, aside = args.work / f"clips_{name}.npy", args.work / f"clips_{name}.npy.part"
    progress = args.work / f"clips_{name}.json"
    shape = (n_clips, CLIP_S * SAMPLING_RATE)
    done = read_json(progress)["done"] if progress.exists() and aside.exists() and not args.force else 0
    clips = np.lib.format.open_memmap(aside, "r+" if done else "w+", np.int16, shape)
    player, rows = Player(sound_font), []
    for index, (row, parts) in enumerate(arrangements(split, tunes, n_clips, args.seed)):
        rows.append(row)
        if index < done:
            continue
        clips[index] = np.round(player.play(parts) * 32767).astype(np.int16)
        if len(rows) % SAVE_EVERY == 0:
            clips.flush()
            write_json(progress, {"done": len(rows)})
            say(f"{name}: {len(rows)} of {n_clips} clips")
    clips.flush()
    write_json(args.work / f"rows_{name}.json", rows)
    os.replace(aside, out)
    progress.unlink(missing_ok=True)


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0]).parse_args()
    start(args)
    tunes = read_json(args.work / "tunes.json")
    sizes = TINY_CLIPS if args.tiny else N_CLIPS
    sets = [(split, split, n_clips, SOUND_FONT) for split, n_clips in sizes.items()]
    sets.append(("test_other_font", "test", min(OTHER_TIMBRE_CLIPS, sizes["test"]), OTHER_SOUND_FONT))
    measured = {}
    for name, split, n_clips, sound_font in sets:
        if not (args.work / f"clips_{name}.npy").exists() or args.force:
            render_split(args, name, split, tunes, n_clips, sound_font)
        rows = read_json(args.work / f"rows_{name}.json")
        measured[name] = {
            "clips": len(rows),
            "hours": round(len(rows) * CLIP_S / 3600, 2),
            "sound_font": sound_font.name,
            "tunes": len({(row["book"], row["title"]) for row in rows}),
        }
        for fact in ("mode", "tempo", "mood", "mood_source", "kind"):
            measured[name][fact] = dict(Counter(row[fact] for row in rows).most_common())
    say(str({name: (found["clips"], found["tunes"]) for name, found in measured.items()}))
    record(args, "render", measured)


if __name__ == "__main__":
    main()
