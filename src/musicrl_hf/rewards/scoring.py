"""Scores of audio files: what `musicrl score` prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..audio import read_audio
from ..devices import find_device
from .combine import check_single_clips, find_rewards, move_reward


@dataclass(frozen=True)
class ScoreTable:
    """Rewards of some clips.

    Attributes:
        paths: one a row.
        scores: name of a reward -> one score a row, without its weight; where there are several, or a weight, also
            "total", the weighted sum.
        total: that sum as a formula, such as "0.5*adherence + 0.5*quality".
    """

    paths: list[str]
    scores: dict[str, list[float]]
    total: str = ""

    def __str__(self) -> str:
        header = ["clip", *(f"total = {self.total}" if name == "total" else name for name in self.scores)]
        rows = [
            [path, *(f"{column[row]:.4f}" for column in self.scores.values())] for row, path in enumerate(self.paths)
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]
        return "\n".join(lines)


def score_clips(
    specs: Sequence[str] | str, prompt: str | Sequence[str], paths: Sequence[str | Path], device: str | None = None
) -> ScoreTable:
    """Score audio files.

    Args:
        specs: rewards, as `load_rewards` takes them.
        prompt: one text for all clips, or one a clip.
        paths: audio files of at most 30 s; rates and channels may differ.
        device: where the rewards run, see `find_device`.

    Raises:
        ValueError: no clips, another number of prompts than clips, a clip that cannot be read, an unknown reward.
        FileNotFoundError: a clip that is not there.

    Example:
        >>> print(score_clips("adherence", "a slow air", ["tune.wav"]))  # doctest: +SKIP
    """
    if isinstance(paths, str | Path) or not paths:
        raise ValueError(f"`paths` must be a list of at least one audio file, got {paths!r}.")
    prompts = [prompt] * len(paths) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(paths):
        raise ValueError(
            f"`prompt` holds {len(prompts)} texts for {len(paths)} clips; give one for all, or one a clip."
        )
    if not all(text.strip() for text in prompts):
        raise ValueError("`prompt` is empty; give the text that the clips were asked to be.")
    check_single_clips([specs] if isinstance(specs, str) else specs, "reward")
    load = find_rewards(specs)
    missing = [str(path) for path in paths if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"`paths`: there is no file {', '.join(missing)}; give audio files that exist.")
    where = find_device(device)
    reward = load()
    move_reward(reward, where)
    scores: dict[str, list[float]] = {name: [] for name in reward.rewards}
    if len(reward.rewards) > 1 or set(reward.weights.values()) != {1.0}:
        scores["total"] = []
    for text, path in tqdm(list(zip(prompts, paths)), desc="scoring clips", unit="clip", leave=False):
        audio, sampling_rate = read_audio(path)
        components = reward.components([text], audio[None], sampling_rate)
        for name, score in components.items():
            scores[name].append(score.item())
        if "total" in scores:
            scores["total"].append(reward.combine(components).item())
    terms = [name if weight == 1 else f"{weight:g}*{name}" for name, weight in reward.weights.items()]
    return ScoreTable([str(path) for path in paths], scores, " + ".join(terms))
