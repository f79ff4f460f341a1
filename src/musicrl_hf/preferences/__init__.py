"""Preferences: the row, its validation, codes, importers, sampled pairs and simulated listeners."""

from .codes import cache_codes
from .importers import import_battles, import_folder, read_votes
from .listeners import LISTENER_VERSION, Judgement, SimulatedListener, agreement, simulated_listeners
from .pairs import sample_pairs
from .schema import (
    FEATURES,
    LABELS,
    Vote,
    decided_pairs,
    load_preferences,
    preferences_from_rows,
    save_preferences,
    split_by_generator,
    split_by_prompt,
    validate_preferences,
    votes_from_preferences,
)

__all__ = [
    "FEATURES",
    "LABELS",
    "LISTENER_VERSION",
    "Judgement",
    "SimulatedListener",
    "Vote",
    "agreement",
    "cache_codes",
    "decided_pairs",
    "import_battles",
    "import_folder",
    "load_preferences",
    "preferences_from_rows",
    "read_votes",
    "sample_pairs",
    "save_preferences",
    "simulated_listeners",
    "split_by_generator",
    "split_by_prompt",
    "validate_preferences",
    "votes_from_preferences",
]
