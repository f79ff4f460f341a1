"""The whole loop: pairs from a generator, listeners' choices, a reward, tuned generators, and a blind comparison.

Each stage is one of the package's own jobs, writes one folder under `output_dir`, and is skipped where that folder is
whole already, so that a run that was cut short goes on.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .audio import MAX_DURATION_S, atomic_path
from .devices import find_device
from .generator import load_generator
from .places import check_output, find_model
from .rewards.combine import find_reward

RECIPES = Path(__file__).parent / "align_recipes"
PROMPTS = Path(__file__).parent / "prompts"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class AlignJob:
    """One round of the loop with simulated listeners."""

    output_dir: str = field(metadata={"help": "folder for everything: votes, models, table, clips and page"})
    model: str = _option("musicrl-tiny", "generator to align: bundled name, folder or Hub id")
    adherence: str = _option("adherence", "reward for text adherence, as `musicrl score --reward` takes it")
    quality: str = _option("quality", "reward for acoustic quality, as `musicrl score --reward` takes it")
    preference_clap: str | None = _option(
        None, "CLAP model on whose frozen vectors the preference reward is learned; empty for the bundled one"
    )
    prompts: str | None = _option(
        None, "text file, one prompt a line, to collect and tune on; empty for the bundled ones"
    )
    eval_prompts: str | None = _option(None, "text file of held-out prompts; empty for the bundled ones")
    heldout_prompts: int = _option(24, "how many of the held-out prompts to compare on, from the first")
    duration_s: float = _option(3.0, "length of all clips, in seconds (at most 30)")
    listeners: int = _option(12, "simulated listeners who vote")
    panel: int = _option(
        12, "other simulated listeners, whose votes nothing is trained on, for the comparison (at least 6)"
    )
    pairs_per_prompt: int = _option(2, "pairs that are voted on for each prompt")
    reward_steps: int = _option(100, "optimiser steps of the preference reward")
    ppo_steps: int = _option(20, "optimiser steps of each of the three PPO runs")
    ppo_batch_size: int = _option(16, "clips that each PPO step samples")
    seed: int = _option(0, "of everything")

    def __post_init__(self) -> None:
        least = {"heldout_prompts": 1, "listeners": 1, "panel": 6, "pairs_per_prompt": 1, "ppo_batch_size": 1}
        for name, number in least.items():
            if vars(self)[name] < number:
                raise ValueError(f"`{name}` must be at least {number}, got {vars(self)[name]!r}.")
        for name in ("reward_steps", "ppo_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 optimiser step, got {getattr(self, name)!r}.")
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {self.duration_s!r}.")


def recipe_file(name_or_path: str) -> Path:
    """The YAML file of a bundled recipe ("tiny"), or the given file.

    Raises:
        ValueError: neither.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name_or_path in known:
        return RECIPES / f"{name_or_path}.yaml"
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    raise ValueError(f"`recipe` = {name_or_path!r} is neither a bundled recipe ({', '.join(known)}) nor a YAML file.")


def run_align(job: AlignJob) -> Path:
    """Run the loop and print its table.

    Systems, named as in MusicRL: `base`; `r`, PPO on adherence and quality; `u`, PPO on the preference reward that was
    learned from the votes; `ru`, the same, starting from `r` and anchored to it.

    Returns:
        The folder: votes/, preference/, r/, u/, ru/, evaluation/ (page, clips, JSON) and result.json.

    Raises:
        ValueError: a setting out of range, an unknown model or reward, an empty prompt file.
    """
    from .evaluation.report import EvaluateJob, run_evaluate
    from .training.ppo import PPOJob, run_ppo
    from .training.reward import RewardJob, run_reward

    out = Path(job.output_dir)
    check_output(out, "a whole loop of `musicrl align`")
    find_model(job.model, "musicgen", "model")
    for spec in (job.adherence, job.quality):
        find_reward(spec)
    out.mkdir(parents=True, exist_ok=True)
    prompts, heldout = _write_prompts(job, out)
    stages = _Stages(out, total=6)
    preference = f"preference:{out / 'preference'}"

    def tune(name: str, start: str, reward: list[str], kl_coef: float) -> None:
        run_ppo(
            PPOJob(
                model=start,
                ref_model=start,
                reward=reward,
                output_dir=str(out / name),
                prompts=str(prompts),
                duration_s=job.duration_s,
                max_steps=job.ppo_steps,
                per_device_train_batch_size=job.ppo_batch_size,
                learning_rate=2e-4,
                kl_coef=kl_coef,
                seed=job.seed,
                logging_steps=4,
            )
        )

    stages.run(
        "votes", "simulated listeners choose between two clips of the generator", lambda: _collect(job, out, prompts)
    )
    stages.run(
        "preference",
        "learn a reward from the votes",
        lambda: run_reward(
            RewardJob(
                preferences=str(out / "votes"),
                output_dir=str(out / "preference"),
                backbone="clap",
                model=job.preference_clap,
                head_dropout=0.5,
                weight_decay=1.0,
                learning_rate=3e-4,
                max_steps=job.reward_steps,
                test_share=0.15,
                seed=job.seed,
            )
        ),
    )
    # The costs of a nat follow the rewards' spread: about .07 for adherence and quality, .4 for the preference reward.
    adherence_and_quality = [f"0.5*{job.adherence}", f"0.5*{job.quality}"]
    stages.run("r", "PPO on adherence and quality", lambda: tune("r", job.model, adherence_and_quality, 0.002))
    stages.run("u", "PPO on the learned preference reward", lambda: tune("u", job.model, [preference], 0.01))
    stages.run(
        "ru",
        "PPO on the learned preference reward, from r and anchored to r",
        lambda: tune("ru", str(out / "r"), [preference], 0.01),
    )
    stages.run(
        "evaluation",
        "other simulated listeners compare the four generators blind, on prompts kept out",
        lambda: run_evaluate(
            EvaluateJob(
                models=[f"base={job.model}", *(f"{name}={out / name}" for name in ("r", "u", "ru"))],
                prompts=str(heldout),
                out=str(out / "evaluation"),
                listeners=job.panel,
                rewards=[job.adherence, job.quality, preference],
                duration_s=job.duration_s,
                batch_size=32,
                seed=job.seed + 1,
            )
        ),
    )
    table = summary_table(json.loads((out / "evaluation" / "results.json").read_text()))
    with atomic_path(out / "table.txt") as temporary:
        temporary.write_text(table + "\n")
    print(f"\n{table}\n\nHear the clips and see the whole comparison: {out / 'evaluation' / 'index.html'}")
    return out


def summary_table(result: dict[str, Any]) -> str:
    """The loop's outcome as text, one line a system.

    Args:
        result: what `evaluate_models` gives and `evaluation/results.json` holds; the first model is the base.
    """
    base, *tuned = result["models"]
    rates = {row["model"]: row for row in result["win_rates"] if row["against"] == base}
    scores = {row["model"]: row["mean"] for row in result["mos"]}
    rewards = {name: {row["model"]: row["mean"] for row in table["means"]} for name, table in result["rewards"].items()}
    labels = {name: name.partition(":")[0] for name in rewards}
    head = ["system", f"win rate against {base} [95 %]", "w/t/l", "mean rating", *labels.values(), "diversity (dB)"]
    rows = [head]
    for name in (base, *tuned):
        rate = rates.get(name)
        rows.append(
            [
                name,
                _percentages(rate),
                "" if rate is None else f"{rate['wins']}/{rate['ties']}/{rate['losses']}",
                f"{scores[name]:.2f}",
                *(f"{means[name]:.3f}" for means in rewards.values()),
                f"{result['metrics'][name]['timbre_distance_db']['mean']:.2f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    raters = result["raters"]
    kind = f"simulated listeners ({raters['simulated']})" if raters["simulated"] else "listeners"
    note = (
        f"{result['prompts']} held-out prompts, {raters['clips_per_prompt']} clips each; {raters['per_clip']} of "
        f"{raters['listeners']} {kind} rate each clip from 1 to 5. Nobody listened.\n"
        "This is the short version: a few steps on a small model, so that it takes minutes."
    )
    return "\n".join([*lines, "", note])


def _percentages(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return ""
    if rate["win_rate"] is None:
        return "only ties"
    return f"{rate['win_rate']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]"


class _Stages:
    """Runs what is not there yet and says what goes on."""

    def __init__(self, out: Path, total: int):
        self.out, self.total, self.number = out, total, 0

    def run(self, name: str, summary: str, work: Callable[[], Any]) -> None:
        self.number += 1
        head = f"[{self.number}/{self.total}] {name}: {summary}"
        stamp = self.out / "stages" / f"{name}.json"
        if stamp.is_file():
            print(f"{head} (done before)", flush=True)
            return
        print(head, flush=True)
        started = time.monotonic()
        work()
        seconds = round(time.monotonic() - started, 1)
        with atomic_path(stamp) as temporary:
            temporary.write_text(json.dumps({"seconds": seconds}) + "\n")
        print(f"      {seconds:.0f} s", flush=True)


def _write_prompts(job: AlignJob, out: Path) -> tuple[Path, Path]:
    """The prompts of this run, as files that its jobs read; held-out ones must not be among the others."""
    from .training.ppo import read_prompts

    prompts = read_prompts(job.prompts or PROMPTS / "train.txt")
    heldout = read_prompts(job.eval_prompts or PROMPTS / "heldout.txt")[: job.heldout_prompts]
    shared = {prompt.lower() for prompt in prompts} & {prompt.lower() for prompt in heldout}
    if shared:
        raise ValueError(f"`eval_prompts` holds {sorted(shared)[0]!r}, which `prompts` holds too; keep them apart.")
    for name, lines in (("prompts.txt", prompts), ("heldout_prompts.txt", heldout)):
        with atomic_path(out / name) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    return out / "prompts.txt", out / "heldout_prompts.txt"


def _collect(job: AlignJob, out: Path, prompts: Path) -> None:
    from .preferences.listeners import simulated_listeners
    from .preferences.pairs import sample_pairs
    from .training.ppo import read_prompts

    sample_pairs(
        load_generator(job.model, device=find_device()),
        read_prompts(prompts),
        out / "votes",
        listeners=simulated_listeners(job.listeners, seed=job.seed),
        name="base",
        duration_s=job.duration_s,
        pairs_per_prompt=job.pairs_per_prompt,
        batch_size=64,
        seed=job.seed,
    )
