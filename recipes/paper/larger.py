"""The larger budget: R, U and RU on sixteen times the prompts, with four times the clips in a step, and two rounds of votes.

A tuned generator is heard 38,400 times in 150 steps: an hour and a half of a CPU core, or 200 s of a large GPU that three of them share.
Beside the learned reward stands `variety`, for without it a prompt's clips become one clip.
"""

from pathlib import Path

from plan import OTHER, PANEL, Run, Sizes


def larger(work: Path, sizes: Sizes) -> list[Run]:
    """R, votes on many prompts, a reward and RU on it; RU's own votes, rewards from all of them, U and RU on these; a comparison."""
    seed, out = work / "seed_0", work / "larger"
    prompts, halves = out / "prompts.txt", {name: out / f"prompts_{name}.txt" for name in "ab"}
    words = (str(prompts), "--count", str(sizes.many_prompts), "--halves", *map(str, halves.values()))
    runs = [Run("larger_prompts", words, prompts, "many_prompts")]

    def votes(name: str, model: str, pairs: int, votes_per_pair: int, first_seed: int) -> list[Path]:
        """Two halves, which two processes can sample beside each other."""
        folders = [out / f"{name}_{half}" for half in halves]
        for number, (folder, half) in enumerate(zip(folders, halves.values(), strict=True)):
            command = (
                *("pairs", "--model", model, "--prompts", str(half), "--pairs_per_prompt", str(pairs)),
                *("--votes_per_pair", str(votes_per_pair), "--duration_s", f"{sizes.duration_s:g}"),
                *("--batch_size", "64", "--seed", str(first_seed + 100_000 * number), "--out", str(folder)),
            )
            runs.append(Run(f"larger_{folder.name}", command, folder))
        return folders

    def reward(name: str, voted: list[Path], steps: int, pooling: str = "rhythm", number: int = 0) -> str:
        """A head on the bundled CLAP's vectors, from all these votes."""
        joined = out / f"votes_{len(voted)}"
        head = ("--pooling", pooling, "--head_dropout", "0.3", "--weight_decay", "0.3", "--learning_rate", "1e-3")
        command = (
            *("reward", "--preferences", str(joined), "--test_share", "0.15", "--seed", str(number)),
            *("--backbone", "clap", "--model", "musicrl-tiny-adherence", *head, "--max_steps", str(steps)),
            *("--per_device_train_batch_size", "64", "--cache_dir", str(out / "clips"), "--baselines", PANEL),
            *("--output_dir", str(out / name)),
        )
        if all(run.folder != joined for run in runs):
            words = (*map(str, voted), "--out", str(joined))
            runs.append(Run(f"larger_{joined.name}", words, joined, "join_votes"))
        runs.append(Run(f"larger_{name}", command, out / name / "result.json"))
        return f"preference:{out / name}"

    def tuned(
        name: str,
        model: str,
        steps: int,
        kl_coef: float,
        rewards: dict[str, float],
        entropy_coef: float = 0,
        on_cpu: bool = False,
    ) -> str:
        """PPO from a generator, anchored to it."""
        batch = sizes.larger_batch
        command = (
            *("ppo", "--model", model, "--ref_model", model, "--prompts", str(prompts)),
            *("--duration_s", f"{sizes.duration_s:g}", "--max_steps", str(steps)),
            *("--per_device_train_batch_size", str(batch), "--local_rollout_forward_batch_size", str(batch)),
            *("--num_generations", str(2 * sizes.clips_per_prompt), "--learning_rate", "5e-4"),
            *("--lora_r", "16", "--lora_alpha", "32", "--kl_coef", f"{kl_coef:g}", "--seed", str(int(on_cpu))),
            *("--bf16", "true" if on_cpu else "false", "--entropy_coef", f"{entropy_coef:g}"),
            *("--logging_steps", "5", "--normalise", "normalise_then_sum"),
            *("--reward", *(f"{weight:g}*{spec}" for spec, weight in rewards.items()), "--output_dir", str(out / name)),
        )
        runs.append(Run(f"larger_{name}", command, out / name / "result.json"))
        return str(out / name)

    first_steps, steps, more_steps, last_steps = sizes.larger_steps
    few, many = sizes.larger_reward_steps
    base, r = "musicrl-tiny", str(seed / "r")
    on_base = votes("base", base, 4, 3, 100_000)
    first = reward("reward", on_base, few, "statistics")
    reward("reward_rhythm", on_base, few)
    systems = {"base": base, "r": r, "small_u": str(seed / "u"), "small_ru": str(seed / "ru")}
    systems["r_larger"] = tuned("r_larger", base, first_steps, 0.02, {"adherence": 0.5, "quality": 0.5})
    systems["ru_first"] = tuned(
        "ru_first", r, first_steps * 3 // 4, 0.01, {first: 0.5, "adherence": 0.3, "variety": 0.2}
    )
    on_both = [*on_base, *votes("ru_votes", systems["ru_first"], 2, 2, 400_000)]
    both = [reward(f"reward_2{'_seed1' * number}", on_both, many, number=number) for number in (0, 1)]

    def weights(learned: float, adherence: float, variety: float) -> dict[str, float]:
        beside = {"adherence": adherence} if adherence else {}
        return {**dict.fromkeys(both, learned / 2), **beside, "variety": variety}

    systems["u"] = tuned("u", base, steps, 0.015, weights(0.65, 0, 0.35))
    systems["ru_anew"] = tuned("ru_anew", r, steps, 0.01, weights(0.45, 0.25, 0.3))
    systems["ru2"] = tuned("ru2", systems["ru_first"], steps, 0.015, weights(0.45, 0.25, 0.3))
    systems["ru3"] = tuned("ru3", systems["ru2"], more_steps, 0.015, weights(0.55, 0.15, 0.3), on_cpu=True)
    last = tuned("ru_last", systems["ru2"], last_steps, 0.015, weights(0.55, 0.15, 0.3), 0.002, on_cpu=True)
    systems["ru"] = str(out / "ru")  # its three adapters on each other as one: guided.py goes on from it
    runs.append(Run("larger_ru", (last, "--base", r, "--out", systems["ru"]), out / "ru", "one_adapter"))
    compare = (
        *("evaluate", "--models", *(f"{name}={model}" for name, model in systems.items())),
        *("--rewards", "adherence", "quality", both[0], PANEL, OTHER),
        *("--prompts", str(seed / "heldout_prompts.txt"), "--duration_s", f"{sizes.duration_s:g}"),
        *("--batch_size", "32", "--seed", "1", "--out", str(out / "evaluation")),
    )
    return [*runs, Run("larger_evaluation", compare, out / "evaluation")]
