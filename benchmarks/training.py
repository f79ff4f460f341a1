"""How many DPO steps a second, and in how much memory, here and with stock TRL on one vocabulary of K * V?

    python benchmarks/training.py --batch 4 --duration_s 3 10
    python benchmarks/training.py --device cuda --size small --bf16 --batch 8 --duration_s 10

All train on the same pairs of cached codes, all weights, the reference's log-probabilities computed beforehand. Here:
`MusicDPOTrainer`, whose model scores the K codes of a decoder step with K heads. Stock: `trl.DPOTrainer` with its own fused head over
K * V ids at each of the flat positions, on two models: "head" is the same generator (tests/kv_variant.py), so that what differs is
the head alone and the losses are the same; "lm" is what one would write first, a causal LM of the decoder's layers and width
(OPT, without attention to a text encoder) whose sequence is the text and then all K * F codes. Nobody checkpoints activations.
They take turns in one process; a ratio is of two neighbours. Peaks of memory are of a process of their own each, on top of what it held before it trained: imports, weights and
pairs. Leaves benchmarks/results/training.json.
"""

import argparse
import copy
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from measuring import Stopwatch, add_shared_options, hardware, peak_mb, shown, spread, write_result
from sampling import SIZES
from transformers import MusicgenDecoderConfig, OPTConfig, OPTForCausalLM, PrinterCallback, TrainerCallback
from trl import DPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from kv_variant import KVVariant

from musicrl_hf import MusicRLConfig, MusicRLForConditionalGeneration, load_generator
from musicrl_hf.flat import FlatTokenizer
from musicrl_hf.training.dpo import MusicDPOConfig, MusicDPOTrainer, flat_pairs

PROMPTS = ["a slow air played by a flute", "piano, fast tempo, with a band and drums"]
SIDES = {
    "musicrl_hf": "musicrl_hf",
    "head": "TRL's head over K * V ids on the same decoder",
    "lm": "a causal LM over K * F ids",
}


class StockDPOTrainer(DPOTrainer):
    """Stock but for its tokenisation of text, for the rows are ids already, and its ping."""

    def _prepare_dataset(self, dataset: Dataset, *args: object) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        pass


class StepClock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self, device: str):
        self.watch = Stopwatch(device)
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self.watch.now())


def trainer_of(side: str, batch: int, duration_s: float, given: argparse.Namespace, folder: str) -> DPOTrainer:
    """A trainer of either side for `given.steps` steps, on pairs of random codes; the first step is for warming up."""
    generator = generator_of(given)
    config, frames = generator.config, generator.frames_for(duration_s)
    random = torch.Generator().manual_seed(0)

    def clips() -> list:
        shape = (config.num_codebooks, frames)
        return [torch.randint(config.codebook_size, shape, generator=random).tolist() for _ in range(batch)]

    pairs = {"prompt": [PROMPTS[i % 2] for i in range(batch)], "chosen_codes": clips(), "rejected_codes": clips()}
    args = MusicDPOConfig(
        f"{folder}/{side}",
        max_steps=given.steps + 1,
        per_device_train_batch_size=batch,
        precompute_ref_log_probs=True,
        activation_checkpointing=False,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        bf16=given.bf16,
        use_cpu=given.device == "cpu",
    )
    callbacks = [StepClock(given.device)]
    if side == "musicrl_hf":
        return MusicDPOTrainer(generator, args=args, train_dataset=Dataset.from_dict(pairs), callbacks=callbacks)
    tokenizer = FlatTokenizer.for_generator(generator)
    if side == "head":
        policy = KVVariant.from_generator(generator)
        policy.disable_dropout()
        policy.freeze_codec()
        policy.text_encoder.requires_grad_(False)
    else:
        with torch.device(given.device):
            policy = language_model(config.decoder, len(tokenizer), config.num_codebooks * frames)
    return StockDPOTrainer(
        policy,
        args=args,
        train_dataset=flat_pairs(Dataset.from_dict(pairs), tokenizer, config, Path(folder) / "pairs.arrow"),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def generator_of(given: argparse.Namespace) -> MusicRLForConditionalGeneration:
    """The model; with `given.size`, its text encoder and codec around a decoder of that size with random weights."""
    generator = load_generator(given.model, device=given.device)
    if given.size is None:
        return generator
    layers, hidden, heads, ffn = SIZES[given.size]
    decoder = copy.deepcopy(generator.config.decoder)
    decoder.update({"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_dim": ffn})
    parts = {"text_encoder": generator.config.text_encoder, "audio_encoder": generator.config.audio_encoder}
    torch.manual_seed(0)
    with torch.device(given.device):  # a GPU draws 420M weights in no time
        sized = MusicRLForConditionalGeneration(MusicRLConfig(**parts, decoder=decoder))
    sized.restore_audio_token_ids()
    sized.tokenizer = generator.tokenizer
    return sized.to(given.device)


def language_model(decoder: MusicgenDecoderConfig, ids: int, positions: int) -> OPTForCausalLM:
    """A causal LM of a decoder's layers, width, heads and feed-forward width, with random weights."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=ids,
            hidden_size=decoder.hidden_size,
            word_embed_proj_dim=decoder.hidden_size,
            num_hidden_layers=decoder.num_hidden_layers,
            num_attention_heads=decoder.num_attention_heads,
            ffn_dim=decoder.ffn_dim,
            max_position_embeddings=positions + 64,
            dropout=0.0,
        )
    )


def seconds_a_step(trainer: DPOTrainer) -> float:
    """Of one more training of a few steps, without what comes before the end of its first."""
    clock = next(part for part in trainer.callback_handler.callbacks if isinstance(part, StepClock))
    trainer.pop_callback(PrinterCallback)
    clock.ends.clear()
    trainer.train()
    return (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1)


def losses(trainer: DPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def compare(batch: int, duration_s: float, given: argparse.Namespace) -> list[dict]:
    """Seconds a step of each side, ratios of neighbours, peaks of memory: against each of the stock models."""
    sides = ["musicrl_hf", *given.against]
    peaks = {side: peak_of_its_own(side, batch, duration_s, given) for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {side: trainer_of(side, batch, duration_s, given, folder) for side in sides}
        taken: dict[str, list[float]] = {side: [] for side in sides}
        logged = {}
        for _ in range(given.repeats):
            for side, trainer in trainers.items():
                taken[side].append(seconds_a_step(trainer))
                logged.setdefault(side, losses(trainer))
    ours, mb = taken["musicrl_hf"], peaks["musicrl_hf"]
    return [
        {
            "against": other,
            "duration_s": duration_s,
            "batch": batch,
            "losses": [logged["musicrl_hf"], logged[other]],
            "median_s": {side: statistics.median(taken[side]) for side in ("musicrl_hf", other)},
            "ratio": spread([b / a for a, b in zip(ours, taken[other], strict=True)]),
            "peak_mb": {"musicrl_hf": mb, other: peaks[other]},
            "memory_ratio": mb / peaks[other] if mb and peaks[other] else None,
        }
        for other in given.against
    ]


def peak_of_its_own(side: str, batch: int, duration_s: float, given: argparse.Namespace) -> float | None:
    """The peak of training in a new process, which nothing else has stretched."""
    options = {
        "peak_of": side,
        "batch": batch,
        "duration_s": duration_s,
        **{name: vars(given)[name] for name in ("model", "threads", "device")},
        **({"size": given.size} if given.size else {}),
    }
    command = [
        sys.executable,
        __file__,
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]
    command += ["--bf16"] * given.bf16
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # what it complains of is seen here
    said = done.stdout.splitlines()[-1]
    return None if said == "None" else float(said)


def row_of(found: dict) -> dict[str, str]:
    peaks, ratio = found["peak_mb"], found["memory_ratio"]
    return {
        "against": SIDES[found["against"]],
        "clips": f"{found['duration_s']:g} s",
        "pairs a step": str(found["batch"]),
        "steps a second, here and stock": ", ".join(f"{1 / seconds:.2f}" for seconds in found["median_s"].values()),
        "times faster": shown(found["ratio"]),
        "peak MB, here and stock": ", ".join("" if mb is None else f"{mb:.0f}" for mb in peaks.values()),
        "share of the memory": "" if ratio is None else f"**{ratio:.2f}**",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO on cached codes against stock TRL on a K * V vocabulary.")
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--size", choices=SIZES, help="a decoder of this size, random weights, in place of the model's")
    parser.add_argument("--bf16", action="store_true", help="autocast on both sides")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="pairs a step")
    parser.add_argument("--duration_s", type=float, nargs="+", default=[3.0, 10.0])
    parser.add_argument("--against", nargs="+", choices=list(SIDES)[1:], default=list(SIDES)[1:])
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn, behind one that is not")
    parser.add_argument("--tiny", action="store_true", help="one pair of .2 s clips: to see that it runs")
    parser.add_argument(
        "--peak_of", choices=list(SIDES), help="train this side alone and print its peak of memory in MB"
    )
    add_shared_options(parser)
    given = parser.parse_args()
    if given.tiny:
        given.batch, given.duration_s, given.steps, given.repeats = [1], [0.2], 1, 2

    torch.set_num_threads(given.threads)
    if given.peak_of:
        with tempfile.TemporaryDirectory() as folder:
            print(
                peak_mb(
                    trainer_of(given.peak_of, given.batch[0], given.duration_s[0], given, folder).train, given.device
                )
            )
        return
    where, measured = hardware(given.device), []
    for batch, duration_s in itertools.product(given.batch, given.duration_s):
        found = compare(batch, duration_s, given)
        print(*map(row_of, found), sep="\n", flush=True)
        measured += found
    model = f"a decoder of musicgen-{given.size}'s size (random weights)" if given.size else f"`{given.model}`"
    what = (
        f"DPO of all weights of {model} ({'bfloat16 autocast' if given.bf16 else 'float32'}) on cached codes, the "
        "reference precomputed, against stock `trl.DPOTrainer`; peaks of memory are on top of weights and pairs"
    )
    name = "_".join(["training", *([given.size] if given.size else []), *(["bf16"] if given.bf16 else [])])
    write_result(given.results, name, what, where, [*map(row_of, measured)], measured, given.device)


if __name__ == "__main__":
    main()
