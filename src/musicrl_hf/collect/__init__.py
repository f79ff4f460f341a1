"""The listening page, its votes, and their publication. Needs the extra `collect`: pip install "musicrl-hf[collect]"."""

from importlib.util import find_spec

NEEDED = ("sqlalchemy", "alembic", "gradio")


def require_extra() -> None:
    """Say in one line what to install where the extra is missing.

    Raises:
        ImportError: naming the packages that are not there.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{", ".join(missing)} not installed: collecting votes needs `pip install "musicrl-hf[collect]"`.'
        )
