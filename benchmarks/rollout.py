"""How many clips a second come out of a rollout, prompts to rewards, here and in the loop that one would write with stock parts?

    python benchmarks/rollout.py --batch 16 64 --duration_s 3

Here: what the PPO trainer does. Stock: `MusicgenForConditionalGeneration.generate` on the same weights, then clip after clip
the tokenizer, feature extractor and model of stock CLAP for adherence and, since transformers has no such model, this package's
`QualityModel` for quality. Both sample the policy itself: no guidance, no top-k. They take turns in one process; a ratio is of two neighbours. An
update needs the clips' codes, which `generate` keeps to itself: what it takes to encode its clips again is told apart. Both
score the same clips once, for a difference that should be none. Leaves benchmarks/results/rollout.json.
"""

import argparse
import statistics
import tempfile

import torch
from measuring import Stopwatch, add_shared_options, hardware, peak_mb, shown, spread, write_result
from torch import Tensor
from transformers import AutoProcessor, ClapModel, MusicgenForConditionalGeneration

from musicrl_hf import load_generator
from musicrl_hf.bundled import resolve
from musicrl_hf.rewards import QualityModel, load_rewards
from musicrl_hf.training.ppo import MusicPPOConfig, MusicPPOTrainer

PROMPTS = ["a slow air played by a flute", "piano, fast tempo, with a band and drums"]
REWARD = "0.5*adherence + 0.5*quality"  # what MusicRL-R is trained on
PARTS = ("sample", "decode", "score")


class StockLoop:
    """Prompts to rewards with stock classes, in the plain way: a batch is generated, then each reward hears each clip."""

    def __init__(self, model: str, duration_s: float, device: str, watch: Stopwatch):
        self.processor = AutoProcessor.from_pretrained(resolve(model))
        self.model = MusicgenForConditionalGeneration.from_pretrained(resolve(model)).to(device).eval()
        clap = resolve("musicrl-tiny-adherence")
        self.clap, self.clap_processor = (
            ClapModel.from_pretrained(clap).to(device).eval(),
            AutoProcessor.from_pretrained(clap),
        )
        self.quality = QualityModel.from_pretrained("musicrl-tiny-quality").to(device).eval()
        codec = self.model.config.audio_encoder
        self.sampling_rate, self.device = codec.sampling_rate, device
        self.steps = round(duration_s * codec.frame_rate) + self.model.config.decoder.num_codebooks - 1
        self.model.audio_encoder.decode = watch.part("decode", self.model.audio_encoder.decode)
        self.generate, self.score = watch.part("sample", self._generate), watch.part("score", self._score)
        self.encode = watch.part("encode", self._encode)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Rewards [B]."""
        audio = self.generate(prompts)
        self.encode(audio)
        return self.score(prompts, audio)

    def _generate(self, prompts: list[str]) -> Tensor:
        inputs = self.processor(text=prompts, padding=True, return_tensors="pt").to(self.device)
        return self.model.generate(**inputs, max_new_tokens=self.steps, do_sample=True, top_k=0, guidance_scale=1.0)

    def _encode(self, audio: Tensor) -> Tensor:
        return self.model.audio_encoder.encode(audio).audio_codes

    def _score(self, prompts: list[str], audio: Tensor) -> Tensor:
        return torch.stack([self._score_clip(prompt, clip) for prompt, clip in zip(prompts, audio, strict=True)])

    def _score_clip(self, prompt: str, clip: Tensor) -> Tensor:
        # Its two halves: `ClapProcessor` itself hands the text's padding and truncation to the sound, of which one frame is left.
        text = self.clap_processor.tokenizer([prompt], return_tensors="pt")
        sound = self.clap_processor.feature_extractor(
            clip[0].cpu().numpy(), sampling_rate=self.sampling_rate, return_tensors="pt"
        )
        found = self.clap(**text.to(self.device), **sound.to(self.device))
        adherence = (found.text_embeds * found.audio_embeds).sum()
        return 0.5 * adherence + 0.5 * self.quality([prompt], clip[None], self.sampling_rate)[0]


def trainer_for(model: str, batch: int, given: argparse.Namespace, folder: str, watch: Stopwatch) -> MusicPPOTrainer:
    """A PPO trainer whose rollouts are of `batch` clips; its parts are timed."""
    args = MusicPPOConfig(
        folder,
        objective="paper",
        temperature=1.0,
        duration_s=given.duration_s,
        per_device_train_batch_size=batch,
        max_steps=1,
        use_cpu=given.device == "cpu",
        disable_tqdm=True,
    )
    generator = load_generator(model, device=given.device)
    reward = load_rewards(REWARD)
    reward.rewards["adherence"].to(given.device)
    reward.rewards["quality"].to(given.device)
    trainer = MusicPPOTrainer(generator, reward, args, PROMPTS)
    generator = trainer.model.generator
    generator.sample_codes = watch.part("sample", generator.sample_codes)
    generator.decode_codes = watch.part("decode", generator.decode_codes)
    reward.components = watch.part("score", reward.components)
    return trainer


def compare(batch: int, given: argparse.Namespace) -> dict:
    """Seconds of each side and of their parts, ratios of neighbours, peaks of memory."""
    watch, prompts = Stopwatch(given.device), [PROMPTS[i % 2] for i in range(batch)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(given.model, batch, given, folder, watch)
        stock = StockLoop(given.model, given.duration_s, given.device, watch)
        torch.manual_seed(0)
        with torch.no_grad():
            audio = stock.generate(prompts)
            rewards = [stock.score(prompts, audio), trainer.reward(prompts, audio, stock.sampling_rate)]
        sides = {"musicrl_hf": lambda: trainer.rollout(prompts), "stock": lambda: stock(prompts)}
        peaks = {side: peak_mb(work, given.device) for side, work in sides.items()}
        times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(given.repeats):
            for side, work in sides.items():
                watch.clear()
                with_codes = watch.seconds(work)
                parts = {part: watch.parts[part] for part in (*PARTS, "encode")}
                if side == "stock":
                    parts["sample"] -= parts["decode"]  # `generate` decodes, too
                times[side].append({"whole": with_codes - parts["encode"], "with_codes": with_codes, **parts})
    return {
        "batch": batch,
        "scores_differ_by": (rewards[0].cpu() - rewards[1].cpu()).abs().max().item(),
        "median_s": {
            side: {part: statistics.median(run[part] for run in runs) for part in runs[0]}
            for side, runs in times.items()
        },
        **{
            f"{part}_ratio": spread([b[part] / a[part] for a, b in zip(*times.values(), strict=True)])
            for part in ("whole", "with_codes", *PARTS)
        },
        "peak_mb": peaks,
    }


def row_of(found: dict) -> dict[str, str]:
    taken, peaks = found["median_s"], found["peak_mb"]

    def both(part: str) -> str:
        return ", ".join(f"{side[part]:.2f}" for side in taken.values())

    return {
        "clips": str(found["batch"]),
        "clips a second, here and stock": ", ".join(f"{found['batch'] / side['whole']:.1f}" for side in taken.values()),
        "times faster": shown(found["whole_ratio"]),
        "with codes to learn from": shown(found["with_codes_ratio"]),
        **{f"s to {part}": both(part) for part in PARTS},
        "peak MB": ", ".join("" if mb is None else f"{mb:.0f}" for mb in peaks.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Rollouts, prompts to rewards, against a loop of stock parts.")
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--duration_s", type=float, default=3.0)
    parser.add_argument("--tiny", action="store_true", help="two clips of .1 s: to see that it runs")
    add_shared_options(parser)
    given = parser.parse_args()
    if given.tiny:
        given.batch, given.duration_s, given.repeats = [2], 0.1, 2

    torch.set_num_threads(given.threads)
    where, measured = hardware(given.device), []
    for batch in given.batch:
        measured.append(compare(batch, given))
        print(row_of(measured[-1]), flush=True)
    what = (
        f"Rollouts of {given.duration_s:g} s a clip from `{given.model}`, prompts to rewards ({REWARD}); of two numbers the "
        "first is musicrl_hf's, the second that of `generate` and stock CLAP, clip after clip. `generate` keeps its codes to "
        "itself: to learn from them, clips are encoded again"
    )
    write_result(given.results, "rollout", what, where, [row_of(found) for found in measured], measured, given.device)


if __name__ == "__main__":
    main()
