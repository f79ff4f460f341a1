"""Simulated listeners write the store that the page writes: a study rehearsed before people are asked."""

from collections import Counter
from collections.abc import Sequence

from sqlalchemy import select
from tqdm.auto import tqdm

from ..audio import read_audio
from ..preferences.listeners import SimulatedListener
from .desk import Deal, Desk
from .rules import Answer
from .tables import consents
from .tables import listeners as listener_table


def simulate(desk: Desk, listeners: Sequence[SimulatedListener], votes_each: int | None = None) -> Counter[str]:
    """Have simulated listeners answer what they are dealt, in turn, until nothing is left for them.

    Their names begin with "simulated", in the store, in every row of the export and on its card. They hear the files that
    the page would play; all rules hold for them but the time to listen and the limits on how fast somebody votes.

    Args:
        desk: of the collection.
        listeners: from `simulated_listeners`.
        votes_each: votes after which a listener stops; None for no end.

    Returns:
        how many votes each gave, by name; who was dealt nothing is not in it.

    Raises:
        ValueError: as `enrol`.
    """
    enrol(desk, listeners)
    given: Counter[str] = Counter()
    waiting = {listener.name: desk.votes_of(listener.name) for listener in listeners}
    with tqdm(desc="simulated votes") as bar:
        while waiting:
            for listener in listeners:
                if listener.name not in waiting:
                    continue
                done = votes_each is not None and waiting[listener.name] >= votes_each
                deal = None if done else desk.deal(listener.name)
                if deal is None:
                    del waiting[listener.name]
                    continue
                desk.vote(listener.name, deal.token, _answer(desk, listener, deal))
                waiting[listener.name] += 1
                given[listener.name] += 1
                bar.update()
    return given


def enrol(desk: Desk, listeners: Sequence[SimulatedListener]) -> None:
    """Take simulated listeners in who are not known yet.

    Raises:
        ValueError: some voted under another licence or text: their votes would be under two.
    """
    names = [listener.name for listener in listeners]
    table = listener_table.join(consents, listener_table.c.consent == consents.c.id)
    columns = (listener_table.c.id, listener_table.c.consent, consents.c.licence)
    with desk.store.read() as connection:
        rows = connection.execute(select(*columns).select_from(table).where(listener_table.c.id.in_(names))).all()
    if others := sorted({row.licence for row in rows if row.consent != desk.rules.consent_id}):
        raise ValueError(
            f"`licence` is {desk.rules.licence!r}, but simulated listeners of the store {desk.store.name} voted under "
            f"{', '.join(others)} or another text for listeners: give a --store of its own, or that --licence."
        )
    for name in names:
        if name not in {row.id for row in rows}:
            desk.enrol(name)


def _answer(desk: Desk, listener: SimulatedListener, deal: Deal) -> Answer:
    (audio_a, rate), (audio_b, _) = (read_audio(desk.clip(deal.clip_token, side)) for side in "ab")
    if desk.rules.study:
        scores = [int(listener.rate([deal.prompt], audio[None], rate)[0]) for audio in (audio_a, audio_b)]
        return Answer.rated(scores[0], scores[1], deal.duration_a, deal.duration_b)
    preference = listener(deal.prompt, audio_a, audio_b, rate).preference
    return Answer(preference, deal.duration_a, deal.duration_b)
