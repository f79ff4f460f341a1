"""How much faster are codes sampled here than by transformers' own `generate`, on the same weights and prompts?

    python benchmarks/sampling.py --model musicrl-tiny --batch 1 16 64
    python benchmarks/sampling.py --size small --batch 1 4 16 64 --steps 20

Both sides take turns in one process; a ratio is of two neighbours. The first command takes whole clips: codes, and sound from
them; and beside them the matrix products alone that the codes cannot be had without, as fast as they are had here: how many
times faster than `generate` a sampler of these weights could be if all else took no time. The second takes decoder steps of musicgen-small's size with random weights, beside the time that it takes to read the
decoder's weights once: what a step cannot go below. Both leave a file in benchmarks/results; benchmarks/table.py shows them.
"""

import argparse
import statistics
from collections import defaultdict

import torch
from measuring import Stopwatch, add_shared_options, hardware, peak_mb, shown, spread, write_result
from torch import Tensor
from transformers import EncodecConfig, MusicgenDecoderConfig, MusicgenForConditionalGeneration, T5Config

from musicrl_hf import MusicRLForConditionalGeneration, load_generator
from musicrl_hf.bundled import resolve
from musicrl_hf.configuration import MusicRLConfig
from musicrl_hf.step_decoder import StepDecoder

PROMPTS = ["a slow air played by a flute", "piano, fast tempo, with a band and drums"]
LISTENING = {"do_sample": True, "top_k": 250}  # MusicGen's own settings
GREEDY = {"do_sample": False}
SIZES = {"small": (24, 1024, 16, 4096)}  # decoder layers, width, heads, ffn of facebook/musicgen-*


class Stock:
    """transformers' own `generate`, which keeps its codes to itself: they are caught on their way to the codec."""

    def __init__(self, model: MusicgenForConditionalGeneration, watch: Stopwatch):
        self.model = model
        self.codes: Tensor | None = None
        self.watch = watch
        self._decode = watch.part("decode", model.audio_encoder.decode)
        model.audio_encoder.decode = self._caught

    def _caught(self, audio_codes: Tensor, **options):
        self.watch.clear()
        self.codes = audio_codes[0]
        return self._decode(audio_codes, **options)

    @property
    def decoding_s(self) -> float:
        """Seconds of the last call that the codec took."""
        return self.watch.parts["decode"]

    def generate(self, ids: Tensor, mask: Tensor, steps: int, guidance_scale: float, how: dict) -> Tensor:
        return self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=steps, guidance_scale=guidance_scale, **how
        )


def products(decoder: StepDecoder, clips: int, steps: int) -> None:
    """The matrix products of so many steps, of numbers that mean nothing: linear layers, and attention's two, without its softmax."""
    states = decoder.table.new_zeros(2 * clips, decoder.table.shape[1])
    inner = decoder.layers[0].inner(states)

    def attend(rows: int, keys: Tensor, values: Tensor) -> None:
        query = states[:rows].view(-1, 1, keys.shape[-1])
        torch.bmm(torch.bmm(query, keys.flatten(0, 1).mT), values.flatten(0, 1))

    for step in range(steps):
        rows = clips  # a clip without text is the same clip until the first text is heard
        for layer in decoder.layers:
            layer.query_key_value(states[:rows])
            attend(rows, layer.keys[:, :, : step + 1], layer.values[:, :, : step + 1])
            layer.out(states[:rows])
            layer.text_query(states[:clips])
            attend(clips, layer.text_keys, layer.text_values)
            layer.text_out(states[:clips])
            rows = clips if decoder.guidance_scale == 1 else 2 * clips
            layer.inner(states[:rows])
            layer.outer(inner[:rows])
        decoder.heads(states[:clips])


def compare_clips(ours, stock: Stock, batch: int, scale: float, how: dict, given: argparse.Namespace) -> dict:
    """Whole clips: seconds of each side, ratios of neighbours, and peaks of memory."""
    seconds = stock.watch.seconds
    ids, mask = ours.text_inputs([PROMPTS[i % 2] for i in range(batch)])
    frames = ours.frames_for(given.duration_s)
    steps = frames + ours.config.num_codebooks - 1
    codes = ours.sample_codes(ids, mask, frames, guidance_scale=scale, **how)
    peaks = {
        "musicrl_hf": peak_mb(
            lambda: ours.decode_codes(ours.sample_codes(ids, mask, frames, guidance_scale=scale, **how)), given.device
        ),
        "transformers": peak_mb(lambda: stock.generate(ids, mask, steps, scale, how), given.device),
    }
    result: dict = {"batch": batch, "guidance_scale": scale, "greedy": how is GREEDY, "peak_mb": peaks}
    if how is GREEDY:
        result["same_codes"] = torch.equal(codes, stock.codes)
    times: dict[str, list[float]] = defaultdict(list)
    decoder = None
    if given.device == "cpu":  # a GPU is waited for between products, if they are not recorded
        decoder = StepDecoder(ours.decoder, ours.encode_text(ids, mask), mask, steps, scale)
    for _ in range(given.repeats):
        drawing = seconds(lambda: ours.sample_codes(ids, mask, frames, guidance_scale=scale, **how))
        decoding = seconds(lambda: ours.decode_codes(codes))
        there = seconds(lambda: stock.generate(ids, mask, steps, scale, how))
        found = {"codes": drawing, "sound": drawing + decoding}
        if decoder is not None:
            found["products"] = seconds(lambda: products(decoder, batch, steps))
        found |= {"stock_codes": there - stock.decoding_s, "stock_sound": there}
        for name, value in found.items():
            times[name].append(value)
    result["median_s"] = {name: statistics.median(values) for name, values in times.items()}
    for kind in ("codes", "sound"):
        result[f"{kind}_ratio"] = spread([b / a for a, b in zip(times[kind], times[f"stock_{kind}"], strict=True)])
    if "products" in times:
        result["bound"] = spread([b / a for a, b in zip(times["products"], times["stock_codes"], strict=True)])
    return result


def clips_row(row: dict) -> dict[str, str]:
    taken, peaks = row["median_s"], row["peak_mb"]
    return {
        "clips": str(row["batch"]),
        "guidance": f"{row['guidance_scale']:g}",
        "codes": ("greedy, the same" if row["same_codes"] else "greedy, OTHERS") if row["greedy"] else "top-k 250",
        "s for codes, here and stock": f"{taken['codes']:.2f}, {taken['stock_codes']:.2f}",
        "codes, times faster": shown(row["codes_ratio"]),
        **({"were they products alone": shown(row["bound"])} if "bound" in row else {}),
        "with sound, times faster": shown(row["sound_ratio"]),
        "peak MB, here and stock": ", ".join("" if mb is None else f"{mb:.0f}" for mb in peaks.values()),
    }


def random_generator(
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    num_codebooks: int = 4,
    codebook_size: int = 2048,
    device: str = "cpu",
) -> MusicRLForConditionalGeneration:
    """A decoder of a size with random weights; a text encoder and a codec that take no time."""
    bits = (codebook_size - 1).bit_length()
    config = MusicRLConfig(
        text_encoder=T5Config(vocab_size=32, d_model=768, d_kv=64, d_ff=64, num_layers=1, num_heads=2, use_cache=False),
        audio_encoder=EncodecConfig(
            target_bandwidths=[num_codebooks * bits * 50 / 1000],
            sampling_rate=32000,
            num_filters=4,
            upsampling_ratios=[8, 5, 4, 4],
            codebook_size=codebook_size,
        ),
        decoder=MusicgenDecoderConfig(
            vocab_size=codebook_size,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            ffn_dim=ffn,
            num_codebooks=num_codebooks,
            pad_token_id=codebook_size,
            bos_token_id=codebook_size,
        ),
    )
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws 420M weights in no time
        model = MusicRLForConditionalGeneration(config).eval()
    model.restore_audio_token_ids()
    return model


def same_weights(ours: MusicRLForConditionalGeneration) -> MusicgenForConditionalGeneration:
    """The stock class around the very same tensors."""
    with ours.device:
        stock = MusicgenForConditionalGeneration(ours.config).to(ours.dtype).to(ours.device).eval()
    stock.load_state_dict(ours.state_dict(), assign=True)
    stock.generation_config = ours.generation_config
    return stock


def compare_steps(ours, stock: Stock, batch: int, scale: float, given: argparse.Namespace) -> dict:
    """One decoder step of so many clips: what `steps` cost more than a quarter of them, so that nobody's preparation counts."""
    seconds = stock.watch.seconds
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 1]], device=given.device).repeat(batch, 1)
    mask = torch.ones_like(ids)
    few, many = given.steps // 4, given.steps
    delay = ours.config.num_codebooks - 1
    weights = [  # that a step has to read: of the embeddings only K rows, of the text nothing anew
        weight
        for name, weight in ours.decoder.named_parameters()
        if weight.dim() == 2
        and not any(part in name for part in ("embed", "encoder_attn.k_proj", "encoder_attn.v_proj"))
    ]
    weights_mb = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    if stock.watch.on_gpu:  # in one kernel: to launch one for each weight takes longer than to read them
        weights = [torch.cat([weight.detach().flatten() for weight in weights])]
    times: dict[str, list[float]] = {"step": [], "stock_step": [], "floor": []}
    preparing = []

    def read() -> None:
        for _ in range(many - few):
            for weight in weights:
                weight.sum()

    def here(steps: int) -> float:
        return seconds(lambda: ours.sample_codes(ids, mask, steps - delay, guidance_scale=scale, **GREEDY))

    def there(steps: int) -> float:
        return seconds(lambda: stock.generate(ids, mask, steps, scale, GREEDY)) - stock.decoding_s

    peaks = {
        "musicrl_hf": peak_mb(lambda: here(few), given.device),
        "transformers": peak_mb(lambda: there(few), given.device),
    }
    often = 10 if stock.watch.on_gpu else 1  # recorded steps are over before they can be told from what recording took
    if stock.watch.on_gpu:  # a first call of a length takes memory for itself and loads kernels
        here(often * many)
        there(many)
        read()
    for _ in range(given.repeats):
        # As many reads as steps: what else runs interrupts both.
        times["floor"].append(seconds(read) / (many - few))
        short = here(often * few)
        times["step"].append((here(often * many) - short) / (often * (many - few)))
        preparing.append(short - often * few * times["step"][-1])
        times["stock_step"].append((there(many) - there(few)) / (many - few))
    return {
        "batch": batch,
        "guidance_scale": scale,
        "weights_mb": weights_mb,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "preparing_s": statistics.median(preparing),
        "ratio": spread([b / a for a, b in zip(times["step"], times["stock_step"], strict=True)]),
        "to_floor": spread([a / b for a, b in zip(times["step"], times["floor"], strict=True)]),
        "peak_mb": peaks,
    }


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2g}"


def steps_row(row: dict) -> dict[str, str]:
    taken, peaks = row["median_s"], row["peak_mb"]
    return {
        "clips": str(row["batch"]),
        "guidance": f"{row['guidance_scale']:g}",
        "ms a step, here and stock": ", ".join(map(_ms, (taken["step"], taken["stock_step"]))),
        "times faster": shown(row["ratio"]),
        f"ms to read {row['weights_mb']:.0f} MB once": _ms(taken["floor"]),
        "step / that": shown(row["to_floor"]),
        "s to prepare, once a call": f"{row['preparing_s']:.1f}",
        "peak MB, here and stock": ", ".join("" if mb is None else f"{mb:.0f}" for mb in peaks.values()),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Sampling against transformers' own generate.")
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--duration_s", type=float, default=3.0)
    parser.add_argument(
        "--size", choices=SIZES, help="decoder steps of this size, random weights, in the place of a model"
    )
    parser.add_argument("--steps", type=int, default=20, help="decoder steps, with --size")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    add_shared_options(parser)
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    where, dtype = hardware(given.device), getattr(torch, given.dtype)
    suffix = "" if given.dtype == "float32" else f"_{given.dtype}"
    if given.size:
        ours = random_generator(*SIZES[given.size], device=given.device).to(given.device, dtype)
        stock = Stock(same_weights(ours), Stopwatch(given.device))
        measured = []
        for batch in given.batch:
            for scale in given.guidance_scale:
                measured.append(compare_steps(ours, stock, batch, scale, given))
                print(steps_row(measured[-1]), flush=True)
        rows = [steps_row(row) for row in measured]
        clips = " to ".join(str(batch) for batch in dict.fromkeys((min(given.batch), max(given.batch))))
        what = f"Decoder steps of musicgen-{given.size}'s size (random weights, {given.dtype}) for batches of {clips}"
        write_result(given.results, f"sampling_{given.size}{suffix}", what, where, rows, measured, given.device)
    else:
        ours = load_generator(given.model, dtype=dtype, device=given.device)
        model = MusicgenForConditionalGeneration.from_pretrained(resolve(given.model), dtype=dtype)
        model = model.to(given.device).eval()
        model.audio_encoder.float()  # as ours: in half precision a codec hisses
        stock, measured = Stock(model, Stopwatch(given.device)), []
        for batch in given.batch:
            for scale in given.guidance_scale:
                for how in (GREEDY, LISTENING):
                    measured.append(compare_clips(ours, stock, batch, scale, how, given))
                    print(clips_row(measured[-1]), flush=True)
        rows = [clips_row(row) for row in measured]
        what = f"Clips of {given.duration_s:g} s from `{given.model}` ({given.dtype})"
        write_result(given.results, f"sampling{suffix}", what, where, rows, measured, given.device)


if __name__ == "__main__":
    main()
