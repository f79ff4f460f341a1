"""Simulated listeners: they let the whole loop run and be tested where nobody listens. They are not people.

A listener's taste is a weighted sum of eight descriptors of the waveform, two of which depend on what the prompt asks
for. Weights differ from listener to listener, choices are noisy, and close calls are ties. Nothing here is learned, no
weight is shared with a reward, and codes are never seen. What is measured with them shows that the loop learns *a*
preference; it says nothing about whether people would agree.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import descriptors
from ..audio import match_loudness
from .agreement import PairVote, count_agreement
from .schema import DECIDED

LISTENER_VERSION = "simulated-2"
"""Changes whenever a vote could come out differently; written to every row as `listener`."""

SIMULATED = LISTENER_VERSION.partition("-")[0]  # what the names of all simulated listeners begin with

REWARD = "reward:"  # what the names of rewards that choose in place of listeners begin with

FEATURES = (
    "consonance",  # pitch energy in the best diatonic scale
    "tonality",  # tone rather than noise
    "steadiness",  # a regular beat
    "variety",  # harmony that moves
    "tempo_fit",  # as fast or slow as the prompt asks
    "brightness_fit",  # as bright or dark as the prompt asks
    "presence",  # not silent
    "cleanness",  # not clipped
)
# Centre and spread of the descriptors over rendered and generated music, so that weights are per standard deviation.
_CENTRES = {"consonance": 0.90, "tonality": 2.5, "steadiness": 0.43, "variety": 0.40, "tempo": 1.6, "brightness": 2.3}
_SPREADS = {"consonance": 0.10, "tonality": 1.0, "steadiness": 0.24, "variety": 0.15, "tempo": 0.8, "brightness": 0.9}
_SILENCE_SPREAD = 0.15
_CLIPPING_SPREAD = 0.005
# Mean weight in the population and how far listeners differ. Only variety may be disliked.
_WEIGHTS = (0.9, 0.8, 0.6, 0.3, 0.7, 0.7, 0.8, 0.6)
_WEIGHT_SPREAD = 0.5
# Another mix, for a panel whose taste nothing was tuned on: rather a beat and change than consonance, and less to the letter.
_OTHER_WEIGHTS = (0.4, 0.5, 1.0, 0.8, 0.4, 0.4, 0.8, 0.9)
TASTES = {"usual": _WEIGHTS, "other": _OTHER_WEIGHTS}
PANEL_SIZE, PANEL_SEED = 12, 9001  # of the panels that are asked as a reward would be
# In units of utility, so that two of them agree on about .75 of the pairs that both decided, as people do on public pairs, and
# call a fifth ties, as in the paper's study: .73 and .21 on 700 pairs of 3 s from the bundled generator, for its 128 prompts.
CHOICE_NOISE = 0.45  # scale of the logistic noise between two clips
TIE_WIDTH = 0.4
BOTH_BAD_BELOW = -4.0  # utility of the better clip, in a close call

FAST_WORDS = frozenset(
    "fast quick rapid lively spirited driving energetic upbeat uptempo dance danceable reel jig hornpipe polka "
    "cheerful happy gay playful animated exciting frantic techno".split()
)
SLOW_WORDS = frozenset(
    "slow calm tender peaceful gentle relaxing relaxed ambient ballad air lullaby mournful melancholic sad downtempo "
    "nostalgic meditative serene dreamy solemn".split()
)
BRIGHT_WORDS = frozenset(
    "bright shimmering sparkling crisp airy brilliant flute whistle piccolo trumpet violin fiddle harpsichord bells "
    "glockenspiel cymbals".split()
)
DARK_WORDS = frozenset("dark deep warm mellow muffled soft low bass sub cello tuba bassoon contrabass bassline".split())


@dataclass(frozen=True)
class Judgement:
    """A listener's choice: `preference` in {a, b, tie, both_bad} and `confidence` from 1 (a guess) to 5 (certain), or None."""

    preference: str
    confidence: float | None


@dataclass(frozen=True)
class SimulatedListener:
    """One simulated listener.

    The noise of a judgement is drawn from the listener, the prompt and the clips themselves: asked the same again it
    answers the same, and with the clips swapped it names the same clip.

    Args:
        name: identifies the listener in tables.
        weights: one for each of `FEATURES`.

    Example:
        >>> listener = simulated_listeners(1)[0]
        >>> noise, tone = torch.randn(1, 16000) * 0.1, 0.3 * torch.sin(torch.arange(16000) * 0.17)[None]
        >>> listener("a calm tune", tone, noise, 16000).preference
        'a'
    """

    name: str
    weights: tuple[float, ...]

    def utility(self, features: Tensor) -> Tensor:
        """Liking of clips with these `clip_features`, [B, 8] -> [B], without noise."""
        return features @ torch.tensor(self.weights)

    def __call__(self, prompt: str, audio_a: Tensor, audio_b: Tensor, sampling_rate: int) -> Judgement:
        """Choose between two clips [C, T]: the rule of Bradley and Terry, since two Gumbels differ by a logistic."""
        clips = [audio_a, audio_b]
        liking = [float(self.utility(clip_features([prompt], clip[None], sampling_rate))[0]) for clip in clips]
        keys = [_digest(clip) for clip in clips]
        draws = [_uniform(self.name, prompt, *key) for key in (keys, keys[::-1])]
        noise = [-CHOICE_NOISE * math.log(-math.log(draw)) for draw in draws]
        gap = liking[0] + noise[0] - liking[1] - noise[1]
        confidence = round(1 + 4 * abs(math.tanh(gap / 2)), 1)
        if abs(gap) < TIE_WIDTH:
            return Judgement("both_bad" if max(liking) < BOTH_BAD_BELOW else "tie", confidence)
        return Judgement("a" if gap > 0 else "b", confidence)

    def rate(self, prompts: Sequence[str], audio: Tensor, sampling_rate: int) -> Tensor:
        """Whole-number ratings from 1 to 5 of clips [B, C, T], [B]."""
        features = clip_features(prompts, audio, sampling_rate)
        draws = [_uniform(self.name, prompt, _digest(clip)) for prompt, clip in zip(prompts, audio, strict=True)]
        noise = torch.tensor([math.log(draw / (1 - draw)) for draw in draws])
        return (3 + 0.6 * self.utility(features) + 0.3 * noise).round().clamp(1, 5)


def is_simulated(listener: str) -> bool:
    """Whether this is a simulated listener's name."""
    return listener.startswith(SIMULATED)


def is_reward(listener: str) -> bool:
    """Whether this is the name of a reward that chose in place of a listener."""
    return listener.startswith(REWARD)


def count_listeners(names: Iterable[str]) -> dict[str, int]:
    """How many `listeners` there are, and how many of them are `simulated` or `rewards`; the others are people."""
    known = set(names)
    return {
        "listeners": len(known),
        "simulated": sum(map(is_simulated, known)),
        "rewards": sum(map(is_reward, known)),
    }


def simulated_listeners(count: int, seed: int = 0, taste: str = "usual") -> list[SimulatedListener]:
    """A population of `count` simulated listeners; the first ones of a larger population are the same.

    Args:
        taste: which of `TASTES` they differ around.

    Raises:
        ValueError: for no listeners, or an unknown taste.
    """
    if count < 1:
        raise ValueError(f"count is {count}: a population has at least one listener")
    if taste not in TASTES:
        raise ValueError(f"taste is {taste!r}: it must be one of {', '.join(TASTES)}")
    prefix = LISTENER_VERSION if taste == "usual" else f"{LISTENER_VERSION}-{taste}"
    listeners = []
    for number in range(count):
        spread = np.random.default_rng([seed, number]).standard_normal(len(FEATURES)) * _WEIGHT_SPREAD
        weights = [mean * math.exp(float(z)) for mean, z in zip(TASTES[taste], spread, strict=True)]
        variety = FEATURES.index("variety")
        weights[variety] = TASTES[taste][variety] + float(spread[variety])
        listeners.append(SimulatedListener(f"{prefix}-{seed}-{number}", tuple(weights)))
    return listeners


def panel_taste(prompts: Sequence[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """Mean liking [B] of a held-out panel, without noise, at equal loudness: to be watched in training, not trained on.

    In the form of a reward, so that `musicrl_hf.preferences.listeners:panel_taste` names it wherever a reward is named.
    """
    return mean_liking(simulated_listeners(PANEL_SIZE, PANEL_SEED, "usual"), prompts, audio, sampling_rate)


def other_taste(prompts: Sequence[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """`panel_taste` of a panel with the other mix of tastes."""
    return mean_liking(simulated_listeners(PANEL_SIZE, PANEL_SEED, "other"), prompts, audio, sampling_rate)


def mean_liking(
    listeners: Sequence[SimulatedListener], prompts: Sequence[str], audio: Tensor, sampling_rate: int
) -> Tensor:
    """Mean liking [B] of these listeners, without noise, of clips [B, C, T] at equal loudness; errors as of `clip_features`."""
    matched = torch.stack([match_loudness(clip, sampling_rate) for clip in audio.detach().float().cpu()])
    features = clip_features(prompts, matched, sampling_rate)
    return torch.stack([listener.utility(features) for listener in listeners]).mean(0)


def clip_features(prompts: Sequence[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """What the listeners hear: [B, 8] in standard deviations, higher is better liked by most, each within [-3, 3].

    Args:
        prompts: one for each clip.
        audio: [B, C, T] in [-1, 1], at least 0.13 s.
        sampling_rate: in Hz.

    Raises:
        ValueError: if the numbers of prompts and clips differ, or the audio is not valid.
    """
    if len(prompts) != len(audio):
        raise ValueError(f"{len(prompts)} prompts for {len(audio)} clips: give one prompt for each clip")
    audio = audio.detach().float().cpu()
    spec = descriptors.spectrum(audio, sampling_rate)
    tempo = _standard(torch.log2(descriptors.onset_rate(spec) + 0.25), "tempo")
    brightness = _standard(descriptors.brightness(spec), "brightness")
    asked_tempo = torch.tensor([asked_for(prompt, FAST_WORDS, SLOW_WORDS) for prompt in prompts])
    asked_brightness = torch.tensor([asked_for(prompt, BRIGHT_WORDS, DARK_WORDS) for prompt in prompts])
    columns = {
        "consonance": _standard(descriptors.diatonic_share(spec), "consonance"),
        "tonality": _standard(-torch.log10(descriptors.spectral_flatness(spec).clamp(min=1e-6)), "tonality"),
        "steadiness": _standard(descriptors.rhythmic_steadiness(spec), "steadiness"),
        "variety": _standard(descriptors.variety(spec), "variety"),
        "tempo_fit": asked_tempo * torch.tanh(tempo),
        "brightness_fit": asked_brightness * torch.tanh(brightness),
        "presence": -descriptors.silence_share(audio, sampling_rate) / _SILENCE_SPREAD,
        "cleanness": -descriptors.clipping_share(audio) / _CLIPPING_SPREAD,
    }
    return torch.stack([columns[name] for name in FEATURES], dim=1).clamp(-3, 3)


def asked_for(prompt: str, more: frozenset[str], less: frozenset[str]) -> float:
    """1.0 where the prompt asks for more, -1.0 for less, 0.0 where it says nothing or both."""
    words = re.findall(r"[a-z]+", prompt.lower().replace("up-tempo", "uptempo"))
    balance = sum(word in more for word in words) - sum(word in less for word in words)
    return float(np.sign(balance))


def agreement(
    listeners: Sequence[SimulatedListener], pairs: Sequence[tuple[str, Tensor, Tensor]], sampling_rate: int
) -> float:
    """How often two listeners choose the same clip, over all pairs of listeners and the pairs that both decided.

    Args:
        pairs: (prompt, audio_a [C, T], audio_b [C, T]).

    Returns:
        a share in [0, 1]. People agree with each other on about 0.75 of public music pairs; in MusicRL's own check the
        team agreed with users on 0.60 of 156.

    Raises:
        ValueError: if no pair was decided by two listeners.
    """
    votes = [
        PairVote((str(number),), choice, str(who))
        for who, listener in enumerate(listeners)
        for number, pair in enumerate(pairs)
        if (choice := listener(*pair, sampling_rate).preference) in DECIDED
    ]
    share = count_agreement(votes).share
    if share is None:
        raise ValueError(f"no pair was decided by two of the {len(listeners)} listeners: give more of either")
    return share


def _standard(value: Tensor, name: str) -> Tensor:
    return (value - _CENTRES[name]) / _SPREADS[name]


def _digest(clip: Tensor) -> str:
    return hashlib.sha256(clip.detach().float().cpu().numpy().tobytes()).hexdigest()


def _uniform(*keys: str) -> float:
    """A number in (0, 1) that depends on the keys alone."""
    number = int.from_bytes(hashlib.sha256("\x1f".join(keys).encode()).digest()[:8], "big")
    return (number + 0.5) / 2**64
