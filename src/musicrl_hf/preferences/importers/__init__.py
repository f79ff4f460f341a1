"""Preferences from elsewhere: one's own clips, votes without audio, and the sets that others published.

Every importer turns its rows into `Comparison`s and hands them to `write_comparisons` (`writing.py`), which reads the clips,
brings them to one loudness, writes the rows and counts what was left out.
"""

from .comparisons import import_aime, import_cmi_pref, import_music_arena, import_musicprefs
from .folder import import_folder
from .ratings import RatedClip, import_musiceval, import_songeval, read_musiceval, read_songeval
from .tables import write_csv
from .votes import VOTE_COLUMNS, has_prompts, import_battles, read_votes, table_of, vote_columns
from .writing import ClipOptions, ImportResult

__all__ = [
    "VOTE_COLUMNS",
    "ClipOptions",
    "ImportResult",
    "RatedClip",
    "has_prompts",
    "import_aime",
    "import_battles",
    "import_cmi_pref",
    "import_folder",
    "import_music_arena",
    "import_musiceval",
    "import_musicprefs",
    "import_songeval",
    "read_musiceval",
    "read_songeval",
    "read_votes",
    "table_of",
    "vote_columns",
    "write_csv",
]
