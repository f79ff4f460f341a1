"""The score of a clip, frame by frame, and heads that read it from the generator's decoder while it trains.

A code is mostly about timbre, so a loss over codes says little about notes: when the next one comes and which are a small
part of its nats. Here linear layers have to tell, before each frame, where in the beat it lies and which beat of the bar it
is (behind an early layer, so that the later ones have a clock), which pitch the melody has, and whether a note begins in it
(behind the last layer, which the codes are read from). The heads are thrown away with the training; nothing but the notes
that were rendered is needed for them.
"""

from pathlib import Path

import numpy as np
import torch
from arrange import Part
from common import CLIP_S, FRAME_RATE, read_json, say, write_array
from render import N_CLIPS, TINY_CLIPS, arrangements
from torch import Tensor, nn

LOWEST, HIGHEST = 36, 103  # MIDI pitches of the melody that are told apart; beyond them the nearest
PHASES, MOST_BEATS = 12, 8  # parts of a beat; beats of a bar
SIZES = {"phase": PHASES, "beat": MOST_BEATS, "melody": HIGHEST - LOWEST + 2, "onset": 2, "other_onset": 2}
CLOCK = ("phase", "beat")  # read behind the early layer
WEIGHTS = {"phase": 5.0, "beat": 2.0, "melody": 1.0, "onset": 4.0, "other_onset": 4.0}  # an onset has few nats


def score_frames(row: dict, parts: list[Part]) -> np.ndarray:
    """Classes [5, F] int8 in the order of `SIZES`, of a clip's row and parts; a frame is where its middle lies.

    phase: twelfth of the beat; beat: of the bar; melody: 0 is a rest; onset: a melody note begins in the frame;
    other_onset: one of the accompaniment does.
    """
    n_frames = CLIP_S * FRAME_RATE
    middle = (np.arange(n_frames) + 0.5) / FRAME_RATE  # seconds
    melody = np.zeros(n_frames, np.int8)
    onsets = np.zeros((2, n_frames), np.int8)
    for number, (_, _, notes) in enumerate(parts):
        for begin, end, pitch, _ in notes:
            if begin < CLIP_S:
                onsets[min(number, 1), int(begin * FRAME_RATE)] = 1
            if number == 0:
                melody[(middle >= begin) & (middle < end)] = np.clip(pitch, LOWEST, HIGHEST) - LOWEST + 1
    beats = (middle - row["first_bar_s"]) * row["bpm"] / 60
    phase = np.floor(beats * PHASES).astype(int) % PHASES
    beat = np.minimum(np.floor(beats).astype(int) % row["beats_in_bar"], MOST_BEATS - 1)
    return np.stack([phase, beat, melody, *onsets]).astype(np.int8)


def load_or_write_scores(work: Path, split: str, n_clips: int, seed: int, tiny: bool) -> np.ndarray:
    """`score_frames` [N, 5, F] of the first clips of a split, from score_SPLIT.npy or arranged again by the same seed."""
    path = work / f"score_{split}.npy"
    if not path.exists():
        say(f"writing {path}")
        tunes = read_json(work / "tunes.json")
        arranged = arrangements(split, tunes, (TINY_CLIPS if tiny else N_CLIPS)[split], seed)
        write_array(path, np.stack([score_frames(row, parts) for row, parts in arranged]))
    scores = np.load(path)
    if len(scores) < n_clips:
        raise SystemExit(f"{path} has {len(scores)} clips, {n_clips} are needed: delete it, and it is written again")
    return scores


def bar_lines(scores: np.ndarray) -> list[np.ndarray]:
    """The frames in which bars begin, of each clip of scores [N, 5, F]."""
    phase, beat = scores[:, list(SIZES).index("phase")], scores[:, list(SIZES).index("beat")]
    before = np.concatenate([np.full_like(phase[:, :1], PHASES), phase[:, :-1]], 1)
    # In a bar of one beat the beat never changes, but its parts begin again.
    begins = (beat == 0) & (phase < before)
    begins[:, 0] &= phase[:, 0] == 0
    return [np.flatnonzero(row) for row in begins]


class ScoreHeads(nn.Module):
    """Linear layers on the states behind two layers of the decoder.

    Args:
        clock: the layer behind which `CLOCK` is read; its output [B, S, D] is kept at each forward pass.
        notes: the layer behind which the rest is read.
        width: D.
    """

    def __init__(self, clock: nn.Module, notes: nn.Module, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in SIZES.items()})
        self.states: dict[str, Tensor] = {}
        for name, layer in (("clock", clock), ("notes", notes)):
            layer.register_forward_hook(lambda module, inputs, output, name=name: self._keep(name, output))

    def _keep(self, name: str, output: Tensor | tuple) -> None:
        self.states[name] = output if isinstance(output, Tensor) else output[0]

    def losses(self, score: Tensor) -> Tensor:
        """Cross entropy in nats [5] of the score [B, 5, F] in the last forward pass: step f knows the frames before f."""
        found = []
        for i, (name, head) in enumerate(self.heads.items()):
            states = self.states["clock" if name in CLOCK else "notes"][:, : score.shape[-1]]
            found.append(nn.functional.cross_entropy(head(states).float().flatten(0, 1), score[:, i].flatten()))
        return torch.stack(found)

    def loss(self, losses: Tensor) -> Tensor:
        """One number of `losses` [5], by `WEIGHTS`."""
        return losses @ losses.new_tensor(list(WEIGHTS.values())) / len(WEIGHTS)
