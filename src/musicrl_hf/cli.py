"""`musicrl ...`: every job from the command line. Training commands run under `accelerate launch -m musicrl_hf.cli` too."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from . import __version__
from ._environment import environment_problem
from .config import describe_fields, load_config

JOBS = {  # command: module, configuration, function, what it does
    "reward": ("training.reward", "RewardJob", "run_reward", "learn a reward from preferences (Bradley-Terry)"),
    "dpo": ("training.dpo", "DPOJob", "run_dpo", "tune a generator on preferences with TRL's DPO"),
    "ppo": ("training.ppo", "PPOJob", "run_ppo", "tune a generator on rewards with PPO or the paper's objective"),
    "rloo": ("training.online", "RLOOJob", "run_rloo", "tune a generator on rewards with TRL's RLOO"),
    "grpo": ("training.online", "GRPOJob", "run_grpo", "tune a generator on rewards with TRL's GRPO"),
    "evaluate": (
        "evaluation.report",
        "EvaluateJob",
        "run_evaluate",
        "compare generators, or count votes: win rates, MOS",
    ),
    "pairs": ("labelling", "PairsJob", "run_pairs", "sample pairs that simulated listeners or a reward choose between"),
    "power": ("evaluation.power", "PowerJob", "run_power", "how many pairs a listening study needs"),
    "collect": ("collect.job", "CollectJob", "run_collect", "collect votes between clips"),
    "export": ("collect.job", "ExportJob", "run_export", "collected votes as a data set, here and on the Hub"),
    "align": ("align", "AlignJob", "run_align", "the whole loop: collect, learn, tune, compare"),
}

DEFAULT_CLIP = Path("out.wav")
_CLIP_OPTIONS = ("crop_s", "skip_bad_clips")
IMPORTS = {  # kind: function of preferences.importers, the options it takes
    "music-arena": ("import_music_arena", ("config", *_CLIP_OPTIONS)),
    "aime": ("import_aime", ("criterion", "audio", *_CLIP_OPTIONS)),
    "musicprefs": ("import_musicprefs", ("criterion", "prompt_column", *_CLIP_OPTIONS)),
    "cmi-pref": ("import_cmi_pref", ("criterion", *_CLIP_OPTIONS)),
    "songeval": ("import_songeval", ("criterion", "min_gap", "pairs_per_prompt", *_CLIP_OPTIONS)),
    "musiceval": ("import_musiceval", ("criterion", "prompts", "min_gap", "pairs_per_prompt", *_CLIP_OPTIONS)),
    "folder": ("import_folder", ("score_column", "min_gap", "crop_s")),
    "battles": ("import_battles", ()),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on standard error where the input is at fault, 130 on Ctrl+C."""
    problem = environment_problem()
    if problem is not None:
        print(f"musicrl: {problem}", file=sys.stderr)
        return 2
    parser, commands = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]  # it may stand anywhere
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.command not in JOBS:
        commands[arguments.command].error(_unknown(rest, words, commands[arguments.command]))
    try:
        _hide_weight_bars()
        if arguments.command in JOBS:
            _run_job(arguments, words[words.index(arguments.command) + 1 :])
        else:
            arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        if traceback:
            raise
        print(f"musicrl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if traceback:
            raise
        print("\nmusicrl: interrupted", file=sys.stderr)
        return 130
    return 0


def _hide_weight_bars() -> None:
    """No progress bars for weights that are read and written in a moment; those of downloads stay."""
    from transformers.utils import logging

    def hook(bar: Callable[..., Any], args: tuple, options: dict) -> Any:
        hidden = options.get("desc") in ("Loading weights", "Writing model shards")
        return bar(*args, **options | ({"disable": True} if hidden else {}))

    logging.set_tqdm_hook(hook)


def _unknown(rest: Sequence[str], words: Sequence[str], command: argparse.ArgumentParser) -> str:
    """What is wrong with the rest of the words, which no argument of the command takes."""
    known = sorted(set(re.findall(r"--[a-zA-Z]\w*", command.format_help())))
    wrong = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
    if wrong is None:
        hint = "; give --reward once for each reward" if "--reward" in words else ""
        return f"too many arguments: {' '.join(rest)}; put quotes around a text of several words{hint}"
    close = difflib.get_close_matches(wrong, known, 1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
    return f"unknown argument {wrong}: {hint}"


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by name."""
    parser = argparse.ArgumentParser("musicrl", description="Align music generators with what people prefer.")
    parser.add_argument("--version", action="version", version=f"musicrl_hf {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="text to clips")
    generate.add_argument("prompt", help="what to play")
    generate.add_argument(
        "-o",
        "--output",
        type=Path,
        help=f".wav, .flac or .ogg (Vorbis) file, written over if it is there ({DEFAULT_CLIP}, never written over)",
    )
    generate.add_argument("--model", default="musicrl-tiny", help="bundled name, folder or Hub id (musicrl-tiny)")
    generate.add_argument("--duration", "--duration_s", type=float, default=5.0, help="seconds, at most 30 (5)")
    generate.add_argument("--seed", type=int, help="makes the clip reproducible (another one each time)")
    generate.add_argument("-n", "--number", type=int, default=1, help="clips; more than one are numbered (1)")
    generate.add_argument("--temperature", type=float, default=1.0, help="of sampling, above 0 (1.0)")
    generate.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance, 1 for none (the model's own, mostly 3.0)"
    )
    generate.add_argument(
        "--top_k", type=int, default=250, help="likeliest codes to sample from, 0 for all of them (250)"
    )
    generate.add_argument(
        "--best_of", type=int, default=1, help="sample so many and keep the one that --reward prefers (1)"
    )
    generate.add_argument("--reward", action="append", default=[], help=_REWARD_SUM_HELP)
    generate.add_argument("--device", help=_DEVICE_HELP)
    generate.add_argument("--dtype", default="float32", help="of the weights: float32, bfloat16 or float16 (float32)")
    generate.set_defaults(run=_generate)

    score = commands.add_parser(
        "score", help="what rewards say of clips: a column for each reward, and their weighted sum"
    )
    score.add_argument("clips", nargs="+", type=Path, help="audio files")
    score.add_argument("--reward", action="append", required=True, help=_REWARD_HELP)
    score.add_argument("--prompt", required=True, help="what the clips were asked to be")
    score.add_argument("--device", help=_DEVICE_HELP)
    score.set_defaults(run=_score)

    importer = commands.add_parser("import", help="preferences or votes from elsewhere")
    importer.add_argument("kind", choices=IMPORTS, help="own clips, a table of votes (CSV), or a published data set")
    importer.add_argument(
        "source",
        help="folder with the clips and their table (clips.jsonl or clips.csv: prompt, audio, system, a score; or pairs.csv: "
        "prompt, audio_a, audio_b, preference), or with a copy of the data set, or its Hub id; battles: a CSV of votes",
    )
    importer.add_argument("--out", type=Path, required=True, help="folder to write")
    importer.add_argument("--crop_s", type=float, help="keep the first seconds of each clip; without it, at most 30 s")
    importer.add_argument(
        "--skip_bad_clips", action="store_true", default=None, help="count unusable clips instead of stopping"
    )
    importer.add_argument("--score_column", help="folder: column of clips.jsonl or clips.csv to compare clips by")
    importer.add_argument(
        "--min_gap", type=float, help="scores closer than this are a tie (folder: 0) or no pair (ratings: 0.5)"
    )
    importer.add_argument("--pairs_per_prompt", type=int, help="songeval, musiceval: at most so many pairs of a prompt")
    importer.add_argument("--config", help="music-arena: a month, such as 2025_12; without it, all")
    importer.add_argument(
        "--criterion",
        help="what was asked. aime: quality, alignment; musicprefs: musicality, fidelity; cmi-pref: musicality, alignment; "
        "songeval: mean or an axis, such as memorability; musiceval: quality, alignment. Without it, the first",
    )
    importer.add_argument(
        "--audio", help="aime: folder or Hub id of the tracks, where they do not lie beside the survey"
    )
    importer.add_argument("--prompt_column", help="musicprefs: column of the prompts, where it is not called prompt")
    importer.add_argument("--prompts", type=Path, help="musiceval: the archive's prompt_info.txt, if it lies elsewhere")
    importer.set_defaults(run=_import)

    convert = commands.add_parser("convert-codec", help="weights of the encodec package to transformers' EncodecModel")
    convert.add_argument("source", help="encodec_24khz, encodec_48khz, or a safetensors file of such a state dict")
    convert.add_argument("output", type=Path, help="folder to write")
    convert.add_argument("--config", help="for a file: EncodecConfig JSON, or the name of a codec of the same shape")
    convert.set_defaults(run=_convert_codec)

    push = commands.add_parser("push", help="publish a model or a preference data set on the Hub, with its card")
    push.add_argument("path", type=Path, help="folder of a generator, adapter, reward or preference data set")
    push.add_argument("repo_id", help="organisation/name")
    push.add_argument("--private", action="store_true", help="visible to you alone")
    push.add_argument("--revision", help="branch to push to (the main one)")
    push.add_argument("--license", help="as the Hub spells it, where neither result.json nor the base model gives one")
    push.add_argument("--base_model", help="Hub id of what the model was made from, where result.json does not say")
    push.set_defaults(run=_push)

    for name, (_, _, _, summary) in JOBS.items():
        job = commands.add_parser(name, help=summary, description=summary, add_help=False)
        job.add_argument("-h", "--help", action="store_true", dest="show_fields")
        if name == "align":
            job.add_argument("--recipe", default="tiny", help="bundled recipe or YAML file")
        else:
            job.add_argument("--config", type=Path, help="flat YAML file; every field also goes as --field value")
    return parser, dict(commands.choices)


_DEVICE_HELP = "cpu, cuda, mps ... (the accelerator that there is, else the CPU)"
_REWARD_FORMS = (
    'adherence[:MODEL], quality[:MODEL], preference:MODEL or module:function, each with "weight*" before it if wanted; '
)
_REWARD_HELP = f"{_REWARD_FORMS}give --reward several times to see several"
_REWARD_SUM_HELP = f"{_REWARD_FORMS}several are added up"


def _run_job(arguments: argparse.Namespace, words: list[str]) -> None:
    module_name, config_name, function_name, summary = JOBS[arguments.command]
    module = import_module(f".{module_name}", __package__)
    config_class = getattr(module, config_name)
    source = "--recipe" if arguments.command == "align" else "--config"
    path = module.recipe_file(arguments.recipe) if arguments.command == "align" else arguments.config
    if arguments.show_fields:
        file = "tiny|paper|FILE" if arguments.command == "align" else "FILE"
        print(f"musicrl {arguments.command} [{source} {file}] [--field value ...]: {summary}\n")
        print(describe_fields(config_class, path))
        return
    result = getattr(module, function_name)(load_config(config_class, path, _fields_only(words, source)))
    if result is not None and os.environ.get("RANK", "0") == "0":  # once, however many processes there are
        print(f"Wrote {result}")
    distributed = sys.modules.get("torch.distributed")  # it was imported where there are several processes
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        import_module(".training.processes", __package__).end_processes()


def _fields_only(words: list[str], source: str) -> list[str]:
    """The words behind the command, less the configuration file, which is no field."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == source:
            skip = True
        elif not word.startswith(f"{source}="):
            kept.append(word)
    return kept


def _generate(arguments: argparse.Namespace) -> None:
    from .audio import MAX_DURATION_S, check_suffix, write_audio
    from .devices import find_device, find_dtype
    from .generator import load_generator
    from .places import find_model
    from .rewards.best_of import best_of
    from .rewards.combine import find_rewards, label_specs, move_reward
    from .sampling import check_sampling

    if not arguments.prompt.strip():
        raise ValueError(f"`prompt` is {arguments.prompt!r}: say what to play, such as 'a slow air played by a flute'.")
    if arguments.number < 1:
        raise ValueError(f"`number` must be at least 1, got {arguments.number}.")
    if arguments.best_of < 1 or (arguments.best_of > 1 and not arguments.reward):
        raise ValueError(
            f"`best_of` is {arguments.best_of}, and `reward` {arguments.reward or 'is not given'}: give a number of 1 or more, and "
            "above 1 a --reward to choose by, such as --reward quality."
        )
    if not 0 < arguments.duration <= MAX_DURATION_S:
        raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {arguments.duration!r}.")
    top_k = arguments.top_k if arguments.top_k else None
    check_sampling(arguments.temperature, top_k, arguments.guidance_scale, frames=1)
    output: Path = arguments.output or DEFAULT_CLIP
    check_suffix(output, "output")
    numbers = range(1, arguments.number + 1)
    paths = [output] if arguments.number == 1 else [output.with_stem(f"{output.stem}_{i}") for i in numbers]
    there = [str(path) for path in paths if path.exists()]
    if arguments.output is None and there:
        raise FileExistsError(
            f"`output`: {there[0]} is there already; name a file, as in -o another.wav or -o {output}."
        )
    find_model(arguments.model, "musicgen", "model")
    load_reward = find_rewards(arguments.reward) if arguments.reward else None
    device = find_device(arguments.device)
    model = load_generator(arguments.model, dtype=find_dtype(arguments.dtype), device=device)
    prompts = [arguments.prompt] * arguments.number
    options = {
        "duration_s": arguments.duration,
        "temperature": arguments.temperature,
        "top_k": top_k,
        "guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
    }
    notes = [""] * arguments.number
    if load_reward is None:
        clips = model.sample(prompts, **options, progress=True)
    else:
        reward = load_reward()
        move_reward(reward, device)
        (label,) = label_specs([" + ".join(arguments.reward)])
        clips, scores = best_of(model, prompts, arguments.best_of, reward, **options)
        notes = [f" ({label} {score:.4f}, best of {arguments.best_of})" for score in scores.tolist()]
    for path, audio, note in zip(paths, clips.audio, notes, strict=True):
        write_audio(path, audio, clips.sampling_rate)
        print(f"Wrote {path}{note}")


def _score(arguments: argparse.Namespace) -> None:
    from .rewards.scoring import score_clips

    print(score_clips(arguments.reward, arguments.prompt, arguments.clips, arguments.device))


def _import(arguments: argparse.Namespace) -> None:
    from .places import check_output
    from .preferences import importers

    name, takes = IMPORTS[arguments.kind]
    check_output(arguments.out, "votes" if arguments.kind == "battles" else "preferences", "out")
    options = {option for _, taken in IMPORTS.values() for option in taken}
    given = {option: vars(arguments)[option] for option in sorted(options) if vars(arguments)[option] is not None}
    foreign = sorted(set(given) - set(takes))
    if foreign:
        taken = ", ".join(f"--{option}" for option in takes) or "no option but --out"
        raise ValueError(f"--{foreign[0]} is {given[foreign[0]]}: `import {arguments.kind}` takes {taken}")
    if "skip_bad_clips" in takes:
        clips = {option: given.pop(option) for option in _CLIP_OPTIONS if option in given}
        given["options"] = importers.ClipOptions(**clips)
    print(f"Wrote {getattr(importers, name)(arguments.source, arguments.out, **given)}")


def _convert_codec(arguments: argparse.Namespace) -> None:
    from .codec_conversion import convert_encodec_checkpoint
    from .places import check_output

    check_output(arguments.output, "a codec", "output")
    print(f"Wrote {convert_encodec_checkpoint(arguments.source, arguments.output, arguments.config)}")


def _push(arguments: argparse.Namespace) -> None:
    from .hub import push

    address = push(
        arguments.path,
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        license=arguments.license,
        base_model=arguments.base_model,
    )
    print(f"Pushed to {address}")


if __name__ == "__main__":
    sys.exit(main())
