"""Guidance in the weights: what the base plays with guidance is taught to it without, and added to RU, which asks less of the prompt.

The policy learns from the KL to the guided base alone (Cideron et al. 2024, arXiv:2410.06084), and its value head, at a tenth of the
weight, from adherence; what that changes is added to what the larger budget's RU changes, whole and by half. From there RU is tuned
on, on rewards that were learned from votes on its own clips too, with more of adherence than before, and with a variety for which
another key is no news until the last steps: what ships. Its tables and the adapter are made by

    python recipes/paper/run.py --work build/paper --seeds 0 --parts align larger guided
    python recipes/paper/judged.py --work build/paper --part guided --draws 2
    python recipes/paper/gather.py --work build/paper --part guided
    python recipes/paper/publish.py --work build/paper --names ru
"""

from pathlib import Path

from many_prompts import BUNDLED
from plan import OTHER, PANEL, Run, Sizes

SHARES = {"half": 0.5, "whole": 1.0}
ROUNDS = {  # of RU from there: what stands beside the preference rewards, and the entropy bonus a nat
    "ru_first": ({"adherence": 0.35, "any_key:variety": 0.15}, 0.0),
    "ru_second": ({"adherence": 0.25, "any_key:variety": 0.15}, 0.0),
    "ru_last": ({"adherence": 0.22, "variety": 0.24}, 0.001),
}
RANK = 64  # of the adapter that ships; in place of 112, of which it keeps .95 or more of a layer's squared change


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
    for name, share in SHARES.items():
        folder = systems[f"ru_{name}"] = str(out / f"ru_{name}")
        words = (str(distilled), "--share", f"{share:g}", "--on", str(before), "--out", folder)
        runs.append(Run(f"guided_ru_{name}", words, Path(folder), "add_adapter"))

    votes = (
        *("pairs", "--model", systems["ru_whole"], "--prompts", str(voted_on), "--pairs_per_prompt", "2"),
        *("--votes_per_pair", "2", *duration, "--batch_size", "64", "--seed", "400000", "--out", str(out / "ru_votes")),
    )
    joined = out / "votes"
    words = (str(larger / "base_a"), str(out / "ru_votes"), "--out", str(joined))
    runs += [Run("guided_ru_votes", votes, out / "ru_votes"), Run("guided_votes", words, joined, "join_votes")]
    learned = [out / f"reward_{number}" for number in (4, 5)]
    for number, folder in zip((4, 5), learned, strict=True):
        command = (
            *("reward", "--preferences", str(joined), "--test_share", "0.15", "--seed", str(number)),
            *("--backbone", "clap", "--model", "musicrl-tiny-adherence", "--pooling", "rhythm"),
            *("--head_dropout", "0.3"),
            *("--weight_decay", "0.3", "--learning_rate", "1e-3", "--max_steps", str(sizes.larger_reward_steps[0])),
            *("--per_device_train_batch_size", "64", "--cache_dir", str(out / "clips"), "--baselines", PANEL),
            *("--output_dir", str(folder)),
        )
        runs.append(Run(f"guided_{folder.name}", command, folder / "result.json"))

    def tuned(name: str, model: str, steps: int, beside: dict[str, float], entropy_coef: float, seed: int) -> str:
        """PPO on both learned rewards and what stands beside them, anchored to RU with guidance in its weights."""
        clips, preference = str(2 * sizes.batch), (1 - sum(beside.values())) / 2
        rewards = {f"preference:{folder}": preference for folder in learned} | beside
        command = (
            *("ppo", "--model", model, "--ref_model", systems["ru_whole"], "--prompts", str(prompts), *duration),
            *("--max_steps", str(steps), "--per_device_train_batch_size", clips),
            *("--local_rollout_forward_batch_size", clips, "--num_generations", str(2 * sizes.clips_per_prompt)),
            *("--learning_rate", "7e-4", *lora, "--kl_coef", "0.01", "--seed", str(seed)),
            *("--entropy_coef", f"{entropy_coef:g}", "--normalise", "normalise_then_sum"),
            *("--reward", *(f"{weight:.2g}*{spec}" for spec, weight in rewards.items())),
            *("--output_dir", str(out / name)),
        )
        runs.append(Run(f"guided_{name}", command, out / name / "result.json"))
        return str(out / name)

    last = systems["ru_whole"]
    for seed, (name, steps) in enumerate(zip(ROUNDS, sizes.guided_ru_steps, strict=True), start=3):
        beside, entropy_coef = ROUNDS[name]
        last = systems[name] = tuned(name, last, steps, beside, entropy_coef, seed)
    del systems["ru_last"]  # of which `ru` is one adapter
    systems["ru"] = str(out / "ru")
    words = (last, "--base", systems["r"], "--out", systems["ru"], "--rank", str(RANK))
    runs.append(Run("guided_ru", words, out / "ru", "one_adapter"))
    compare = (
        *("evaluate", "--models", *(f"{name}={model}" for name, model in systems.items())),
        *("--prompts", str(BUNDLED / "heldout.txt"), "--rewards", "adherence", "quality", PANEL, OTHER, *duration),
        *("--batch_size", "32", "--seed", "1", "--out", str(out / "evaluation")),
    )
    return [*runs, Run("guided_evaluation", compare, out / "evaluation")]
