"""What a generator's label stands for in a store: the same weights for all of its clips, or votes are of two under one name."""

import json
from collections.abc import Mapping

from sqlalchemy import delete, insert, select

from ..places import weights_of
from .store import VoteStore
from .tables import clips, settings

_SETTING = "weights"


def check_labels(store: VoteStore, names: Mapping[str, str]) -> None:
    """Refuse a label under which the store has clips of other weights; remember what each one stands for.

    Args:
        store: of the collection.
        names: label -> bundled name, folder or Hub id, which has been loaded.

    Raises:
        ValueError: naming the label; the store is as it was.
    """
    stands_for = {label: weights_of(name) for label, name in names.items()}
    with store.write(exclusive=True) as connection:
        known = json.loads(connection.scalar(select(settings.c.value).where(settings.c.name == _SETTING)) or "{}")
        changed = [label for label in names if known.get(label, stands_for[label]) != stands_for[label]]
        there = set(connection.scalars(select(clips.c.model).where(clips.c.model.in_(changed)).distinct()))
        for label in changed:
            if label in there:
                raise ValueError(
                    f"the store {store.name} has clips of other weights under the name {label!r}: give these a name of their "
                    f"own, as in another={names[label]}, or another --store."
                )
        connection.execute(delete(settings).where(settings.c.name == _SETTING))
        connection.execute(insert(settings).values(name=_SETTING, value=json.dumps(known | stands_for)))
