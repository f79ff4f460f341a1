"""Two processes, and two accumulation steps, end where one process and one step end on as many pairs or clips."""

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from test_dpo import run_two_processes
from tiny import SAMPLING_RATE, tiny_generator
from torch import Tensor

from musicrl_hf.rewards import CombinedReward
from musicrl_hf.training.dpo import MusicDPOTrainer
from musicrl_hf.training.ppo import MusicPPOTrainer
from musicrl_hf.training.reward import RewardJob, run_reward

ACCELERATE = Path(__file__).parent.parent / "examples" / "accelerate"
SHARDED = ("reward", "dpo", "rloo", "grpo")  # by FSDP
KINDS = ("reward", "dpo", "rloo", "grpo", "ppo", "paper")
BATCH = 8  # pairs or clips of an optimiser step, of all processes together
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}  # of losses and of weights that a run moves by more than MOVED
MOVED = 1e-3
# Adam makes a step of what is left of a gradient that cancels: a constant that both clips' scores are raised by.
CANCELS = ("score.bias", "generator.decoder.model.decoder.layer_norm.bias")


class KnownClips:
    """In the place of a generator's sampler: the n-th clip of a prompt in a call is the same, whoever samples it."""

    def __init__(self, num_codebooks: int, codebook_size: int):
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, frames: int, **_) -> Tensor:
        asked: Counter = Counter()
        clips = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            prompt = tuple(ids[mask].tolist())
            random = torch.Generator().manual_seed(hash((*prompt, asked[prompt])) % 2**32)
            clips.append(torch.randint(self.codebook_size, (self.num_codebooks, frames), generator=random))
            asked[prompt] += 1
        return torch.stack(clips)


def generator_of_known_clips():
    generator = tiny_generator(dropout=0.1)
    generator.sample_codes = KnownClips(generator.config.num_codebooks, generator.config.codebook_size)
    return generator


def listener() -> CombinedReward:
    """Normalised over the clips of a step, of all processes."""
    parts = {
        "loud": lambda prompts, audio, rate: audio.square().mean((1, 2)),
        "bright": lambda prompts, audio, rate: audio.diff().abs().mean((1, 2)),
    }
    return CombinedReward(parts, normalise="normalise_then_sum")


def train(
    kind: str, folder: Path, processes: int = 1, accumulation: int = 1, saves: bool = False, resume: str | None = None
) -> list[float]:
    """Four steps of `BATCH`, or what is left of them; leaves model.safetensors in the folder and gives the losses."""
    options = {
        "per_device_train_batch_size": BATCH // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
    }
    if kind == "reward":
        place = {"preferences": str(folder.parent / "preferences"), "model": str(folder.parent / "generator")}
        options |= {"test_share": 0.2, "logging_steps": 1, "learning_rate": 1e-2}
        run_reward(RewardJob(**place, output_dir=str(folder), **options))
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in log if "loss" in line]
    options |= {"optim": "sgd", "learning_rate": 0.1}
    if saves:  # with an optimiser that has a state
        options |= {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    if kind == "dpo":
        from test_dpo import config, pairs

        trainer = MusicDPOTrainer(
            tiny_generator(dropout=0.1), args=config(folder, **options), train_dataset=pairs(2 * BATCH)
        )
    elif kind in ("rloo", "grpo"):
        from test_online import TRAINERS, config, prompts

        args = config(kind, folder, num_iterations=2, **options)
        trainer = TRAINERS[kind](generator_of_known_clips(), listener(), args, prompts())
    else:
        from test_ppo import PROMPTS, config

        passes = {"paper": {"objective": "paper"}, "ppo": {"objective": "ppo", "num_ppo_epochs": 2}}[kind]
        args = config(folder, num_generations=4, **options, **passes)
        trainer = MusicPPOTrainer(generator_of_known_clips(), listener(), args, PROMPTS)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.args.world_size == processes
    trainer.save_model(str(folder))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def prepare(folder: Path) -> None:
    """What the reward is trained on: pairs and a generator."""
    from test_reward_training import rows

    from musicrl_hf.preferences.schema import preferences_from_rows, save_preferences

    save_preferences(preferences_from_rows(rows(40, SAMPLING_RATE, 0.2)), folder / "preferences")
    tiny_generator(dropout=0.1).save_pretrained(folder / "generator")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses and weights, by kind, of one process that takes each batch at once."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def of(kind: str) -> tuple[list[float], dict[str, Tensor]]:
        if kind == "reward":
            prepare(folder)
        return train(kind, folder / kind), load_file(folder / kind / "model.safetensors")

    return of


def assert_alike(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    assert len(expected[0]) == 4
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), **TOLERANCE)
    start, moved = tiny_generator().state_dict(), 0.0
    for name, tensor in expected[1].items():
        if name not in CANCELS:
            torch.testing.assert_close(
                found[1][name], tensor, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
            )
        if (before := start.get(name.removeprefix("generator."))) is not None:
            moved = max(moved, (tensor - before).abs().max().item())
    assert moved > MOVED


@pytest.mark.parametrize("kind", KINDS)
def test_two_accumulation_steps_equal_a_batch_twice_as_large(kind, whole, tmp_path):
    if kind == "reward":
        prepare(tmp_path)
    losses = train(kind, tmp_path / kind, accumulation=2)
    assert_alike((losses, load_file(tmp_path / kind / "model.safetensors")), whole(kind))


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The same from two processes, each with half of every batch."""
    folder = tmp_path_factory.mktemp("halves")
    prepare(folder)
    run_two_processes("two_processes.py", "halves", folder)
    found = json.loads((folder / "halves.json").read_text())
    assert found["world_size"] == 2
    assert (
        len(list((folder / "reward" / "clips").rglob("*.safetensors"))) > 2
    )  # each encoded a share of either side's clips
    return {kind: (found[kind], load_file(folder / kind / "model.safetensors")) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_that_has_both_halves(kind, halves, whole):
    assert_alike(halves[kind], whole(kind))


# -- examples/accelerate ---------------------------------------------------------------------------------------------------


def launch_environment(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` hands to each process."""
    command = ["--config_file", str(ACCELERATE / name), "-m", "musicrl_hf.cli", "dpo"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.name)
def test_what_accelerate_is_started_with_is_known_to_it(path):
    config = load_config_from_file(str(path))
    assert set(config.deepspeed_config) <= set(vars(launch_command_parser().parse_args(["script.py"])))
    kinds = {"cpu": "NO", "one_gpu": "NO", "several_gpus": "MULTI_GPU", "several_machines": "MULTI_GPU"}
    kinds |= {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert config.distributed_type == DistributedType(kinds[path.stem])
    assert f"examples/accelerate/{path.name}" in path.read_text() or path.stem == "cpu"


@pytest.mark.parametrize("rank", [0, 1])
def test_each_machine_starts_its_share(rank):
    """What torch's launcher is told on each of the two machines."""
    file = str(ACCELERATE / "several_machines.yaml")
    words = ["--config_file", file, "--machine_rank", str(rank), "-m", "musicrl_hf.cli", "rloo"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", rank)
    assert args.rdzv_endpoint == "10.0.0.1:29500"


def test_fsdp2_is_what_its_file_says(monkeypatch):
    monkeypatch.setattr(os, "environ", launch_environment("fsdp2.yaml"))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.transformer_cls_names_to_wrap == ["MusicgenDecoderLayer"]
    assert plugin.ignored_modules == ".*(text_encoder|audio_encoder)"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    assert type(tiny_generator().decoder.model.decoder.layers[0]).__name__ == "MusicgenDecoderLayer"


def test_zero2_is_what_its_file_says(monkeypatch):
    """As far as it goes without DeepSpeed, which is not installed here: the plugin, and no run."""
    monkeypatch.setattr(os, "environ", launch_environment("deepspeed_zero2.yaml"))
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["zero_optimization"]["offload_param"]["device"] == "none"


@pytest.mark.slow
def test_shards_of_fsdp2_equal_one_whole(whole, tmp_path):
    prepare(tmp_path)
    run_two_processes("two_processes.py", "fsdp2", tmp_path)
    found = json.loads((tmp_path / "fsdp2.json").read_text())
    assert found["world_size"] == 2
    for kind in SHARDED:
        assert_alike((found[kind], load_file(tmp_path / kind / "model.safetensors")), whole(kind))
    assert abs(found["sampled"]["kl"]) < 1e-5  # of clips that the sharded policy has drawn itself
    before, after = (load_file(tmp_path / "saved" / f"{name}.safetensors") for name in ("unbroken", "model"))
    assert found["resumed"] == found["unbroken"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # resumed to the bit
