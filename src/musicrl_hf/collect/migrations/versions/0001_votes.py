"""The first tables: consent, clips, pairs, deals and votes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "settings",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_settings"),
    )
    op.create_table(
        "consents",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("licence", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_consents"),
    )
    op.create_table(
        "listeners",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("consent", sa.String(64), nullable=False),
        sa.Column("consented_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_listeners"),
        sa.ForeignKeyConstraint(["consent"], ["consents.id"], name="fk_listeners_consent"),
    )
    op.create_table(
        "clips",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("duration_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_clips"),
    )
    op.create_table(
        "pairs",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("first", sa.String(32), nullable=False),
        sa.Column("second", sa.String(32), nullable=False),
        sa.Column("owner", sa.String(64), nullable=True),
        sa.Column("made_at", sa.Float(), nullable=False),
        sa.Column("live", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_pairs"),
        sa.ForeignKeyConstraint(["first"], ["clips.id"], name="fk_pairs_first"),
        sa.ForeignKeyConstraint(["second"], ["clips.id"], name="fk_pairs_second"),
        sa.ForeignKeyConstraint(["owner"], ["listeners.id"], name="fk_pairs_owner"),
        sa.CheckConstraint("kind in ('pair', 'identical', 'broken')", name=op.f("ck_pairs_kind")),
    )
    op.create_index("ix_pairs_kind_live_made_at", "pairs", ["kind", "live", "made_at"])
    op.create_index("ix_pairs_owner", "pairs", ["owner"])
    op.create_table(
        "deals",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("pair", sa.String(32), nullable=False),
        sa.Column("listener", sa.String(64), nullable=False),
        sa.Column("swapped", sa.Boolean(), nullable=False),
        sa.Column("dealt_at", sa.Float(), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_deals"),
        sa.ForeignKeyConstraint(["pair"], ["pairs.id"], name="fk_deals_pair"),
        sa.ForeignKeyConstraint(["listener"], ["listeners.id"], name="fk_deals_listener"),
        sa.UniqueConstraint("listener", "pair", name="uq_deals_listener"),
        sa.CheckConstraint("state in ('open', 'voted', 'expired')", name=op.f("ck_deals_state")),
    )
    op.create_index("ix_deals_pair", "deals", ["pair"])
    op.create_index("ix_deals_state_dealt_at", "deals", ["state", "dealt_at"])
    op.create_table(
        "votes",
        sa.Column("deal", sa.String(32), nullable=False),
        sa.Column("pair", sa.String(32), nullable=False),
        sa.Column("listener", sa.String(64), nullable=False),
        sa.Column("preference", sa.String(8), nullable=False),
        sa.Column("score_a", sa.Integer(), nullable=True),
        sa.Column("score_b", sa.Integer(), nullable=True),
        sa.Column("seconds_a", sa.Float(), nullable=False),
        sa.Column("seconds_b", sa.Float(), nullable=False),
        sa.Column("voted_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("deal", name="pk_votes"),
        sa.ForeignKeyConstraint(["deal"], ["deals.id"], name="fk_votes_deal"),
        sa.ForeignKeyConstraint(["pair"], ["pairs.id"], name="fk_votes_pair"),
        sa.ForeignKeyConstraint(["listener"], ["listeners.id"], name="fk_votes_listener"),
        sa.UniqueConstraint("listener", "pair", name="uq_votes_listener"),
        sa.CheckConstraint("preference in ('a', 'b', 'tie', 'both_bad')", name=op.f("ck_votes_preference")),
        sa.CheckConstraint("score_a between 1 and 5 and score_b between 1 and 5", name=op.f("ck_votes_scores")),
    )
    op.create_index("ix_votes_pair", "votes", ["pair"])
    op.create_index("ix_votes_listener_voted_at", "votes", ["listener", "voted_at"])
