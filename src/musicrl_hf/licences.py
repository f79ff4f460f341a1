"""Licences: what the Hub calls them, whose weights and votes carry which, and what that leaves for what is made of them."""

from collections.abc import Iterable

from .bundled import BUNDLED

# the identifiers that the Hub's metadata knows and that a model or a data set of this kind carries
LICENCES = {
    "apache-2.0": "Apache License 2.0",
    "mit": "MIT License",
    "bsd-3-clause": "BSD 3-Clause License",
    "cc0-1.0": "Creative Commons Zero 1.0",
    "cc-by-4.0": "Creative Commons Attribution 4.0",
    "cc-by-sa-4.0": "Creative Commons Attribution Share Alike 4.0",
    "cc-by-nc-4.0": "Creative Commons Attribution Non Commercial 4.0",
    "cc-by-nc-sa-4.0": "Creative Commons Attribution Non Commercial Share Alike 4.0",
    "openrail": "Open Responsible AI License",
}
# licence of the weights that others published and that people start from, by the start of the Hub id
BASE_LICENCES = {
    "facebook/musicgen-": "cc-by-nc-4.0",
    "laion/clap-htsat-": "apache-2.0",
    "laion/larger_clap_": "apache-2.0",
}
# licence of published preference data, by the start of a row's `source`; None where none was given
SOURCE_LICENCES: dict[str, str | None] = {
    "music-arena": "cc-by-4.0",
    "aime": "cc-by-4.0",
    "cmi-pref": "cc-by-nc-sa-4.0",
    "musicprefs": None,
    "songeval": "cc-by-nc-sa-4.0",
    "musiceval": "cc-by-nc-4.0",
}
# where it was published: whoever passes it on has to name it
SOURCE_ADDRESSES = {
    "music-arena": "https://huggingface.co/datasets/music-arena/music-arena-dataset",
    "aime": "https://huggingface.co/datasets/disco-eth/AIME-survey",
    "cmi-pref": "https://huggingface.co/datasets/HaiwenXia/cmi-pref",
    "musicprefs": "https://huggingface.co/datasets/i-need-sleep/musicprefs",
    "songeval": "https://huggingface.co/datasets/ASLP-lab/SongEval",
    "musiceval": "https://huggingface.co/datasets/BAAI/MusicEval",
}


def is_non_commercial(licence: str | None) -> bool:
    """Whether a licence forbids commercial use; False where none is known."""
    return licence is not None and "-nc" in licence


def licence_of(base: str | None) -> str | None:
    """Licence of a base model's weights where this package knows it, else None."""
    if base is None:
        return None
    if base in BUNDLED:
        return "apache-2.0"
    return next((licence for start, licence in BASE_LICENCES.items() if base.startswith(start)), None)


def published_source(source: str) -> str | None:
    """The published set that a row's `source` names, or None: "aime:quality" is of "aime"."""
    return next((name for name in SOURCE_LICENCES if source.startswith(name)), None)


def licence_of_sources(sources: Iterable[str]) -> str | None:
    """The licence that preference rows of these sources carry together, or None where it is not known.

    A non-commercial source makes the whole non-commercial, and one that asks to be shared alike makes it that.
    """
    known = [SOURCE_LICENCES.get(published_source(source) or "") for source in sources]
    restricted = sorted(
        (lic for lic in known if is_non_commercial(lic)), key=lambda licence: "-sa-" not in str(licence)
    )
    if restricted:
        return restricted[0]
    return known[0] if len(set(known)) == 1 else None


def sources_without_licence(sources: Iterable[str]) -> list[str]:
    """Those of published sets whose authors gave no licence, so that nobody may pass them on without asking."""
    sets = {source: published_source(source) for source in sources}
    return sorted(source for source, name in sets.items() if name is not None and SOURCE_LICENCES[name] is None)


def choose_licence(given: str | None, inherited: str | None, what: str) -> str:
    """The licence to publish under.

    Raises:
        ValueError: none is known, the Hub does not know it, or it permits what the base does not: commercial use, leaving its
            authors unnamed, or another licence than its own where that asks to be shared alike.
    """
    licence = given or inherited
    if licence is None:
        raise ValueError(f"license is not known for {what}: give one of {', '.join(LICENCES)}, as --license NAME.")
    if licence not in LICENCES:
        raise ValueError(f"license={licence!r} is not known here: give one of {', '.join(LICENCES)}.")
    share_alike = inherited is not None and "-sa-" in inherited
    named = inherited is not None and inherited.startswith("cc-by") and not licence.startswith("cc-by")  # its authors
    commercial = is_non_commercial(inherited) and not is_non_commercial(licence)
    if commercial or named or (share_alike and licence != inherited):
        raise ValueError(f"license={licence!r} permits what {what} inherits from does not: use {inherited!r}.")
    return licence
