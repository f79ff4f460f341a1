"""The larger budget: RU and U on sixteen times the prompts, with four times the clips in a step, and a second round of RU.

28,160 clips are sampled and heard for each tuned generator: an hour of a CPU core, or three minutes of a large GPU.
"""

from pathlib import Path

from plan import OTHER, PANEL, Run, Sizes


def larger(work: Path, sizes: Sizes) -> list[Run]:
    """Votes on many prompts, a reward, U and RU on it; RU's own votes, a reward from all of them, RU once more; a comparison."""
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

    def reward(name: str, voted: list[Path]) -> str:
        """A head on the bundled CLAP's vectors, from all these votes."""
        joined = out / f"votes_{name}"
        words = (*map(str, voted), "--out", str(joined))
        command = (
            *("reward", "--preferences", str(joined), "--test_share", "0.15", "--seed", "0", "--backbone", "clap"),
            *("--model", "musicrl-tiny-adherence", "--head_dropout", "0.3", "--weight_decay", "0.3"),
            *("--learning_rate", "1e-3", "--max_steps", str(sizes.larger_reward_steps)),
            *("--per_device_train_batch_size", "64", "--cache_dir", str(out / "clips"), "--baselines", PANEL),
            *("--output_dir", str(out / name)),
        )
        runs.append(Run(f"larger_votes_{name}", words, joined, "join_votes"))
        runs.append(Run(f"larger_{name}", command, out / name / "result.json"))
        return f"preference:{out / name}"

    def tuned(name: str, model: str, *rewards: str, few: bool = False, number: int = 0) -> str:
        """PPO from a generator, anchored to it; `few` with the other runs' steps, clips and price of a nat."""
        steps, batch, clips, kl_coef = (
            (sizes.ru_steps, sizes.batch, sizes.clips_per_prompt, 0.01)
            if few
            else (sizes.larger_steps, sizes.larger_batch, 2 * sizes.clips_per_prompt, 0.02)
        )
        command = (
            *("ppo", "--model", model, "--ref_model", model, "--prompts", str(prompts)),
            *("--duration_s", f"{sizes.duration_s:g}", "--max_steps", str(steps)),
            *("--per_device_train_batch_size", str(batch), "--local_rollout_forward_batch_size", str(batch)),
            *("--num_generations", str(clips), "--learning_rate", "5e-4", "--lora_r", "16", "--lora_alpha", "32"),
            *("--kl_coef", f"{kl_coef:g}", "--seed", str(number), "--logging_steps", "5"),
            *("--normalise", "normalise_then_sum", "--reward", *rewards, "--output_dir", str(out / name)),
        )
        runs.append(Run(f"larger_{name}", command, out / name / "result.json"))
        return str(out / name)

    on_base = votes("base", "musicrl-tiny", 4, 3, 100_000)
    first = reward("reward", on_base)
    r, both = str(seed / "r"), (f"0.65*{first}", "0.35*adherence")
    systems = {"base": "musicrl-tiny", "r": r, "small_u": str(seed / "u"), "small_ru": str(seed / "ru")}
    systems["ru_few"] = tuned("ru_few", r, *both, few=True)
    systems["u"] = tuned("u", "musicrl-tiny", first)
    systems["ru"] = tuned("ru", r, *both)
    systems["ru_seed1"] = tuned("ru_seed1", r, *both, number=1)
    second = reward("reward_2", [*on_base, *votes("ru_votes", systems["ru"], 2, 2, 400_000)])
    systems["ru2"] = tuned("ru2", systems["ru"], f"0.65*{second}", "0.35*adherence")
    compare = (
        *("evaluate", "--models", *(f"{name}={model}" for name, model in systems.items())),
        *("--rewards", "adherence", "quality", first, PANEL, OTHER),
        *("--prompts", str(seed / "heldout_prompts.txt"), "--duration_s", f"{sizes.duration_s:g}"),
        *("--batch_size", "32", "--seed", "1", "--out", str(out / "evaluation")),
    )
    return [*runs, Run("larger_evaluation", compare, out / "evaluation")]
