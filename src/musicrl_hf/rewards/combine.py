"""Several rewards as one: a weighted sum or the worst case, with or without normalisation, and the specs that name them."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..places import find_model
from .adherence import AdherenceReward
from .contract import Reward, ask_reward, check_reward_inputs
from .preference import PreferenceModel
from .quality import QualityModel
from .variety import variety

NORMALISE = ("none", "sum_then_normalise", "normalise_then_sum", "normalise_then_min", "centre_then_min")
BUNDLED_DEFAULTS = {"adherence": "musicrl-tiny-adherence", "quality": "musicrl-tiny-quality"}
MODEL_REWARDS: dict = {  # kind -> what loads it, model_type of its folders
    "adherence": (AdherenceReward, "clap"),
    "quality": (QualityModel, "musicrl_quality"),
    "preference": (PreferenceModel, "musicrl_preference"),
}
KNOWN_FORMS = (
    '"adherence" or "quality" (bundled), "adherence:NAME", "quality:NAME", "preference:NAME" with a bundled name, folder '
    'or Hub id, "variety" for the distance to the other clips of a prompt, or "module:function" for a function of yours; '
    '"weight*" in front weights it, as in "0.5*adherence"'
)


class CombinedReward:
    """Weighted sum, or the lowest, of rewards r_1 ... r_n with weights w_1 ... w_n.

    With mean m and standard deviation s over the B clips of the call (population, plus 1e-4, the constant that TRL
    uses; a reward that is equal for all clips becomes 0):

    * "none": R = sum_i w_i r_i. The paper's: both of its rewards are brought to one scale first (section 3.3).
    * "sum_then_normalise": R' = sum_i w_i r_i; R = (R' - m(R')) / s(R').
    * "normalise_then_sum": R = sum_i w_i (r_i - m(r_i)) / s(r_i). GDPO: no reward drowns another by its scale.
    * "normalise_then_min": R = min_i w_i (r_i - m(r_i)) / s(r_i). Worst-case optimisation of an ensemble (Coste et al.
      2023, arXiv:2310.02743): what one member alone likes is worth nothing. For rewards of different kinds.
    * "centre_then_min": R = min_i w_i (r_i - m(r_i)). The same for one kind of reward trained from several seeds: their
      scale is one already, and is kept, so that a nat of KL costs what it costs beside one of them.

    Before the lowest is taken, each reward has to have the same zero, and a Bradley-Terry score has none: adding a constant
    to all scores of a model leaves every preference as it was. Here the mean over the clips of the call is the zero.

    Normalised and centred rewards depend on the other clips of the call: they are for batches of samples, not for comparing
    runs.

    Args:
        rewards: name -> callable `(prompts, audio, sampling_rate) -> [B]`.
        weights: name -> weight; 1 where None.
        normalise: one of the five above.
        timeout_s: seconds that each reward may take for one call; 0 for as long as it likes. See `ask_reward`.

    Raises:
        ValueError: no rewards, weights for other names, a weight that is 0 or not finite, unknown `normalise`, negative
            seconds.

    Example:
        >>> loudness = lambda prompts, audio, rate: audio.square().mean((1, 2))
        >>> reward = CombinedReward({"loudness": loudness}, {"loudness": 2.0})
        >>> reward(["a", "b"], torch.tensor([[[1.0]], [[0.5]]]), 16000)
        tensor([2.0000, 0.5000])
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        weights: dict[str, float] | None = None,
        normalise: str = "none",
        timeout_s: float = 0.0,
    ):
        if not rewards:
            raise ValueError(f"`rewards` is empty; name at least one. Known forms: {KNOWN_FORMS}.")
        self.rewards = dict(rewards)
        self.weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
        if set(self.weights) != set(self.rewards):
            raise ValueError(
                f"`weights` are for {sorted(self.weights)}, `rewards` are {sorted(self.rewards)}; give one weight each."
            )
        for name, weight in self.weights.items():
            if weight == 0 or not -float("inf") < weight < float("inf"):
                raise ValueError(f"`weights`: {name!r} has {weight!r}; give a finite number, or leave the reward out.")
        if normalise not in NORMALISE:
            raise ValueError(f"`normalise` must be one of {', '.join(NORMALISE)}, got {normalise!r}.")
        if not 0 <= timeout_s < float("inf"):
            raise ValueError(f"`timeout_s` must be at least 0 seconds (0 for no limit), got {timeout_s!r}.")
        self.normalise, self.timeout_s = normalise, timeout_s

    def components(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> dict[str, Tensor]:
        """Each reward's own scores [B], neither weighted nor normalised, on the CPU: what to log beside the sum."""
        check_reward_inputs(prompts, audio, sampling_rate)
        return {
            name: ask_reward(reward, prompts, audio, sampling_rate, name, self.timeout_s).cpu()
            for name, reward in self.rewards.items()
        }

    def combine(self, components: dict[str, Tensor]) -> Tensor:
        """The sum or the lowest [B] of what :meth:`components` gave; no clip is scored twice."""
        scores = torch.stack([components[name] for name in self.rewards])  # [n, B]
        weights = torch.tensor([self.weights[name] for name in self.rewards])
        if self.normalise.startswith("normalise_then"):
            scores = _standardised(scores)
        if self.normalise == "centre_then_min":
            scores = scores - scores.mean(-1, keepdim=True)
        if self.normalise.endswith("_min"):
            return (weights[:, None] * scores).amin(0)
        total = weights @ scores
        return _standardised(total) if self.normalise == "sum_then_normalise" else total

    def __call__(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
        """The combined reward [B] float32; arguments as of every reward."""
        return self.combine(self.components(prompts, audio, sampling_rate))


def _standardised(scores: Tensor) -> Tensor:
    mean = scores.mean(-1, keepdim=True)
    return (scores - mean) / (scores.std(-1, keepdim=True, correction=0) + 1e-4)


def joined(chunks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each part's scores [B] of all clips, from those of some chunks of them; empty where there are none."""
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}


def move_reward(reward: Reward, device: torch.device) -> None:
    """Move a reward's models, in place; a plain function stays where it is."""
    if isinstance(reward, CombinedReward):
        for part in reward.rewards.values():
            move_reward(part, device)
    elif isinstance(reward, nn.Module | AdherenceReward):
        reward.to(device)


def compares_clips(reward: Reward) -> bool:
    """Whether it has `compares_clips` as `variety` does, or a combination has such a one somewhere: it says nothing of a clip alone."""
    if isinstance(reward, CombinedReward):
        return any(map(compares_clips, reward.rewards.values()))
    return bool(getattr(reward, "compares_clips", False))


def load_reward(spec: str, argument: str = "reward") -> Reward:
    """The reward that a spec names, loaded; see `find_reward`.

    Example:
        >>> reward = load_reward("adherence")
    """
    return find_reward(spec, argument)()


def find_reward(spec: str, argument: str = "reward") -> Callable[[], Reward]:
    """What loads the reward that a spec names; that it is there is known before anything is loaded.

    Args:
        spec: "adherence" or "quality" for the bundled ones; "adherence:NAME", "quality:NAME", "preference:NAME" with a
            bundled name, a folder or a Hub id; "variety" for `variety.variety`, which training asks; "module:function" for a function
            of yours that takes `(prompts, audio, sampling_rate)`, imported as Python would from the current directory.
        argument: what messages call it.

    Raises:
        ValueError: another form, or a module that has no such function.
        FileNotFoundError: a model that is neither a folder here nor on the Hub.
    """
    kind, colon, name = spec.strip().partition(":")
    if spec.strip() == "variety":
        return lambda: variety
    if kind in BUNDLED_DEFAULTS and not colon:
        name = BUNDLED_DEFAULTS[kind]
    if kind in MODEL_REWARDS and name:
        loader, model_type = MODEL_REWARDS[kind]
        find_model(name, model_type, argument)

        def load() -> Reward:
            reward = loader.from_pretrained(name)
            return reward if kind == "adherence" else reward.eval()

        return load
    is_dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", kind)
    if kind not in MODEL_REWARDS and is_dotted and name.isidentifier():
        function = _user_function(kind, name)
        return lambda: function
    raise ValueError(f"`{argument}` = {spec!r} is unknown. Known forms: {KNOWN_FORMS}.")


def model_of(spec: str) -> str | None:
    """The bundled name, folder or Hub id of the model that a spec names; None for what is no model.

    Example:
        >>> [model_of(spec) for spec in ("adherence", "preference:runs/reward", "variety")]
        ['musicrl-tiny-adherence', 'runs/reward', None]
    """
    kind, _, name = spec.strip().partition(":")
    return (name or BUNDLED_DEFAULTS.get(kind)) if kind in MODEL_REWARDS else None


def _user_function(module_name: str, function_name: str) -> Callable:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module is there, but something that it imports is not
        raise ValueError(
            f"`reward` = '{module_name}:{function_name}': there is no module {module_name!r} in {here} or among the "
            f"installed packages. Known forms: {KNOWN_FORMS}."
        ) from None
    function = vars(module).get(function_name)
    if not callable(function):
        functions = sorted(name for name, value in vars(module).items() if callable(value) and name[0] != "_")
        raise ValueError(
            f"`reward` = '{module_name}:{function_name}': {module_name} has no function {function_name!r}; it has "
            f"{', '.join(functions) or 'none'}."
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not tell theirs
        return function
    try:
        signature.bind([], torch.zeros(0), 16_000)
    except TypeError as error:
        raise ValueError(
            f"`reward` = '{module_name}:{function_name}' cannot be called with (prompts, audio, sampling_rate): {error}."
        ) from None
    return function


def load_rewards(specs: Sequence[str] | str, normalise: str = "none", timeout_s: float = 0.0) -> CombinedReward:
    """Several specs as one reward, loaded; see `find_rewards`.

    Example:
        >>> reward = load_rewards("0.5*adherence + 0.5*quality")
        >>> sorted(reward.rewards)
        ['adherence', 'quality']
    """
    return find_rewards(specs, normalise, timeout_s)()


def find_rewards(
    specs: Sequence[str] | str, normalise: str = "none", timeout_s: float = 0.0
) -> Callable[[], CombinedReward]:
    """What loads several specs as one reward; that each is there is known before the first is loaded.

    Args:
        specs: such as ["0.5*adherence", "0.5*quality"], or one string with " + " between them. Weights default to 1.
        normalise, timeout_s: as of `CombinedReward`.

    Raises:
        ValueError: an unknown spec, a weight that is no number, the same reward twice.
    """
    weights = split_specs(specs)
    loaders = {spec: find_reward(spec) for spec in weights}
    return lambda: CombinedReward({spec: load() for spec, load in loaders.items()}, weights, normalise, timeout_s)


def split_specs(specs: Sequence[str] | str) -> dict[str, float]:
    """Spec -> weight; see `find_rewards`.

    Example:
        >>> split_specs(["0.5*adherence", "quality"])
        {'adherence': 0.5, 'quality': 1.0}
    """
    given = [specs] if isinstance(specs, str) else list(specs)
    weights: dict[str, float] = {}
    for part in (part.strip() for text in given for part in re.split(r"\s\+\s", text)):
        weight, spec = _weight_and_spec(part)
        if spec in weights:
            raise ValueError(f"`reward`: {spec!r} is named twice; add its weights up.")
        weights[spec] = weight
    return weights


def check_single_clips(specs: Sequence[str], name: str) -> None:
    """ValueError where one of the specs, or of the terms of a sum, is "variety", and clips are not scored beside their prompt's others."""
    terms = [term.rpartition("*")[2].strip() for spec in specs for term in re.split(r"\s\+\s", spec)]
    if "variety" in terms:
        raise ValueError(
            f"`{name}` names variety, which compares the clips of a prompt in training and says nothing of a clip alone: leave it "
            "out. `musicrl evaluate` measures how far a prompt's clips are apart by itself."
        )


def label_specs(specs: Sequence[str], name: str = "rewards") -> dict[str, str]:
    """Label -> spec: what tables, rows and cards call a reward. Of a path it shows the last part alone, or as many of its last
    parts as tell the specs apart.

    Args:
        specs: as `find_reward` takes them, or sums of them.
        name: of the argument, for messages.

    Raises:
        ValueError: the same spec twice, or "variety", see `check_single_clips`.

    Example:
        >>> label_specs(["adherence", "preference:runs/a/reward", "preference:runs/b/reward"])
        {'adherence': 'adherence', 'preference:a/reward': 'preference:runs/a/reward', 'preference:b/reward': 'preference:runs/b/reward'}
    """
    check_single_clips(specs, name)
    for parts in range(1, max((spec.count("/") for spec in specs), default=0) + 2):
        labelled = {_shortened(spec, parts): spec for spec in specs}
        if len(labelled) == len(specs):
            return labelled
    raise ValueError(f"`{name}` names a reward twice: {', '.join(specs)}; leave one out.")


def _shortened(spec: str, parts: int) -> str:
    """A spec, or a sum of specs, with the last `parts` parts of each path."""

    def shorten(term: str) -> str:
        kind, colon, name = term.partition(":")
        return f"{kind}{colon}{'/'.join(name.rstrip('/').split('/')[-parts:])}"

    return " + ".join(shorten(term.strip()) for term in re.split(r"\s\+\s", spec))


def _weight_and_spec(text: str) -> tuple[float, str]:
    weight, star, spec = text.partition("*")
    if not star:
        return 1.0, text.strip()
    try:
        return float(weight), spec.strip()
    except ValueError:
        raise ValueError(f"`reward` = {text!r}: {weight.strip()!r} is no weight. Known forms: {KNOWN_FORMS}.") from None
