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


def licence_of_sources(sources: Iterable[str]) -> str | None:
    """The licence that preference rows of these sources carry together, or None where one of them gives none.

    A non-commercial source makes the whole non-commercial.
    """
    known = [next((lic for start, lic in SOURCE_LICENCES.items() if s.startswith(start)), None) for s in sources]
    restricted = [licence for licence in known if is_non_commercial(licence)]
    if restricted:
        return restricted[0]
    return known[0] if len(set(known)) == 1 else None


def choose_licence(given: str | None, inherited: str | None, what: str) -> str:
    """The licence to publish under.

    Raises:
        ValueError: none is known, the Hub does not know it, or it permits commercial use where the base does not.
    """
    licence = given or inherited
    if licence is None:
        raise ValueError(f"license is not known for {what}: give one of {', '.join(LICENCES)}.")
    if licence not in LICENCES:
        raise ValueError(f"license={licence!r} is not known here: give one of {', '.join(LICENCES)}.")
    if is_non_commercial(inherited) and not is_non_commercial(licence):
        raise ValueError(f"license={licence!r} permits what {what} inherits from does not: use {inherited!r}.")
    return licence
