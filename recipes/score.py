"""The score of a clip, frame by frame, and heads that read it from the generator's decoder while it trains.

A code is mostly about timbre, so a loss over codes says little about notes: the melody's next pitch and the beat are a small
part of its nats. Here a linear layer has to tell, before each frame, which pitch the melody has in it, where in the beat it
lies, and which beat of the bar it is. What the decoder must keep for that (a key, a clock) is then at hand for the codes.
The heads are thrown away with the training; nothing but the notes that were rendered is needed for them.
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
SIZES = {"melody": HIGHEST - LOWEST + 2, "phase": PHASES, "beat": MOST_BEATS}  # the melody's class 0 is a rest


def score_frames(row: dict, parts: list[Part]) -> np.ndarray:
    """Classes [3, F] int8 in the order of `SIZES`, of a clip's row and parts; a frame is where its middle lies."""
    middle = (np.arange(CLIP_S * FRAME_RATE) + 0.5) / FRAME_RATE  # seconds
    melody = np.zeros(len(middle), np.int8)
    for begin, end, pitch, _ in parts[0][2]:
        melody[(middle >= begin) & (middle < end)] = np.clip(pitch, LOWEST, HIGHEST) - LOWEST + 1
    beats = (middle - row["first_bar_s"]) * row["bpm"] / 60
    phase = np.floor(beats * PHASES).astype(int) % PHASES
    beat = np.minimum(np.floor(beats).astype(int) % row["beats_in_bar"], MOST_BEATS - 1)
    return np.stack([melody, phase, beat]).astype(np.int8)


def load_or_write_scores(work: Path, split: str, n_clips: int, seed: int, tiny: bool) -> np.ndarray:
    """`score_frames` [N, 3, F] of the first clips of a split, from score_SPLIT.npy or arranged again by the same seed."""
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
    """The frames in which bars begin, of each clip of scores [N, 3, F]."""
    phase, beat = scores[:, list(SIZES).index("phase")], scores[:, list(SIZES).index("beat")]
    before = np.concatenate([np.full_like(phase[:, :1], PHASES), phase[:, :-1]], 1)
    # In a bar of one beat the beat never changes, but its parts begin again.
    begins = (beat == 0) & (phase < before)
    begins[:, 0] &= phase[:, 0] == 0
    return [np.flatnonzero(row) for row in begins]


class ScoreHeads(nn.Module):
    """A linear layer on the states behind one layer of the decoder.

    Args:
        layer: of the decoder; its output [B, S, D] is kept at each forward pass.
        width: D.
    """

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, sum(SIZES.values()))
        self.states = torch.empty(0)
        layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        self.states = output if isinstance(output, Tensor) else output[0]

    def losses(self, score: Tensor) -> Tensor:
        """Cross entropy in nats [3] of the score [B, 3, F] in the last forward pass: step f knows the frames before f."""
        logits = self.head(self.states[:, : score.shape[-1]]).float().split(list(SIZES.values()), dim=-1)
        return torch.stack(
            [nn.functional.cross_entropy(some.flatten(0, 1), score[:, i].flatten()) for i, some in enumerate(logits)]
        )
