"""What each of two processes runs in the tests of distributed training: `two_processes.py {dpo,rloo,grpo,halves,fsdp2} FOLDER`."""

import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401 (sets the offline environment)
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny import tiny_generator

from musicrl_hf.training.checkpoints import find_checkpoint
from musicrl_hf.training.processes import end_processes


def run_dpo(folder: Path) -> dict:
    from test_dpo import config, losses, pairs

    from musicrl_hf.training.dpo import MusicDPOTrainer

    options = {"gradient_checkpointing": True, "precompute_ref_log_probs": True}
    trainer = MusicDPOTrainer(tiny_generator(dropout=0.1), args=config(folder, **options), train_dataset=pairs())
    trainer.train()
    trainer.save_model()
    return {"losses": losses(trainer)}


def run_online(kind: str, folder: Path, evaluates: bool = True) -> dict:
    from test_online import TRAINERS, config, loudness, prompts

    heard = []

    def reward(texts, audio, sampling_rate):
        heard.append(audio.mean().item())
        return loudness(texts, audio, sampling_rate)

    chunks = {"local_rollout_forward_batch_size": 2, "score_in_background": True, "per_device_eval_batch_size": 2}
    args = config(kind, folder, **chunks)
    held_out = prompts(3) if evaluates else None
    trainer = TRAINERS[kind](tiny_generator(dropout=0.1), reward, args, prompts(), eval_dataset=held_out)
    evaluated = trainer.evaluate() if evaluates else {}
    heard.clear()
    trainer.train()
    trainer.save_model()
    sums = [parameter.detach().double().sum() for parameter in trainer.generator.decoder.parameters()]
    kl = next(line["kl"] for line in trainer.state.log_history if "kl" in line)
    return {"heard": heard, "kl": kl, "weights": torch.stack(sums).sum().item(), "evaluated": evaluated}


def run_halves(folder: Path) -> dict:
    from test_processes import KINDS, train

    return {kind: train(kind, folder / kind, processes=2) for kind in KINDS}


def run_fsdp2(folder: Path) -> dict:
    """Under the settings of examples/accelerate/fsdp2.yaml. Accelerate shards only beside GPUs: it is told that there are some."""
    from test_processes import SHARDED, launch_environment, train

    init = AcceleratorState.__init__

    def beside_gpus(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = beside_gpus
    os.environ |= launch_environment("fsdp2.yaml")
    found = {}
    for kind in SHARDED:
        found[kind] = train(kind, folder / kind, processes=2)
        assert PartialState().distributed_type == DistributedType.FSDP
    saved = folder / "saved"
    found["unbroken"] = train("dpo", saved, processes=2, saves=True)
    if PartialState().is_main_process:
        (saved / "model.safetensors").rename(saved / "unbroken.safetensors")
    PartialState().wait_for_everyone()
    found["resumed"] = train(
        "dpo", saved, processes=2, saves=True, resume=find_checkpoint(str(saved / "checkpoint-2"), str(saved))
    )
    return found | {"sampled": run_online("rloo", folder / "sampled", evaluates=False)}


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    state = PartialState()
    whole_runs = {"dpo": run_dpo, "halves": run_halves, "fsdp2": run_fsdp2}  # the first process tells for both
    found = whole_runs[kind](folder) if kind in whole_runs else run_online(kind, folder)
    found["world_size"] = state.num_processes
    suffix = "" if kind in whole_runs and state.is_main_process else f".{state.process_index}"
    (folder / f"{kind}{suffix}.json").write_text(json.dumps(found))
    end_processes()
