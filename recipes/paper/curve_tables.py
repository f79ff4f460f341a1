"""The long runs of results/README.md: how every reward moves against KL, and where each guard would have stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from larger_tables import Table

from musicrl_hf.audio import atomic_path

GUARDED = ("panel_taste", "other_taste", "adherence")  # what a guard is to keep


def draw_curves(found: dict[str, Any], names: Mapping[str, str], results: Path) -> list[str]:
    """An SVG in `results` for each long run: every reward against KL, each from its own start in its own spread; their file names."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "musicrl"  # the same file from the same numbers
    import matplotlib.pyplot as plt

    written = []
    for name, rows in found["curves"].items():
        keys = [key for key in ("reward", *names) if key in rows[0]]
        tuned_on = sum(key.startswith(("preference", "reward_")) for key in rows[0])  # an evaluation adds rewards up
        trained = "what is trained on" if tuned_on == 1 else f"sum of its {tuned_on} rewards"
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), sharey=True, layout="constrained")
        for axis, (x, label) in zip(axes, (("kl", "KL to the base, nats a clip"), ("step", "step")), strict=True):
            for key in keys:
                values = [row[key] for row in rows]
                spread = max(values) - min(values) or 1.0
                label_of = names.get(key, trained)
                axis.plot([row[x] for row in rows], [(value - values[0]) / spread for value in values], label=label_of)
            axis.set_xlabel(label)
            axis.axhline(0, color="grey", linewidth=0.5)
        axes[0].set_xscale("symlog", linthresh=10)
        axes[0].set_xlim(left=0)
        axes[0].set_ylabel("change from the base, in each curve's own range")
        figure.suptitle("simulated listeners: nobody listened", fontsize=9)
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        with atomic_path(results / f"curves_{name}.svg") as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        plt.close(figure)
        written.append(f"curves_{name}.svg")
    return written


def guards(found: dict[str, Any], names: Mapping[str, str], table: Table) -> str:
    """The policy that each guard would have left of a long run, and what the held-out panel said of it."""
    rows = []
    for name, points in found["curves"].items():
        best = max(points, key=lambda row: row["panel_taste"])
        for guard, (row, at) in {
            **stops(points),
            "(best for the panel)": (best, None),
            "none": (points[-1], None),
        }.items():
            heard = [f"{row[key]:.3f}" for key in GUARDED]
            rows.append([name, guard, str(row["step"]), "" if at is None else str(at), f"{row['kl']:.1f}", *heard])
    return table(["run", "guard", "policy of step", "stopped at", "KL (nats)", *(names[key] for key in GUARDED)], rows)


def stops(
    points: list[dict[str, float]], patience: int = 3, budgets: Sequence[float] = (10, 30, 60)
) -> dict[str, tuple[dict[str, float], int | None]]:
    """The evaluation whose policy each guard leaves, and the step at which it stops the run; None where it does not.

    A panel's guard stops once `patience` evaluations were no better than the best before them, and leaves that one's policy. Of a KL
    budget it is the last evaluation before the first beyond it: `--max_kl`, which stops at the step that is logged beyond
    the budget, leaves a policy between the two.
    """
    found: dict[str, tuple[dict[str, float], int | None]] = {}
    for guard, key in (("held-out panel", "panel_taste"), ("panel of another taste", "other_taste")):
        best, stopped = 0, None
        for number, row in enumerate(points):
            if row[key] > points[best][key]:
                best = number
            elif number - best >= patience:
                stopped = int(row["step"])
                break
        found[guard] = points[best], stopped
    for budget in budgets:
        beyond = next((number for number, row in enumerate(points) if row["kl"] > budget), None)
        within = points[:beyond] or points[:1]
        found[f"KL of {budget:g} nats"] = within[-1], None if beyond is None else int(points[beyond]["step"])
    return found
