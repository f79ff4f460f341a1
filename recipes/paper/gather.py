"""Everything the runs found, in one file: results/paper.json, from which README, cards and plots are made.

    python recipes/paper/gather.py --work build/paper
    python recipes/paper/gather.py --work build/paper --part align second     # these parts anew, what else was gathered stays

Votes and ratings of all seeds are pooled; intervals come from prompts drawn anew, and say nothing of other training seeds, so
each pooled figure has the seeds' own beside it. All listeners are simulated.
"""

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from guided import AGAIN, ROUNDS, SEEDS
from parts import PLANS
from plan import OTHER, PANEL, Sizes

from musicrl_hf import load_generator
from musicrl_hf.audio import atomic_path
from musicrl_hf.evaluation.win_rates import (
    Rating,
    as_json,
    mean_opinion_scores,
    wilcoxon_signed_rank,
    win_rate,
)
from musicrl_hf.preferences.importers import read_votes
from musicrl_hf.preferences.listeners import LISTENER_VERSION
from musicrl_hf.preferences.schema import read_prompts
from musicrl_hf.training.losses import step_sums

OUT = Path(__file__).resolve().parents[2] / "results" / "paper.json"
PAIRS = (
    ("r", "base"),
    ("u", "base"),
    ("u", "r"),
    ("ru", "base"),
    ("ru", "u"),
    ("ru", "r"),
    ("ru2", "base"),
    ("ru2", "r"),
    ("ru2", "u"),
    ("ru2", "ru"),
)
PAPER = {  # Cideron et al. 2024, section 5.2: win rates in %, wins / (wins + losses), and mean opinion scores
    "win_rates": {"r-base": 83, "u-base": 74, "u-r": 53.7, "ru-base": 87, "ru-u": 62, "ru-r": 66},
    "mos": {"base": 3.07, "r": 3.54, "u": 3.54, "ru": 3.82},
}
KL_PROMPTS, KL_SEED = 48, 5


def seeds_of(work: Path) -> dict[int, Path]:
    """The last comparison of each finished align run, by seed."""
    found = {
        int(path.parents[1].name.removeprefix("seed_")): path.parent
        for name in ("evaluation", "evaluation2")
        for path in work.glob(f"seed_*/{name}/results.json")
    }
    if not found:
        raise SystemExit(f"{work} has no finished run: python recipes/paper/run.py --work {work}")
    return dict(sorted(found.items()))


def ratings_of(folder: Path) -> Iterator[Rating]:
    with open(folder / "ratings.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield Rating(row["prompt"], row["model"], float(row["score"]), row["listener"])


def compared(folders: dict[int, Path]) -> dict[str, Any]:
    """Win rates, opinion scores and every reward's mean over the seeds."""
    votes = {seed: read_votes(folder / "votes.csv") for seed, folder in folders.items()}
    ratings = {seed: list(ratings_of(folder)) for seed, folder in folders.items()}
    all_votes, all_ratings = (
        [v for some in votes.values() for v in some],
        [r for some in ratings.values() for r in some],
    )
    rows = []
    for a, b in PAIRS:
        having = [seed for seed, some in votes.items() if any({v.model_a, v.model_b} == {a, b} for v in some)]
        if not having:
            continue
        pooled = as_json(win_rate(all_votes, a, b))
        rows.append(
            {"a": pooled.pop("model"), "b": pooled.pop("against"), **pooled, "seeds": having}
            | {"by_seed": [as_json(win_rate(votes[seed], a, b))["win_rate"] for seed in having]}
            | {"wilcoxon_p": wilcoxon_signed_rank(all_ratings, a, b)[0], "paper": PAPER["win_rates"].get(f"{a}-{b}")}
        )
    mos = []
    for score in mean_opinion_scores(all_ratings):
        by_seed = [
            fmean(r.score for r in some if r.model == score.model)
            for some in ratings.values()
            if any(r.model == score.model for r in some)
        ]
        mos.append(as_json(score) | {"by_seed": by_seed, "paper": PAPER["mos"].get(score.model)})
    results = [json.loads((folder / "results.json").read_text()) for folder in folders.values()]
    prompts = read_prompts(next(iter(folders.values())).parent / "heldout_prompts.txt")[:KL_PROMPTS]
    duration_s = results[0]["settings"]["duration_s"]
    names = dict.fromkeys(name for result in results for name in result["models"])
    systems = {
        name: _mean_of([_system(result, name) for result in results if name in result["models"]]) for name in names
    }
    for name, row in systems.items():
        tuned = [folder.parent / name for folder in folders.values() if (folder.parent / name).is_dir()]
        row["kl"] = (
            fmean(divergence(str(each), "musicrl-tiny", prompts, duration_s) for each in tuned) if tuned else 0.0
        )
    return {"win_rates": rows, "mos": mos, "systems": systems}


def _system(result: dict[str, Any], name: str) -> dict[str, float]:
    """Each reward's mean, diversity, and distinct n-grams of one system in one evaluation."""
    found = {
        _short(label): next(row["mean"] for row in table["means"] if row["model"] == name)
        for label, table in result["rewards"].items()
    }
    metrics = result["metrics"][name]
    return (
        found
        | {key: metrics[key]["mean"] for key in ("timbre_distance_db", "harmony_distance")}
        | {"distinct_ngrams": metrics["distinct_ngrams"]}
    )


def _short(label: str) -> str:
    return {PANEL: "panel_taste", OTHER: "other_taste"}.get(label, label.replace("preference:", "").replace(":", "_"))


def _mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: fmean(row[key] for row in rows) for key in rows[0] if all(key in row for row in rows)}


@torch.no_grad()
def divergence(name: str, base: str, prompts: list[str], duration_s: float) -> float:
    """KL(tuned || base), exact in each step, nats a clip: the mean over a clip for each prompt that the tuned one samples."""
    tuned, anchor = load_generator(name), load_generator(base)
    ids, mask = tuned.text_inputs(prompts)
    codes = tuned.sample_codes(
        ids, mask, tuned.frames_for(duration_s), generator=torch.Generator().manual_seed(KL_SEED)
    )
    scores = tuned.score_codes(codes, ids, mask, ref_logits=anchor.code_logits(codes, ids, mask))
    return float(step_sums(scores.kl, scores.mask).sum(1).mean())


def spent(work: Path, name: str) -> dict[str, float]:
    """Seconds and peak memory of a method: of all its rounds, where it has some."""
    first, _, rounds = name.partition("_iterated_")
    names = [{"one": "long_one_reward"}.get(name, name)] if not rounds else [
        f"{step}_{i}" for i in range(1, int(rounds) + 1) for step in ("pairs", f"{first}_iterated")
    ]  # fmt: skip
    records = [json.loads(path.read_text()) for each in names if (path := work / "runs" / f"{each}.json").exists()]
    if not records:
        return {}
    return {
        "seconds": sum(record["seconds"] for record in records),
        "peak_memory_mb": max(record["peak_memory_mb"] for record in records),
    }


def against_base(work: Path, part: str, evaluation: str = "evaluation") -> list[dict[str, Any]]:
    """One row a system of WORK/PART/EVALUATION: win rate against the base, rewards, KL, diversity, seconds, peak memory."""
    folder = work / part / evaluation
    if not (folder / "results.json").exists():
        return []
    result, votes = json.loads((folder / "results.json").read_text()), read_votes(folder / "votes.csv")
    prompts = read_prompts(work / "seed_0" / "heldout_prompts.txt")[:KL_PROMPTS]
    scores, rows = {row["model"]: row["mean"] for row in result["mos"]}, []
    for name in result["models"]:
        row: dict[str, Any] = {"method": name, "mean_rating": scores[name], **_system(result, name)}
        if name != "base":
            rate = as_json(win_rate(votes, name, "base"))
            row |= {key: rate[key] for key in ("win_rate", "low", "high", "wins", "ties", "losses")}
            before = work / "larger" / name.removesuffix("_before") if name.endswith("_before") else work / part / name
            kept = (before, work / "seed_0" / name.removeprefix("small_"))
            tuned = next((path for path in kept if path.is_dir()), None)
            if tuned is not None:
                row["kl"] = divergence(str(tuned), "musicrl-tiny", prompts, result["settings"]["duration_s"])
            elif " best of " in name:  # at most log N - (N - 1) / N
                n = int(name.rpartition(" ")[2])
                row["kl"] = math.log(n) - (n - 1) / n
            row |= spent(work, f"{part}_{name}" if part in ("larger", "guided") else name)
        rows.append(row)
    return rows


def everything_of(work: Path, part: str, made_by: str) -> dict[str, Any]:
    """What WORK/PART holds: every pair of its systems, a row each as `against_base` has them, its rewards, what judges heard."""
    folder = work / part / "evaluation"
    rows = against_base(work, part)
    if not rows:
        return {}
    votes, ratings = read_votes(folder / "votes.csv"), list(ratings_of(folder))
    names = [row["method"] for row in rows]
    pairs = []
    for b, a in combinations(names, 2):
        rate = as_json(win_rate(votes, a, b))
        pairs.append(
            {"a": rate.pop("model"), "b": rate.pop("against"), **rate}
            | {"wilcoxon_p": wilcoxon_signed_rank(ratings, a, b)[0]}
        )
    judged = work / part / "judged.json"
    made = json.loads((work / part / made_by / "result.json").read_text())
    return {
        "date": made["date"],
        "hardware": made["hardware"],
        "systems": rows,
        "win_rates": pairs,
        "mos": [as_json(score) for score in mean_opinion_scores(ratings)],
        "rewards": {path.parent.name: _reward(path) for path in sorted(work.glob(f"{part}/reward*/result.json"))},
        "judged": json.loads(judged.read_text()) if judged.exists() else {},
    }


def evaluated(folder: Path) -> dict[str, Any]:
    """Every pair of the systems of one evaluation; of each its mean rating, rewards and diversity."""
    result, votes = json.loads((folder / "results.json").read_text()), read_votes(folder / "votes.csv")
    scores, pairs = {row["model"]: row["mean"] for row in result["mos"]}, []
    for b, a in combinations(result["models"], 2):
        rate = as_json(win_rate(votes, a, b))
        pairs.append({"a": rate.pop("model"), "b": rate.pop("against"), **rate})
    return {
        "settings": {key: result["settings"][key] for key in ("duration_s", "guidance_scale", "seed")},
        "prompts": len({vote.prompt for vote in votes}),
        "win_rates": pairs,
        "systems": {name: {"mean_rating": scores[name], **_system(result, name)} for name in result["models"]},
    }


def guided(work: Path) -> dict[str, Any]:
    """WORK/guided: all systems at guidance 1, what ships as it is played and on other prompts, each run's steps."""
    if not (found := everything_of(work, "guided", "distilled")):
        return {}
    folder, tuned = work / "guided", (*ROUNDS, *(f"{seed}_{which}" for seed in SEEDS for which in AGAIN))
    made = (name for name in ("at_3", "as_played", "fresh") if (folder / name / "results.json").exists())
    found |= {name: evaluated(folder / name) for name in made}
    judged = folder / "judged_guidance_3.json"
    found["judged_at_3"] = json.loads(judged.read_text()) if judged.exists() else {}
    return found | {"steps": {name: steps(folder / name) for name in ("distilled", *tuned, "ru_final")}}


def rewards_by_seed(work: Path, seeds: Iterable[int]) -> dict[str, Any]:
    """Held-out accuracy of each seed's preference rewards."""
    paths = ((seed, path) for seed in seeds for path in sorted((work / f"seed_{seed}").glob("preference*/result.json")))
    return {
        f"{seed}{path.parent.name.removeprefix('preference') and ' second round'}": _reward(path)
        for seed, path in paths
    }


def ablations_of(work: Path) -> dict[str, Any]:
    """The same of the first seed's, without a part or with another beginning."""
    return {path.parent.name: _reward(path) for path in sorted(work.glob("rewards/*/result.json"))}


def _reward(path: Path) -> dict[str, Any]:
    metrics = json.loads(path.read_text())["metrics"]
    baselines = {_short(label): value for label, value in metrics.get("baselines", {}).items()}
    kept = {key: value for key, value in metrics.items() if key not in ("rows", "train_loss")}
    return kept | ({"baselines": baselines} if baselines else {})


def curve(folder: Path) -> list[dict[str, float]]:
    """The evaluations of a long run: step, KL, the trained reward and every watched one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keep = ("eval_reward", "eval_kl", "eval_entropy")
    rows = []
    for line in lines:
        if "eval_kl" in line:
            row = {"step": line["step"], **{key.removeprefix("eval_"): line[key] for key in keep if key in line}}
            watched = {key: value for key, value in line.items() if key.startswith(("eval_watch/", "eval_reward/"))}
            rows.append(row | {_short(Path(key.partition("/")[2]).name): value for key, value in watched.items()})
    return rows


def steps(folder: Path) -> list[dict[str, float]]:
    """What a run logged as it trained: step, KL, entropy and every reward, by the last part of its name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"], "kl": line["kl"], "entropy": line["entropy"]}
        | {_short(Path(key).name): value for key, value in line.items() if key.startswith("reward/")}
        for line in lines
        if "kl" in line
    ]


def loop(work: Path) -> dict[str, Any]:
    """The whole loop, seed by seed, with the second round of those that have had one."""
    folders = seeds_of(work)
    made = json.loads((next(iter(folders.values())).parent / "u" / "result.json").read_text())
    commands = [
        run["command"].split() for run in runs_of(work, {*planned(work, "align"), *planned(work, "second")}).values()
    ]
    judged = work / "judged.json"
    return {
        "listeners": LISTENER_VERSION,
        "recipes": sorted({words[words.index("--recipe") + 1] for words in commands}),
        "seeds": list(folders),
        "date": made["date"],
        "hardware": made["hardware"],
        **compared(folders),
        "rewards": {"by_seed": rewards_by_seed(work, folders)},
        **({"judged": json.loads(judged.read_text())} if judged.exists() else {}),
    }


def curves_and_reach(work: Path) -> dict[str, Any]:
    """The long runs, and how far they got beside the best of many clips."""
    folders = {name: work / "curves" / name for name in ("one", "ensemble")}
    curves = {name: curve(folder) for name, folder in folders.items() if (folder / "result.json").exists()}
    by_r = [row for row in against_base(work, "curves", "evaluation_by_r") if row["method"] != "base"]
    reach = against_base(work, "curves") + [row | {"method": f"{row['method']} by R's rewards"} for row in by_r]
    return {"curves": curves, "reach": reach}


GATHERED: dict[str, Callable[[Path], dict[str, Any]]] = {  # by part of run.py; the second round is in the loop's tables
    "align": loop,
    "second": loop,
    "methods": lambda work: {"methods": against_base(work, "methods")},
    "rewards": lambda work: {"rewards": {"ablations": ablations_of(work)}},
    "curves": curves_and_reach,
    "limits": lambda work: {"limits": against_base(work, "limits")},
    "larger": lambda work: {"larger": everything_of(work, "larger", "u")},
    "guided": lambda work: {"guided": guided(work)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument(
        "--part", nargs="+", choices=GATHERED, help="these alone, in the place of what the file has of them"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="results/paper.json by default")
    args = parser.parse_args()
    before: dict[str, Any] = json.loads(args.out.read_text()) if args.part or args.out.exists() else {}
    anew = {"judged": {}, "paper": PAPER} | {
        name: before[name] for name in ("shipped",) if name in before
    }  # publish.py's
    found = before if args.part else anew
    runs, rewards = found.pop("runs", {}), found.pop("rewards", {})
    for gather in dict.fromkeys(GATHERED[part] for part in args.part or GATHERED):
        gathered = gather(args.work)
        rewards |= gathered.pop("rewards", {})
        found |= gathered
    for part in args.part or GATHERED:
        names = planned(args.work, part)
        runs = {name: run for name, run in runs.items() if name not in names} | runs_of(args.work, names)
    write({**found, "rewards": rewards, "runs": dict(sorted(runs.items()))}, args.out)


def planned(work: Path, part: str) -> set[str]:
    """The names of a part's runs, of whatever seeds there are."""
    if part in PLANS:
        return {run.name for run in PLANS[part](work, Sizes())}
    seeds = (path.name.removeprefix("seed_") for path in work.glob("seed_*"))
    return {f"{part}_{seed}" for seed in seeds}


def runs_of(work: Path, names: set[str]) -> dict[str, Any]:
    """Command, seconds and memory of the runs of these names that came to their end."""
    paths = {name: work / "runs" / f"{name}.json" for name in sorted(names)}
    runs = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    for run in runs.values():  # as `make paper` calls them, wherever this computer kept them
        run["command"] = run["command"].replace(str(work), "build/paper").replace(f"{OUT.parents[1]}/", "")
    return runs


def write(found: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(exist_ok=True)
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(_rounded(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"{out}: {', '.join(name for name, value in found.items() if value)}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
