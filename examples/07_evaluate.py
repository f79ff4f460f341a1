"""Side by side: which of several generators is preferred, how sure that is, and a page to hear it on.

    python examples/07_evaluate.py --tiny
    python examples/07_evaluate.py --models musicrl-tiny tuned=runs/dpo --prompts prompts.txt --rewards adherence quality
    python examples/07_evaluate.py --votes battles.csv

Each clip is rated by simulated listeners: rules on the waveform, not people. `--votes` counts votes of people instead, from a
CSV with `system_a`, `system_b` and `preference`. `--tiny` compares the bundled generator with a copy whose weights were
disturbed. Four prompts and one clip each show how a comparison runs; they are too few to tell which of the two is better.
"""

import argparse
from pathlib import Path

import torch

from musicrl_hf import load_generator
from musicrl_hf.evaluation import EvaluateJob, evaluate_models, run_evaluate
from musicrl_hf.preferences import simulated_listeners

PROMPTS = [
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
    "a slow air played by a flute, alone",
    "a lively reel played by a fiddle with drums",
]


def disturbed(name: str, noise: float = 0.5) -> torch.nn.Module:
    """The generator `name` with noise on its decoder's weights, in units of each matrix's own spread."""
    generator = load_generator(name)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in generator.decoder.parameters():
            if weight.dim() > 1:
                weight += noise * weight.std() * torch.randn_like(weight)
    return generator


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare generators.")
    parser.add_argument("--models", nargs="+", default=[], help="bundled names, folders or Hub ids; or label=name")
    parser.add_argument("--prompts", help="text file, one prompt a line")
    parser.add_argument("--votes", help="CSV of votes to count instead")
    parser.add_argument("--rewards", nargs="*", default=[], help="rewards to score the clips with as well")
    parser.add_argument("--out", type=Path, default=Path("out/evaluate"), help="folder for the page and the numbers")
    parser.add_argument("--tiny", action="store_true", help="the bundled generator against a disturbed copy")
    arguments = parser.parse_args()

    if arguments.tiny:
        models = {"musicrl-tiny": load_generator("musicrl-tiny"), "disturbed": disturbed("musicrl-tiny")}
        result = evaluate_models(
            models, PROMPTS, arguments.out, listeners=simulated_listeners(6), duration_s=2.0, samples_per_prompt=1
        )
        for score in result["mos"]:
            print(f"{score['model']:14s} MOS {score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]")
        for rate in result["win_rates"]:
            print(f"{rate['model']} - {rate['against']}: {rate['wins']} / {rate['ties']} / {rate['losses']}")
        page = arguments.out / "index.html"
    else:
        page = run_evaluate(
            EvaluateJob(
                models=arguments.models,
                prompts=arguments.prompts,
                votes=arguments.votes,
                rewards=arguments.rewards,
                out=str(arguments.out),
            )
        )
    print(f"Open {page}")


if __name__ == "__main__":
    main()
