"""What the paper's tables are made of here: one command a run, as anybody would type it, and the folder it leaves.

A setting that is the same for several runs stands in musicrl_hf/align_recipes/paper.yaml or in `Sizes`.
"""

from dataclasses import dataclass
from pathlib import Path

PANEL = "musicrl_hf.preferences.listeners:panel_taste"  # held-out simulated listeners, of the same mix of tastes
OTHER = "musicrl_hf.preferences.listeners:other_taste"  # of another mix
ENSEMBLE = 3  # rewards from other seeds
BEST_OF, DPO_ROUNDS = 4, 2
BEST_OF_BY_PANEL = 16  # as the panel itself would choose, on which nobody trains
VOTERS = "voters:taste"  # of this folder: the taste itself that a preference reward is learned from


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `TINY` only shows that it runs."""

    align: tuple[str, ...] = ()  # what is said to `musicrl align` beside its recipe
    ppo_steps: int = 40  # of each method, and so its budget of clips
    ru_steps: int = 64
    batch: int = 64  # clips a step
    duration_s: float = 3.0
    pairs_labelled: int = 5  # a prompt and round, of the iterated DPO: 128 prompts x 5 pairs x 2 clips x 2 rounds
    dpo_steps: int = 150
    reward_steps: int = 200  # as many as of the loop's own reward
    clips_per_prompt: int = 4  # of a step, compared with each other
    ru_clips_per_prompt: int = 8
    long_steps: int = 96  # of the runs that are to go too far
    eval_every: int = 8  # steps
    heldout_clips: int = 2  # a prompt
    many_prompts: int = 2048  # of the larger budget, in two halves
    larger_batch: int = 256  # clips a step there
    larger_steps: tuple[int, ...] = (
        80,
        150,
        20,
        10,
    )  # R and, three quarters, the first RU; U and RU; RU's last without and with
    larger_reward_steps: tuple[int, int] = (800, 1000)  # on the first votes, on all
    guided_steps: int = 60  # of guidance distillation
    guided_ru_steps: tuple[int, ...] = (40, 75, 50)  # of RU from there
    guided_reward_steps: tuple[int, int] = (800, 1200)  # on the first votes, on all
    guided_seed_steps: tuple[int, int] = (50, 30)  # of each seed on what all votes teach
    guided_final_steps: int = 40  # of their sum
    fresh_prompts: int = 208  # on which nothing was tuned or chosen


TINY = Sizes(
    align=(
        *("--pairs_per_prompt", "2", "--heldout_prompts", "4", "--reward_steps", "4"),
        *("--ppo_steps", "2", "--ru_steps", "2"),
        *("--ppo_batch_size", "4", "--clips_per_prompt", "2", "--duration_s", "1"),
    ),
    ppo_steps=2,
    ru_steps=2,
    batch=4,
    clips_per_prompt=2,
    ru_clips_per_prompt=2,
    duration_s=1.0,
    pairs_labelled=1,
    dpo_steps=2,
    reward_steps=4,
    long_steps=4,
    eval_every=2,
    many_prompts=8,
    larger_batch=4,
    larger_steps=(4, 2, 2, 2),
    larger_reward_steps=(4, 4),
    guided_steps=2,
    guided_ru_steps=(2, 2, 2),
    guided_reward_steps=(4, 4),
    guided_seed_steps=(2, 2),
    guided_final_steps=2,
    fresh_prompts=4,
)


@dataclass(frozen=True)
class Run:
    """One command of `musicrl`, or of a script of this folder.

    Attributes:
        name: of the run, by which its time and memory are recorded.
        command: words behind `musicrl`, or behind the script's name.
        folder: what it leaves; it is skipped where that was left before.
        script: of this folder, without ".py".
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    script: str | None = None


def aligned(work: Path, seed: int, sizes: Sizes, recipe: str = "paper") -> Run:
    """The whole loop: base, R, U, RU."""
    folder = work / f"seed_{seed}"
    words = ("align", "--recipe", recipe, "--output_dir", str(folder), "--seed", str(seed), *sizes.align)
    return Run(f"align_{seed}", words, folder / "evaluation")


def second_round(work: Path, seed: int, sizes: Sizes, recipe: str = "paper") -> Run:
    """From there once more: pairs of RU, a reward from both rounds' votes, RU tuned on it, and all five compared."""
    first = aligned(work, seed, sizes, recipe)
    return Run(f"second_{seed}", (*first.command, "--rounds", "2"), work / f"seed_{seed}" / "evaluation2")


def methods(work: Path, sizes: Sizes) -> list[Run]:
    """The same reward and the same number of sampled clips for every way to tune on it, then one comparison."""
    seed, out = work / "seed_0", work / "methods"
    reward = f"preference:{seed / 'preference'}"
    shared = ("--model", "musicrl-tiny", "--lora_r", "16", "--lora_alpha", "32", "--logging_steps", "4", "--seed", "0")
    online = (
        *("--prompts", str(seed / "prompts.txt"), "--reward", reward, "--duration_s", f"{sizes.duration_s:g}"),
        *("--max_steps", str(sizes.ppo_steps), "--per_device_train_batch_size", str(sizes.batch)),
        *("--num_generations", str(sizes.clips_per_prompt), "--learning_rate", "5e-4"),
    )

    def run(name: str, command: str, *words: str) -> Run:
        return Run(name, (command, *shared, *words, "--output_dir", str(out / name)), out / name / "result.json")

    dpo = (
        *("--max_steps", str(sizes.dpo_steps), "--beta", "0.1", "--learning_rate", "2e-4"),
        *("--per_device_train_batch_size", "16", "--test_share", "0"),
    )
    runs = [
        run("ppo", "ppo", *online, "--kl_coef", "0.01"),
        run("reinforce", "ppo", *online, "--objective", "paper", "--kl_mix", "0.01"),
        run("rloo", "rloo", *online, "--beta", "0.01"),
        run("grpo", "grpo", *online, "--beta", "0.001"),
        run("dpo", "dpo", "--preferences", str(seed / "votes"), *dpo),
    ]
    # Sample, label by the reward, tune, and again from there: as many clips in all as the others sample.
    newest = "musicrl-tiny"
    for number in range(1, DPO_ROUNDS + 1):
        pairs, name = out / f"pairs_{number}", f"dpo_iterated_{number}"
        words = (
            *("pairs", "--model", newest, "--prompts", str(seed / "prompts.txt"), "--label_with", reward),
            *("--pairs_per_prompt", str(sizes.pairs_labelled), "--duration_s", f"{sizes.duration_s:g}"),
            *("--batch_size", "64", "--seed", str(1000 * number), "--out", str(pairs)),
        )
        runs.append(Run(f"pairs_{number}", words, pairs))
        started = ("dpo", "--model", newest, *shared[2:], "--preferences", str(pairs), *dpo)
        runs.append(Run(name, (*started, "--output_dir", str(out / name)), out / name / "result.json"))
        newest = str(out / name)
    tuned = ("ppo", "reinforce", "rloo", "grpo", "dpo", f"dpo_iterated_{DPO_ROUNDS}")
    systems = [f"{name}={out / name}" for name in tuned]
    compare = (
        *("evaluate", "--models", "base=musicrl-tiny", *systems, "--prompts", str(seed / "heldout_prompts.txt")),
        *("--rewards", "adherence", "quality", reward, PANEL, OTHER, "--duration_s", f"{sizes.duration_s:g}"),
        *("--best_of", str(BEST_OF), "--best_of_reward", reward),
        *("--batch_size", "32", "--seed", "1", "--out", str(out / "evaluation")),
    )
    return [*runs, Run("methods_evaluation", compare, out / "evaluation")]


def ablations(work: Path, sizes: Sizes) -> list[Run]:
    """The reward's own questions: where it starts, what it reads, how much of a clip it hears."""
    seed, out = work / "seed_0", work / "rewards"
    variants: dict[str, tuple[str, ...]] = {
        "from_generator": (),
        "from_scratch": ("--from_scratch", "true"),
        "no_text": ("--use_text", "false"),
        "first_half_of_the_clip": ("--crop_s", f"{sizes.duration_s / 2:g}"),
        "clap": (
            *("--backbone", "clap", "--model", "musicrl-tiny-adherence", "--head_dropout", "0.5"),
            *("--weight_decay", "1.0", "--learning_rate", "3e-4"),
        ),
    }
    shared = (
        "--preferences",
        str(seed / "votes"),
        "--test_share",
        "0.15",
        "--seed",
        "0",
        "--cache_dir",
        str(out / "clips"),
    )
    steps = ("--max_steps", str(sizes.reward_steps))
    on_generator = ("--weight_decay", "0.1", "--learning_rate", "2e-4", "--warmup_steps", "20")
    runs = []
    for name, words in variants.items():
        settings = words if "clap" in words else (*on_generator, *words)
        if name == "from_generator":
            settings = (*settings, "--baselines", "adherence", "quality", PANEL, OTHER)
        command = ("reward", *shared, *steps, *settings, "--output_dir", str(out / name))
        runs.append(Run(f"reward_{name}", command, out / name / "result.json"))
    held_out = (
        "--preferences",
        str(seed / "votes_all"),
        "--held_out_models",
        "ru",
        "--test_share",
        "0.15",
        "--seed",
        "0",
    )
    command = ("reward", *held_out, *steps, *on_generator, "--output_dir", str(out / "held_out_generator"))
    return [*runs, Run("reward_held_out_generator", command, out / "held_out_generator" / "result.json")]


def curves(work: Path, sizes: Sizes) -> list[Run]:
    """Runs that go on until the reward that is trained and the held-out panels part: one reward, and an ensemble's worst.

    The first is compared with the base at its end, and with what the panel itself chooses of the base's clips: how far these
    listeners can be moved. And what R's rewards choose of them: how far R can move them.
    """
    seed, out = work / "seed_0", work / "curves"
    single = f"preference:{seed / 'preference'}"
    members, ensemble = [], []
    for number in range(1, ENSEMBLE):
        folder = out / f"reward_{number}"
        words = (
            *("reward", "--preferences", str(seed / "votes"), "--test_share", "0.15", "--seed", str(number)),
            *("--max_steps", str(sizes.reward_steps), "--weight_decay", "0.1", "--learning_rate", "2e-4"),
            *("--warmup_steps", "20", "--cache_dir", str(out / "clips"), "--output_dir", str(folder)),
        )
        ensemble.append(Run(f"reward_of_ensemble_{number}", words, folder / "result.json"))
        members.append(f"preference:{folder}")
    watched = ("--watch", "adherence", "quality", PANEL, OTHER, "--eval_prompts", str(seed / "heldout_prompts.txt"))
    shared = (
        *(
            "ppo",
            "--model",
            "musicrl-tiny",
            "--prompts",
            str(seed / "prompts.txt"),
            "--lora_r",
            "16",
            "--lora_alpha",
            "32",
        ),
        *("--duration_s", f"{sizes.duration_s:g}", "--max_steps", str(sizes.long_steps), "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", str(sizes.batch), "--num_generations", str(sizes.clips_per_prompt)),
        *("--kl_coef", "0", "--eval_steps", str(sizes.eval_every)),
        *("--per_device_eval_batch_size", "32", "--logging_steps", "4", "--seed", "0", *watched),
    )
    one = Run(
        "long_one_reward", (*shared, "--reward", single, "--output_dir", str(out / "one")), out / "one" / "result.json"
    )
    worst = Run(
        "long_ensemble",
        (
            *shared,
            "--reward",
            single,
            *members,
            "--normalise",
            "centre_then_min",
            "--output_dir",
            str(out / "ensemble"),
        ),
        out / "ensemble" / "result.json",
    )
    compare = (
        *("evaluate", "--models", "base=musicrl-tiny", f"one={out / 'one'}"),
        *("--rewards", "adherence", "quality", single, PANEL, OTHER),
        *("--prompts", str(seed / "heldout_prompts.txt"), "--duration_s", f"{sizes.duration_s:g}"),
        *("--best_of", str(BEST_OF_BY_PANEL), "--best_of_reward", PANEL),
        *("--batch_size", "32", "--seed", "1", "--out", str(out / "evaluation")),
    )
    by_r = (
        *("evaluate", "--models", "base=musicrl-tiny", "--rewards", "adherence", "quality", PANEL, OTHER),
        *("--prompts", str(seed / "heldout_prompts.txt"), "--duration_s", f"{sizes.duration_s:g}"),
        *("--best_of", str(BEST_OF_BY_PANEL), "--best_of_reward", "0.5*adherence", "0.5*quality"),
        *("--batch_size", "32", "--seed", "1", "--out", str(out / "evaluation_by_r")),
    )
    compared = Run("curves_evaluation", compare, out / "evaluation")
    return [one, *ensemble, worst, compared, Run("curves_evaluation_by_r", by_r, out / "evaluation_by_r")]


def limits(work: Path, sizes: Sizes) -> list[Run]:
    """What holds RU back, its reward or its tuning: the voters' own taste in place of what was learned from their votes, and
    either of them for twice the steps, with a nat of KL at half the price."""
    seed, out = work / "seed_0", work / "limits"
    rewards = {"learned": f"preference:{seed / 'preference'}", "voters": VOTERS}
    usual = ("--max_steps", str(sizes.ru_steps), "--kl_coef", "0.01")
    longer = ("--max_steps", str(2 * sizes.ru_steps), "--kl_coef", "0.005")
    planned = {
        "ru_voters": (rewards["voters"], usual),
        "ru_longer": (rewards["learned"], longer),
        "ru_voters_longer": (rewards["voters"], longer),
    }
    runs = []
    for name, (reward, words) in planned.items():
        command = (
            *(
                "ppo",
                "--model",
                str(seed / "r"),
                "--ref_model",
                str(seed / "r"),
                "--prompts",
                str(seed / "prompts.txt"),
            ),
            *("--duration_s", f"{sizes.duration_s:g}", "--per_device_train_batch_size", str(sizes.batch)),
            *("--learning_rate", "5e-4", "--lora_r", "16", "--lora_alpha", "32", "--seed", "0", "--logging_steps", "8"),
            *("--num_generations", str(sizes.ru_clips_per_prompt), "--normalise", "normalise_then_sum"),
            *("--reward", f"0.5*{reward}", "0.3*adherence", "0.2*variety", *words),
            *("--output_dir", str(out / name)),
        )
        runs.append(Run(name, command, out / name / "result.json"))
    compare = (
        *(
            "evaluate",
            "--models",
            "base=musicrl-tiny",
            f"ru={seed / 'ru'}",
            *(f"{name}={out / name}" for name in planned),
        ),
        *("--rewards", "adherence", "quality", rewards["learned"], PANEL, OTHER),
        *("--prompts", str(seed / "heldout_prompts.txt"), "--duration_s", f"{sizes.duration_s:g}"),
        *("--batch_size", "32", "--seed", "1", "--out", str(out / "evaluation")),
    )
    return [*runs, Run("limits_evaluation", compare, out / "evaluation")]
