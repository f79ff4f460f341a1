"""Align music generators with what people prefer.

Public names load on first use, so that `import musicrl_hf` also works where torchaudio does not: the first name that
needs it then says in one line what is wrong.
"""

from importlib import import_module
from typing import Any

from ._environment import environment_problem

__version__ = "0.1.0"

_PUBLIC = {
    "AudioCodec": "codec",
    "MusicRLConfig": "generator",
    "MusicRLForConditionalGeneration": "generator",
    "load_generator": "generator",
    "FlatMusicRLForCausalLM": "flat",
    "FlatTokenizer": "flat",
    "AdherenceReward": "rewards",
    "QualityModel": "rewards",
    "PreferenceModel": "rewards",
    "CombinedReward": "rewards",
    "load_reward": "rewards",
    "load_rewards": "rewards",
}
__all__ = [*_PUBLIC, "__version__"]

_problem = environment_problem()
if _problem is None:
    # Importing the learned rewards registers their model types with the Auto classes.
    import_module(".rewards", __name__)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _problem is not None:
        raise ImportError(_problem)
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
