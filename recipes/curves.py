"""Draws recipes/results/curves.svg from what the stages recorded: the losses of generator and text encoder, the decoder's trials.

pip install matplotlib
python recipes/curves.py
"""

from pathlib import Path

from common import read_json

from musicrl_hf.audio import atomic_path

RESULTS = Path(__file__).resolve().parent / "results"
KEPT = "kept"  # begins the name of the trial whose weights are published


def draw(results: Path = RESULTS) -> Path:
    """Write curves.svg beside the records, and return its path."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "musicrl"  # the same file from the same numbers
    import matplotlib.pyplot as plt

    generator, text = (read_json(results / f"{stage}.json")["log"] for stage in ("generator", "text_encoder"))
    trials = read_json(results / "decoder_trials.json")["trials"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    left.plot([row[1] for row in generator], [row[2] for row in generator])
    left.set(title="generator", xlabel="minutes", ylabel="training loss (nats a code)")
    for fact in text[0][2]:
        middle.plot([row[1] for row in text], [row[2][fact] for row in text], label=fact)
    middle.set(title="text encoder, each fact", xlabel="minutes", ylabel="training loss (nats)")
    for name, trial in trials.items():
        rows = trial["rows"]
        right.plot(
            [row[0] for row in rows], [row[1] for row in rows], label=name, lw=2.5 if name.startswith(KEPT) else 1
        )
    right.set(
        title="codec's decoder, 288 validation clips",
        xlabel="minutes of a trial",
        ylabel="share of instruments that the judges name",
    )
    for axes in (middle, right):
        axes.legend(fontsize="x-small")
    with atomic_path(results / "curves.svg") as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
    return results / "curves.svg"


if __name__ == "__main__":
    print(f"Wrote {draw()}")
