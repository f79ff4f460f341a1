"""What each of two processes runs in the tests of distributed training: `two_processes.py {dpo,rloo,grpo} FOLDER`."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401 (sets the offline environment)
import torch
from accelerate import PartialState
from tiny import tiny_generator


def run_dpo(folder: Path) -> dict:
    from test_dpo import config, losses, pairs

    from musicrl_hf.training.dpo import MusicDPOTrainer

    options = {"gradient_checkpointing": True, "precompute_ref_log_probs": True}
    trainer = MusicDPOTrainer(tiny_generator(dropout=0.1), args=config(folder, **options), train_dataset=pairs())
    trainer.train()
    trainer.save_model()
    return {"losses": losses(trainer)}


def run_online(kind: str, folder: Path) -> dict:
    from test_online import TRAINERS, config, loudness, prompts

    heard = []

    def reward(texts, audio, sampling_rate):
        heard.append(audio.mean().item())
        return loudness(texts, audio, sampling_rate)

    trainer = TRAINERS[kind](tiny_generator(dropout=0.1), reward, config(kind, folder), prompts())
    trainer.train()
    trainer.save_model()
    sums = [parameter.detach().double().sum() for parameter in trainer.generator.decoder.parameters()]
    return {"heard": heard, "kl": trainer.state.log_history[0]["kl"], "weights": torch.stack(sums).sum().item()}


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    state = PartialState()
    found = run_dpo(folder) if kind == "dpo" else run_online(kind, folder)
    found["world_size"] = state.num_processes
    suffix = "" if kind == "dpo" and state.is_main_process else f".{state.process_index}"
    (folder / f"{kind}{suffix}.json").write_text(json.dumps(found))
    state.destroy_process_group()
