"""What the recipe's judges, by which nothing was trained or tuned, say of each system: instrument, tempo, key, faults.

Beside them two panels of simulated listeners that no run votes or compares with, one of them of another mix of tastes.

    python recipes/paper/judged.py --work build/paper --recipe_work build/tiny

`--recipe_work` is the folder in which recipes/judges.py ran, with its test clips. Writes WORK/judged.json, or of what was made on the
larger budget (`--part larger`) WORK/larger/judged.json, and likewise `--part guided`, with the first seed's R and U; what is in it is kept,
so remove it where systems or judges have changed. At another guidance scale it is judged_guidance_SCALE.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe's stages, which are scripts
import numpy as np
import torch
from common import SAMPLING_RATE, load_clips, read_json, say, to_float, write_json
from guided import ROUNDS, SEEDS
from judge import choose_prompts, figures, sample
from judges import JUDGED_S, Judges

from musicrl_hf import load_generator
from musicrl_hf.preferences.listeners import other_taste, panel_taste

SYSTEMS = ("base", "r", "u", "ru", "ru2")
# Of WORK/guided, beside R, U and what they were added to.
GUIDED = ("distilled", "ru_whole", [*ROUNDS][-1], *SEEDS, "ru_shares", "ru")
LARGER = ("r_larger", "u", "ru_first", "ru_anew", "ru2", "ru3", "ru")  # of WORK/larger, beside those of the first seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--recipe_work", type=Path, default=Path("build/tiny"))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="those of the align runs that there are"
    )
    parser.add_argument(
        "--part",
        choices=["larger", "guided"],
        help="the systems of this part in place of the seeds', all by the same judges",
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1, help="clips of each prompt")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale")
    parser.add_argument("--systems", nargs="+", help="only these, of those that there are")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judges = Judges.load(args.recipe_work)
    clips, rows = load_clips(args.recipe_work, "test")
    order, half = np.random.default_rng(0), len(rows) // 2  # as recipes/judge.py chooses them
    chosen = order.permutation(half)[: args.prompts]
    others = half + order.permutation(half)[: args.prompts]
    rows, prompts = [rows[i] for i in chosen] * args.draws, choose_prompts([rows[i] for i in chosen]) * args.draws
    reference = judges.hear(to_float(clips[others, : JUDGED_S * SAMPLING_RATE]))["embedding"]
    name = "judged" if args.guidance == 1 else f"judged_guidance_{args.guidance:g}"
    path = args.work / (args.part or ".") / f"{name}.json"
    found: dict = {
        "prompts": len(chosen),
        "clips": len(prompts),
        "guidance_scale": args.guidance,
        "seconds": JUDGED_S,
        "seeds": {},
    }
    if path.exists():
        before = read_json(path)
        if changed := [name for name in found if name != "seeds" and before.get(name, found[name]) != found[name]]:
            parser.error(f"{path} was made with other {', '.join(changed)}: remove it, or ask for the same")
        found["seeds"] = before["seeds"]
    for seed in [0] if args.part else args.seeds:
        folders = {name: args.work / f"seed_{seed}" / name for name in SYSTEMS}
        if args.part == "guided":
            folders = {name: args.work / "seed_0" / name for name in ("base", "r", "u")}
            folders["ru_before"] = args.work / "larger" / "ru"
            folders |= {name: args.work / "guided" / name for name in GUIDED}
        if args.part == "larger":
            folders = {f"small_{name}" if name in LARGER else name: folder for name, folder in folders.items()}
            folders |= {name: args.work / "larger" / name for name in LARGER}
        if unknown := sorted({*(args.systems or ())} - folders.keys()):
            parser.error(f"--systems {' '.join(unknown)}: there are {', '.join(folders)}")
        heard = found["seeds"].setdefault(str(seed), {})
        for name, folder in folders.items():
            if name in heard or name not in (args.systems or folders) or (name != "base" and not folder.is_dir()):
                continue
            if name == "base" and len(found["seeds"]) > 1:  # the same for all seeds
                heard[name] = next(iter(found["seeds"].values()))[name]
                continue
            say(f"seed {seed}, {name}")
            model = load_generator("musicrl-tiny" if name == "base" else str(folder))
            audio = sample(model, prompts, guidance=args.guidance, seed=seed)
            heard[name] = figures(judges.hear(audio), rows, prompts, reference)
            for panel in (panel_taste, other_taste):
                heard[name][panel.__name__] = round(float(panel(prompts, audio[:, None], SAMPLING_RATE).mean()), 3)
            write_json(path, found)


if __name__ == "__main__":
    main()
