"""Preferences: the row, its validation, codes, importers, sampled pairs and simulated listeners."""

from .agreement import Agreement, count_agreement, pair_votes
from .codes import cache_codes
from .importers import (
    ClipOptions,
    import_aime,
    import_battles,
    import_cmi_pref,
    import_folder,
    import_music_arena,
    import_musiceval,
    import_musicprefs,
    import_songeval,
    read_votes,
)
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
    validate_preferences,
    votes_from_preferences,
)
from .splits import split_by_generator, split_by_prompt

__all__ = [
    "FEATURES",
    "LABELS",
    "LISTENER_VERSION",
    "Agreement",
    "ClipOptions",
    "Judgement",
    "SimulatedListener",
    "Vote",
    "agreement",
    "cache_codes",
    "count_agreement",
    "decided_pairs",
    "import_aime",
    "import_battles",
    "import_cmi_pref",
    "import_folder",
    "import_music_arena",
    "import_musiceval",
    "import_musicprefs",
    "import_songeval",
    "load_preferences",
    "pair_votes",
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
