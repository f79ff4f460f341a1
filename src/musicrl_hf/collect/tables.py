"""The tables of the store. Whoever changes them adds a migration in `migrations/versions`; a test compares the two.

Listeners are salted hashes. Times are seconds since 1970 (UTC). What a listener chose is kept as heard, with a and b, and
`swapped` says which clip of the pair was a.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

settings = Table(  # salt of the hashes, keys of the tokens, rules, weights of labels, last withdrawal; the secrets are never exported
    "settings",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", Text, nullable=False),
)

consents = Table(  # what listeners were asked, word for word
    "consents",
    metadata,
    Column("id", String(64), primary_key=True),  # SHA-256 of licence and text
    Column("text", Text, nullable=False),
    Column("licence", String(64), nullable=False),
)

listeners = Table(
    "listeners",
    metadata,
    Column("id", String(64), primary_key=True),  # salted hash of the private code, or a simulated listener's name
    Column("consent", ForeignKey("consents.id"), nullable=False),
    Column("consented_at", Float, nullable=False),
)

clips = Table(
    "clips",
    metadata,
    Column("id", String(32), primary_key=True),  # ID.wav in the clip folder
    Column("model", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("duration_s", Float, nullable=False),
)

pairs = Table(
    "pairs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),  # pair; or a check of attention: identical, broken
    Column("prompt", Text, nullable=False),
    Column("first", ForeignKey("clips.id"), nullable=False),
    Column("second", ForeignKey("clips.id"), nullable=False),
    Column("owner", ForeignKey("listeners.id"), nullable=True),  # who typed the prompt; null where it was dealt
    Column("made_at", Float, nullable=False),
    Column("live", Integer, nullable=False),  # deals of it that are open or voted on
    CheckConstraint("kind in ('pair', 'identical', 'broken')", name="kind"),
    Index("ix_pairs_kind_live_made_at", "kind", "live", "made_at"),
    Index("ix_pairs_owner", "owner"),
)

deals = Table(
    "deals",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("pair", ForeignKey("pairs.id"), nullable=False),
    Column("listener", ForeignKey("listeners.id"), nullable=False),
    Column("swapped", Boolean, nullable=False),  # a is the pair's second clip
    Column("dealt_at", Float, nullable=False),
    Column("state", String(8), nullable=False),  # open; voted; expired: not voted on in time
    UniqueConstraint("listener", "pair"),  # nobody is asked the same twice
    CheckConstraint("state in ('open', 'voted', 'expired')", name="state"),
    Index("ix_deals_pair", "pair"),
    Index("ix_deals_state_dealt_at", "state", "dealt_at"),
)

votes = Table(
    "votes",
    metadata,
    Column("deal", ForeignKey("deals.id"), primary_key=True),  # so a deal gives one vote, however often it is sent
    Column("pair", ForeignKey("pairs.id"), nullable=False),
    Column("listener", ForeignKey("listeners.id"), nullable=False),
    Column("preference", String(8), nullable=False),
    Column("score_a", Integer, nullable=True),  # 1 to 5, where clips are rated
    Column("score_b", Integer, nullable=True),
    Column("seconds_a", Float, nullable=False),
    Column("seconds_b", Float, nullable=False),
    Column("voted_at", Float, nullable=False),
    UniqueConstraint("listener", "pair"),
    CheckConstraint("preference in ('a', 'b', 'tie', 'both_bad')", name="preference"),
    CheckConstraint("score_a between 1 and 5 and score_b between 1 and 5", name="scores"),
    Index("ix_votes_pair", "pair"),
    Index("ix_votes_listener_voted_at", "listener", "voted_at"),
)
