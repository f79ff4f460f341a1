"""Guidance in the weights: what the base plays with guidance is taught to it without, and added to RU, which asks less of the prompt.

The policy learns from the KL to the guided base alone (Cideron et al. 2024, arXiv:2410.06084), and its value head, at a tenth of the
weight, from adherence; what that changes is added to what the larger budget's RU changes. From there RU is tuned
on, on rewards that were learned from votes on its own clips too, with more of adherence than before, and with a variety for which
another key is no news until the last steps. That one's clips are voted on, and more of those that it began with; on what all these
votes teach two seeds are tuned from the same start. Half of what each of the three learned is added up (weights of policies averaged,
Rame et al. 2024, arXiv:2406.16768, and a little beyond the mean, Zheng et al. 2024, arXiv:2404.16792), and tuned on with an entropy
bonus; three quarters of that ships. All are compared at guidance 1 on the held-out prompts; what ships at guidance 3 and each at its own
there, and on prompts of which nothing before knows. Its tables and the adapter are made by

    python recipes/paper/run.py --work build/paper --seeds 0 --parts align larger guided
    python recipes/paper/judged.py --work build/paper --part guided --draws 4
    python recipes/paper/judged.py --work build/paper --part guided --draws 4 --guidance 3 --systems base r u ru
    python recipes/paper/gather.py --work build/paper --part guided
    python recipes/paper/publish.py --work build/paper --names ru
"""

from pathlib import Path

from plan import OTHER, PANEL, Run, Sizes

ROUNDS = {  # of RU from there: what stands beside the preference rewards, and the entropy bonus a nat
    "ru_first": ({"adherence": 0.35, "any_key:variety": 0.15}, 0.0),
    "ru_second": ({"adherence": 0.25, "any_key:variety": 0.15}, 0.0),
    "ru_last": ({"adherence": 0.22, "variety": 0.24}, 0.001),
}
SEEDS = {"ru_one": 7, "ru_two": 8}  # from the same start once more, on more votes
AGAIN = {  # their rounds
    "first": ({"adherence": 0.3, "variety": 0.2}, 0.001),
    "last": ({"adherence": 0.25, "variety": 0.15}, 0.0),
}
# Of what each of the three learned, the two seeds and the one before: together one and a half times their mean.
SHARE = 0.5
# Of what the last steps changed: with all of it a prompt's clips keep 79 % of the base's distance in timbre.
FINAL_SHARE = 0.75
FINAL = ({"adherence": 0.26, "variety": 0.24}, 0.002)
RANK = 96  # of the adapter that ships, in place of the sum of the ranks


def guided(work: Path, sizes: Sizes) -> list[Run]:
    """Guidance distilled from the base, added to RU of the larger budget, votes on that, rewards, RU tuned on, a comparison."""
    out, larger = work / "guided", work / "larger"
    prompts, voted_on, distilled, before = (
        out / "prompts.txt",
        out / "prompts_votes.txt",
        out / "distilled",
        larger / "ru",
    )
    count, lora = sizes.many_prompts, ("--lora_r", "16", "--lora_alpha", "32", "--logging_steps", "5")
    duration = ("--duration_s", f"{sizes.duration_s:g}")
    part = ("--part", str(count // 2), str(count * 3 // 4), str(voted_on))
    command = (
        *("ppo", "--model", "musicrl-tiny", "--prompts", str(prompts), *duration),
        *("--objective", "paper", "--kl_mix", "1", "--ref_guidance_scale", "3", "--max_steps", str(sizes.guided_steps)),
        *("--per_device_train_batch_size", str(sizes.batch), "--learning_rate", "2e-3", *lora),
        *("--seed", "2", "--reward", "adherence", "--output_dir", str(distilled)),
    )
    runs = [
        Run("guided_prompts", (str(prompts), "--count", str(count), *part), voted_on, "many_prompts"),
        Run("guided_distilled", command, distilled / "result.json"),
    ]
    systems = {
        "base": "musicrl-tiny",
        "distilled": str(distilled),
        "r": str(work / "seed_0" / "r"),
        "u": str(work / "seed_0" / "u"),
    }
    systems["ru_before"] = str(before)
    systems["ru_whole"] = str(out / "ru_whole")
    words = (str(distilled), "--on", str(before), "--out", systems["ru_whole"])
    runs.append(Run("guided_ru_whole", words, out / "ru_whole", "add_adapter"))

    votes = (
        *("pairs", "--model", systems["ru_whole"], "--prompts", str(voted_on), "--pairs_per_prompt", "2"),
        *("--votes_per_pair", "2", *duration, "--batch_size", "64", "--seed", "400000", "--out", str(out / "ru_votes")),
    )
    joined = out / "votes"
    words = (str(larger / "base_a"), str(out / "ru_votes"), "--out", str(joined))
    runs += [Run("guided_ru_votes", votes, out / "ru_votes"), Run("guided_votes", words, joined, "join_votes")]

    def learn(votes: Path, clips: Path, numbers: tuple[int, ...], steps: int) -> list[Path]:
        """Heads on the bundled CLAP's vectors, of several seeds, each with its own held-out prompts."""
        folders = [out / f"reward_{number}" for number in numbers]
        for number, folder in zip(numbers, folders, strict=True):
            command = (
                *("reward", "--preferences", str(votes), "--test_share", "0.15", "--seed", str(number)),
                *("--backbone", "clap", "--model", "musicrl-tiny-adherence", "--pooling", "rhythm"),
                *("--head_dropout", "0.3", "--weight_decay", "0.3", "--learning_rate", "1e-3"),
                *("--max_steps", str(steps)),
                *("--per_device_train_batch_size", "64", "--cache_dir", str(clips), "--baselines", PANEL),
                *("--output_dir", str(folder)),
            )
            runs.append(Run(f"guided_{folder.name}", command, folder / "result.json"))
        return folders

    def as_one(last: str, base: str, name: str, *how: str) -> str:
        """The adapters from `base` on as one."""
        runs.append(
            Run(f"guided_{name}", (last, "--base", base, "--out", str(out / name), *how), out / name, "one_adapter")
        )
        return str(out / name)

    def tuned(
        name: str, model: str, steps: int, learned: list[Path], beside: dict[str, float], entropy_coef: float, seed: int
    ) -> str:
        """PPO on both learned rewards and what stands beside them, anchored to RU with guidance in its weights."""
        clips, preference = str(2 * sizes.batch), (1 - sum(beside.values())) / 2
        rewards = {f"preference:{folder}": preference for folder in learned} | beside
        command = (
            *("ppo", "--model", model, "--ref_model", systems["ru_whole"], "--prompts", str(prompts), *duration),
            *("--max_steps", str(steps), "--per_device_train_batch_size", clips),
            *("--local_rollout_forward_batch_size", clips, "--num_generations", str(2 * sizes.clips_per_prompt)),
            *("--learning_rate", "7e-4", *lora, "--kl_coef", "0.01", "--seed", str(seed), "--save_steps", "10"),
            *("--entropy_coef", f"{entropy_coef:g}", "--normalise", "normalise_then_sum"),
            *("--reward", *(f"{weight:.2g}*{spec}" for spec, weight in rewards.items())),
            *("--output_dir", str(out / name)),
        )
        runs.append(Run(f"guided_{name}", command, out / name / "result.json"))
        return str(out / name)

    few, more = sizes.guided_reward_steps
    learned, last = learn(joined, out / "clips", (4, 5), few), systems["ru_whole"]
    for seed, (name, steps) in enumerate(zip(ROUNDS, sizes.guided_ru_steps, strict=True), start=3):
        last = systems[name] = tuned(name, last, steps, learned, *ROUNDS[name], seed)

    halves = {
        "ru_last": (last, out / "prompts_b.txt", "500000"),
        "ru_whole": (systems["ru_whole"], out / "prompts_a.txt", "600000"),
    }
    words = (str(prompts), "--count", str(count), "--halves", *(str(half) for _, half, _ in reversed(halves.values())))
    runs.append(Run("guided_halves", words, out / "prompts_b.txt", "many_prompts"))
    again = []
    for name, (model, half, seed) in halves.items():
        again.append(out / f"{name}_votes")
        votes = (
            *("pairs", "--model", model, "--prompts", str(half), "--pairs_per_prompt", "2", "--votes_per_pair", "2"),
            *(*duration, "--batch_size", "64", "--seed", seed, "--out", str(again[-1])),
        )
        runs.append(Run(f"guided_{again[-1].name}", votes, again[-1]))
    words = (str(joined), *map(str, again), "--out", str(out / "votes_again"))
    runs.append(Run("guided_votes_again", words, out / "votes_again", "join_votes"))
    learned = learn(out / "votes_again", out / "clips_again", (6, 7), more)
    whole = systems["ru_whole"]
    changed = {"ru_last": as_one(systems["ru_last"], whole, "ru_last_whole")}  # what three rounds changed together
    for name, seed in SEEDS.items():
        last = whole
        for number, (which, steps) in enumerate(zip(AGAIN, sizes.guided_seed_steps, strict=True)):
            last = tuned(f"{name}_{which}", last, steps, learned, *AGAIN[which], seed + 2 * number)
        changed[name] = systems[name] = as_one(last, whole, name)
    last = whole
    for name, folder in changed.items():
        words = (folder, "--share", f"{SHARE:g}", "--on", last, "--out", str(out / f"{name}_share"))
        last = words[-1]
        runs.append(Run(f"guided_{name}_share", words, Path(last), "add_adapter"))
    systems["ru_shares"] = as_one(last, whole, "ru_shares")
    last = tuned("ru_final", systems["ru_shares"], sizes.guided_final_steps, learned, *FINAL, 11)
    share = str(out / "ru_final_share")
    words = (last, "--share", f"{FINAL_SHARE:g}", "--on", systems["ru_shares"], "--out", share)
    runs.append(Run("guided_ru_final_share", words, Path(share), "add_adapter"))
    systems["ru"] = as_one(
        share, systems["r"], "ru", "--rank", str(RANK), "--guidance_scale", "1"
    )  # it has guidance in it
    del systems["ru_first"], systems["ru_second"]  # on the way

    def compared(folder: str, models: list[str], on: Path, rewards: tuple[str, ...], *more: str) -> Run:
        """One evaluation of these systems, each pair of clips heard by simulated listeners."""
        command = (
            *("evaluate", "--models", *(f"{name}={systems[name]}" for name in models), "--prompts", str(on)),
            *("--rewards", *rewards, PANEL, OTHER, *duration, "--batch_size", "32", *more, "--out", str(out / folder)),
        )
        return Run(f"guided_{folder}", command, out / folder)

    heldout, fresh = work / "seed_0" / "heldout_prompts.txt", out / "prompts_fresh.txt"
    known, played = ("adherence", "quality"), ["base", "r", "u", "ru"]
    words = ("--count", str(sizes.fresh_prompts), "--seed", "1", "--but_not", str(prompts), str(fresh))
    return [
        *runs,
        compared("evaluation", list(systems), heldout, known, "--seed", "1"),
        compared("at_3", played, heldout, known, "--guidance_scale", "3", "--seed", "1"),
        compared("as_played", played, heldout, known, "--guidance_scale", "none", "--seed", "1"),
        Run("guided_fresh_prompts", words, fresh, "many_prompts"),
        compared("fresh", ["base", "r", "u", "ru_before", "ru"], fresh, ("adherence",), "--seed", "5"),
    ]
