"""Guidance in the weights: what the base plays with guidance is taught to it without, and added to RU, which asks less of the prompt.

The policy learns from the KL to the guided base alone (Cideron et al. 2024, arXiv:2410.06084), and its value head, at a tenth of the
weight, from adherence; what that changes is added to what RU's adapters change, whole and by half.
"""

from pathlib import Path

from many_prompts import BUNDLED
from plan import OTHER, PANEL, Run, Sizes

SHARES = {"half": 0.5, "whole": 1.0}


def guided(work: Path, sizes: Sizes) -> list[Run]:
    """Guidance distilled from the bundled base, added to the bundled RU, and a comparison."""
    out = work / "guided"
    prompts, distilled = out / "prompts.txt", out / "distilled"
    command = (
        *("ppo", "--model", "musicrl-tiny", "--prompts", str(prompts), "--duration_s", f"{sizes.duration_s:g}"),
        *("--objective", "paper", "--kl_mix", "1", "--ref_guidance_scale", "3", "--max_steps", str(sizes.guided_steps)),
        *("--per_device_train_batch_size", str(sizes.batch), "--learning_rate", "2e-3", "--lora_r", "16"),
        *("--lora_alpha", "32", "--logging_steps", "5", "--seed", "2", "--reward", "adherence"),
        *("--output_dir", str(distilled)),
    )
    runs = [
        Run("guided_prompts", (str(prompts), "--count", str(sizes.many_prompts)), prompts, "many_prompts"),
        Run("guided_distilled", command, distilled / "result.json"),
    ]
    systems = {"base": "musicrl-tiny", "distilled": str(distilled), "r": "musicrl-tiny-r", "ru": "musicrl-tiny-ru"}
    for name, share in SHARES.items():
        folder = systems[f"ru_{name}"] = str(out / f"ru_{name}")
        words = (str(distilled), "--share", f"{share:g}", "--on", "musicrl-tiny-ru", "--out", folder)
        runs.append(Run(f"guided_ru_{name}", words, Path(folder), "add_adapter"))
    compare = (
        *("evaluate", "--models", *(f"{name}={model}" for name, model in systems.items())),
        *("--prompts", str(BUNDLED / "heldout.txt"), "--rewards", "adherence", "quality", PANEL, OTHER),
        *(
            "--duration_s",
            f"{sizes.duration_s:g}",
            "--batch_size",
            "32",
            "--seed",
            "1",
            "--out",
            str(out / "evaluation"),
        ),
    )
    return [*runs, Run("guided_evaluation", compare, out / "evaluation")]
