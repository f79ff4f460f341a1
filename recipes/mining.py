"""Which clips the codec's decoder is trained on next ("hard example mining", as in Shrivastava et al. 2016, arXiv:1604.03540)."""

import numpy as np

MINING_POWER, MEMORY = 2.0, 0.99


class Mining:
    """Chooses clips so that instruments whose spectra come out worse are played more often.

    Each instrument's chance goes with the square of its running distance: of mel spectra (nats), or what ears make of it.

    Args:
        instruments: of each clip, N names.
        distances: as `distances` of a former run; an instrument that it lacks begins at 1.
    """

    def __init__(self, instruments: list[str], distances: dict[str, float]) -> None:
        self.instruments = instruments
        self.distances = {name: distances.get(name, 1.0) for name in sorted(set(instruments))}
        self.clips = {name: [i for i, it in enumerate(instruments) if it == name] for name in self.distances}

    def choose(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of `size` clips."""
        weights = np.array([distance**MINING_POWER for distance in self.distances.values()])
        names = rng.choice(list(self.distances), size, p=weights / weights.sum())
        return np.array([rng.choice(self.clips[name]) for name in names])

    def learn(self, clips: list[int], distances: list[float]) -> None:
        """Take in how far off crops of these clips came out."""
        for clip, distance in zip(clips, distances, strict=True):
            name = self.instruments[clip]
            self.distances[name] = MEMORY * self.distances[name] + (1 - MEMORY) * distance
