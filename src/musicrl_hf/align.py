"""The whole loop: pairs from a generator, listeners' choices, a reward, tuned generators, and a blind comparison.

Each stage is one of the package's own jobs, writes one folder under `output_dir`, and is skipped where that folder is
whole already, so that a run that was cut short goes on.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets

from .audio import MAX_DURATION_S, atomic_path
from .devices import find_device
from .generator import load_generator
from .places import alone_in, check_output, find_model
from .rewards.combine import NORMALISE, find_reward
from .stages import Stages, going_on_in

RECIPES = Path(__file__).parent / "align_recipes"
PROMPTS = Path(__file__).parent / "prompts"
PAPER_CLIPS = 40 * 64  # that R and U of the recipe "paper" are tuned on


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
        None, "CLAP model on whose frozen vectors the preference reward is learned; none for the bundled one"
    )
    prompts: str | None = _option(
        None, "text file, one prompt a line, to collect and tune on; none for the bundled ones"
    )
    eval_prompts: str | None = _option(None, "text file of held-out prompts; none for the bundled ones")
    heldout_prompts: int = _option(24, "how many of the held-out prompts to compare on, from the first")
    duration_s: float = _option(3.0, "length of all clips, in seconds (at most 30)")
    listeners: int = _option(12, "simulated listeners who vote")
    panel: int = _option(
        12, "other simulated listeners, whose votes nothing is trained on, for the comparison (at least 6)"
    )
    pairs_per_prompt: int = _option(2, "pairs that are voted on for each prompt")
    votes_per_pair: int = _option(1, "different listeners who vote on each pair")
    reward_backbone: str = _option(
        "clap", "what the preference reward reads: clap or generator, as `musicrl reward` has it"
    )
    reward_steps: int = _option(100, "optimiser steps of the preference reward")
    ppo_steps: int = _option(20, "optimiser steps of each PPO run")
    ru_steps: int | None = _option(None, "of `ru`, where it takes others; none for `ppo_steps`")
    ppo_batch_size: int = _option(16, "clips that each PPO step samples")
    clips_per_prompt: int = _option(1, "of them, of each prompt; above 1 they are compared with each other")
    normalise: str = _option("none", "how rewards are combined, as `musicrl ppo --normalise` takes it")
    ru_adherence: float = _option(
        0.0, "share of adherence beside the preference reward in `ru`, combined by `normalise`; 0 leaves it out"
    )
    variety: float = _option(
        0.0,
        "share of variety, a clip's distance to its prompt's others, beside the preference reward in `u` and `ru`, likewise",
    )
    learning_rate: float = _option(2e-4, "of the PPO runs")
    lora_r: int = _option(0, "rank of the adapters that PPO trains; 0 trains the whole decoders")
    # The costs of a nat follow the rewards' spread: about .07 for adherence and quality as they are, .7 for their sum with
    # "normalise_then_sum", .4 for the preference reward.
    kl_coef: float = _option(0.002, "reward lost a nat of KL to the model, on several rewards")
    preference_kl_coef: float = _option(0.01, "the same on the preference reward alone")
    max_kl: float | None = _option(
        None,
        "each PPO run ends at the first logged step beyond this many nats a clip from where it began; none for no limit",
    )
    bf16: bool = _option(False, "train reward and generators in bfloat16, as `musicrl ppo --bf16 true` does")
    rounds: int = _option(1, "2 collects again, from `ru`, and tunes it on what was learned from both rounds' votes")
    seed: int = _option(0, "of everything")

    def __post_init__(self) -> None:
        least = {"heldout_prompts": 1, "listeners": 1, "panel": 6, "pairs_per_prompt": 1, "ppo_batch_size": 1}
        for name, number in least.items():
            if vars(self)[name] < number:
                raise ValueError(f"`{name}` must be at least {number}, got {vars(self)[name]!r}.")
        for name in ("reward_steps", "ppo_steps", "ru_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"`{name}` must be at least 1 optimiser step, got {steps!r}.")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"`max_kl` must be above 0 nats, or none for no limit, got {self.max_kl!r}.")
        if self.clips_per_prompt < 1 or self.ppo_batch_size % self.clips_per_prompt:
            raise ValueError(
                f"`clips_per_prompt` = {self.clips_per_prompt} must divide `ppo_batch_size` = {self.ppo_batch_size}."
            )
        if self.normalise not in NORMALISE:
            raise ValueError(f"`normalise` must be one of {', '.join(NORMALISE)}, got {self.normalise!r}.")
        for name in ("ru_adherence", "variety"):
            if not 0 <= vars(self)[name] < 1:
                raise ValueError(f"`{name}` must be a share, in [0, 1), got {vars(self)[name]!r}.")
        if (both := self.ru_adherence + self.variety) >= 1:
            raise ValueError(f"`ru_adherence` and `variety` add up to {both:g} and leave no preference: lower one.")
        if self.variety and self.clips_per_prompt < 2:
            raise ValueError("`clips_per_prompt` is 1, and `variety` compares a prompt's clips: give at least 2.")
        if self.rounds not in (1, 2):
            raise ValueError(f"`rounds` must be 1 or 2, got {self.rounds!r}: a third starts from `ru2`.")
        if self.reward_backbone not in ("clap", "generator"):
            raise ValueError(f"`reward_backbone` must be 'clap' or 'generator', got {self.reward_backbone!r}.")
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
    learned from the votes; `ru`, the same, starting from `r` and anchored to it, with adherence beside it where
    `ru_adherence` says so (the paper has none: listeners who care little for what was asked for then undo what `r` gained), and
    `variety` beside both. With two rounds `ru2`: `ru` is voted on as well, the reward learned anew from all votes, and `ru` tuned
    on it in the same way, anchored to itself.

    Returns:
        The folder: votes/, preference/, r/, u/, ru/, evaluation/ (page, clips, JSON) and table.txt; of a second round also
        votes2/, votes_all/, preference2/, ru2/ and evaluation2/, of all five.

    Raises:
        ValueError: a setting out of range, an unknown model or reward, an empty prompt file, other settings than those that
            the folder was begun with, another run at work there.
    """
    out = Path(job.output_dir)
    check_output(out, "a whole loop of `musicrl align`")
    find_model(job.model, "musicgen", "model")
    for spec in (job.adherence, job.quality):
        find_reward(spec)
    with alone_in(out):
        return _run(job, out)


def _run(job: AlignJob, out: Path) -> Path:
    prompts, heldout = _write_prompts(job, out)
    stages = Stages(out, total=6 if job.rounds == 1 else 9)
    r, ru, preference = str(out / "r"), str(out / "ru"), f"preference:{out / 'preference'}"
    varied = " and variety" * bool(job.variety)
    beside = " and adherence" * bool(job.ru_adherence) + varied
    stages.run(
        "votes",
        "simulated listeners choose between two clips of the generator",
        lambda: _collect(job, job.model, "base", out / "votes", prompts),
    )
    stages.run("preference", "learn a reward from the votes", lambda: _learn(job, out / "votes", out / "preference"))
    stages.run("r", "PPO on adherence and quality", lambda: _tune(job, "r", job.model, prompts))
    stages.run(
        "u", f"PPO on the learned preference reward{varied}", lambda: _tune(job, "u", job.model, prompts, preference)
    )
    stages.run(
        "ru",
        f"PPO on the learned preference reward{beside}, from r and anchored to r",
        lambda: _tune(job, "ru", r, prompts, preference),
    )
    systems, newest = ["r", "u", "ru"], preference
    if job.rounds == 2:
        newest = f"preference:{out / 'preference2'}"
        stages.run(
            "votes2",
            "the same listeners choose between two clips of ru",
            lambda: _collect(job, ru, "ru", out / "votes2", prompts, number=2),
        )
        stages.run(
            "preference2",
            "learn a reward from all votes",
            lambda: _learn(job, _together(out, "votes", "votes2"), out / "preference2"),
        )
        stages.run(
            "ru2",
            f"PPO on that{beside}, from ru and anchored to ru",
            lambda: _tune(job, "ru2", ru, prompts, newest),
        )
        systems.append("ru2")
    # A second round asked for later goes on from the first, and leaves the first one's comparison as it is.
    evaluation = out / ("evaluation" if job.rounds == 1 else f"evaluation{job.rounds}")
    stages.run(
        evaluation.name,
        f"other simulated listeners compare the {len(systems) + 1} generators blind, on prompts kept out",
        lambda: _compare(job, systems, heldout, [preference, *([newest] if newest != preference else [])], evaluation),
    )
    table = summary_table(json.loads((evaluation / "results.json").read_text()), job)
    with atomic_path(out / "table.txt") as temporary:
        temporary.write_text(table + "\n")
    print(f"\n{table}\n\nHear the clips and see the whole comparison: {evaluation / 'index.html'}")
    return out


def _collect(job: AlignJob, model: str, name: str, out: Path, prompts: Path, number: int = 1) -> None:
    """Pairs of one generator, and the listeners' choices, in round `number`."""
    from .preferences.listeners import simulated_listeners
    from .preferences.pairs import sample_pairs
    from .training.ppo import read_prompts

    sample_pairs(
        load_generator(model, device=find_device()),
        read_prompts(prompts),
        out,
        listeners=simulated_listeners(job.listeners, seed=job.seed),
        name=name,
        duration_s=job.duration_s,
        pairs_per_prompt=job.pairs_per_prompt,
        votes_per_pair=job.votes_per_pair,
        batch_size=64,
        seed=job.seed + 1_000_000 * (number - 1),  # each batch takes the next two: no clip of a round is in another
    )


def _together(out: Path, *names: str) -> Path:
    """All rounds' votes as one set of preferences, votes_all/."""
    from .preferences.schema import load_preferences, save_preferences

    folder = out / "votes_all"
    if not folder.exists():
        save_preferences(concatenate_datasets([load_preferences(out / name) for name in names]), folder)
    return folder


def _learn(job: AlignJob, votes: Path, out: Path) -> None:
    """A preference reward from votes."""
    from .training.reward import RewardJob, run_reward

    on_clap = {"model": job.preference_clap, "head_dropout": 0.5, "weight_decay": 1.0, "learning_rate": 3e-4}
    on_generator = {"model": job.model, "weight_decay": 0.1, "learning_rate": 2e-4, "warmup_steps": 20}
    settings = on_clap if job.reward_backbone == "clap" else on_generator
    with going_on_in(out) as last:
        run_reward(
            RewardJob(
                preferences=str(votes),
                output_dir=str(out),
                resume_from_checkpoint=last,
                backbone=job.reward_backbone,
                max_steps=job.reward_steps,
                test_share=0.15,
                baselines=[job.adherence, job.quality],
                bf16=job.bf16,
                seed=job.seed,
                **settings,
            )
        )


def _tune(job: AlignJob, name: str, start: str, prompts: Path, preference: str | None = None) -> None:
    """PPO from a generator and anchored to it: on adherence and quality, or on a preference reward, as `name` has it."""
    from .training.ppo import PPOJob, run_ppo

    is_after_r = name not in ("r", "u")
    rewards = [f"0.5*{job.adherence}", f"0.5*{job.quality}"]
    if preference:
        shares = {job.adherence: job.ru_adherence if is_after_r else 0.0, "variety": job.variety}
        beside = [f"{share:g}*{spec}" for spec, share in shares.items() if share]
        rewards = [f"{1 - sum(shares.values()):g}*{preference}", *beside] if beside else [preference]
    alone = len(rewards) == 1
    out = Path(job.output_dir) / name
    with going_on_in(out) as last:
        run_ppo(
            PPOJob(
                model=start,
                ref_model=start,
                reward=rewards,
                normalise="none" if alone else job.normalise,
                output_dir=str(out),
                resume_from_checkpoint=last,
                prompts=str(prompts),
                duration_s=job.duration_s,
                max_steps=(job.ru_steps if is_after_r else None) or job.ppo_steps,
                per_device_train_batch_size=job.ppo_batch_size,
                local_rollout_forward_batch_size=max(64 // job.clips_per_prompt, 1) * job.clips_per_prompt,
                num_generations=job.clips_per_prompt,
                learning_rate=job.learning_rate,
                lora_r=job.lora_r,
                lora_alpha=2 * job.lora_r,
                kl_coef=job.preference_kl_coef if alone else job.kl_coef,
                max_kl=job.max_kl,
                bf16=job.bf16,
                seed=job.seed,
                logging_steps=4,
            )
        )


def _compare(job: AlignJob, systems: list[str], heldout: Path, preferences: list[str], evaluation: Path) -> None:
    """The blind comparison of the base and the tuned systems, and every reward's opinion."""
    from .evaluation.report import EvaluateJob, run_evaluate

    out = Path(job.output_dir)
    run_evaluate(
        EvaluateJob(
            models=[f"base={job.model}", *(f"{name}={out / name}" for name in systems)],
            prompts=str(heldout),
            out=str(evaluation),
            listeners=job.panel,
            rewards=[job.adherence, job.quality, *preferences],
            duration_s=job.duration_s,
            batch_size=32,
            seed=job.seed + 1,
        )
    )


def summary_table(result: dict[str, Any], job: AlignJob) -> str:
    """The loop's outcome as text: one line a system, then the pairs of tuned ones, and how much it was made with.

    Args:
        result: what `evaluate_models` gives and `evaluation/results.json` holds; the first model is the base.
        job: by which it was made.
    """
    base, *tuned = result["models"]
    rates = {row["model"]: row for row in result["win_rates"] if row["against"] == base}
    pairs = {(row["model"], row["against"]): row for row in result["win_rates"]}
    scores = {row["model"]: row["mean"] for row in result["mos"]}
    rewards = {name: {row["model"]: row["mean"] for row in table["means"]} for name, table in result["rewards"].items()}
    kinds = [name.partition(":")[0] for name in rewards]
    labels = {name: kind if kinds.count(kind) == 1 else name.partition(":")[2] for name, kind in zip(rewards, kinds)}
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
    later = [(a, b) for i, b in enumerate(tuned) for a in tuned[i + 1 :] if (a, b) in pairs]
    lines += ["", *(f"{a} against {b}: {_percentages(pairs[a, b])}" for a, b in later)]
    note = (
        f"{result['prompts']} held-out prompts, {raters['clips_per_prompt']} clips each; {raters['per_clip']} of "
        f"{raters['listeners']} {kind} rate each clip from 1 to 5. Nobody listened.\n"
        f"Tuned for {job.ppo_steps} steps of {job.ppo_batch_size} clips"
        + (f" (ru {job.ru_steps})." if job.ru_steps else ".")
        + " This is the short version." * (job.ppo_steps * job.ppo_batch_size < PAPER_CLIPS)
    )
    return "\n".join([*lines, "", note])


def _percentages(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return ""
    if rate["win_rate"] is None:
        return "only ties"
    return f"{rate['win_rate']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]"


def _keep_settings(job: AlignJob, out: Path) -> None:
    """Note how a folder is being made; a run that goes on there has to say the same, or its table would be of another."""
    given = {name: value for name, value in asdict(job).items() if name not in ("output_dir", "rounds")}
    path = out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else given
    if name := next((name for name in given if before.get(name, given[name]) != given[name]), None):
        raise ValueError(
            f"`{name}` is {given[name]!r}, and {out} was begun with {before[name]!r}: give that, or another `output_dir`."
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(given, indent=1) + "\n")


def _write_prompts(job: AlignJob, out: Path) -> tuple[Path, Path]:
    """The prompts of this run, as files that its jobs read, and its settings; held-out ones must not be among the others."""
    from .preferences.schema import normalise_prompt
    from .training.ppo import read_prompts

    prompts = read_prompts(job.prompts or PROMPTS / "train.txt")
    heldout = read_prompts(job.eval_prompts or PROMPTS / "heldout.txt", "eval_prompts")[: job.heldout_prompts]
    known = {normalise_prompt(prompt) for prompt in prompts}
    if shared := [prompt for prompt in heldout if normalise_prompt(prompt) in known]:
        raise ValueError(f"`eval_prompts` holds {shared[0]!r}, which `prompts` holds too; keep them apart.")
    _keep_settings(job, out)
    for name, lines in (("prompts.txt", prompts), ("heldout_prompts.txt", heldout)):
        with atomic_path(out / name) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    return out / "prompts.txt", out / "heldout_prompts.txt"
