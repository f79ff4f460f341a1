"""The generator seen as one causal language model, for trainers that know one stream of tokens.

One vocabulary: audio id = k * V + code for codebook k, then text id = K * V + id, so that T5's pad 0 and eos 1 are no
codes. A clip is exactly K * F audio ids in the order of the delayed steps (s = f + delay of k), pads left out: step 0
holds codebook 0, step 1 codebooks 0 and 1, and so on. Frame-major order would not be causal.

Inside, everything stays [B, K, S]: S decoder steps and K heads of V, never a sequence of K * F over a vocabulary of K * V.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import FusedCausalLMOutput

from .delay import codebook_delays, delay_codes, delay_mask, num_steps, undelay_codes
from .generator import MusicRLConfig, MusicRLForConditionalGeneration
from .likelihood import Statistic


def flatten_codes(codes: Tensor, codebook_size: int, audio_channels: int = 1) -> Tensor:
    """Codes [B, K, F] to audio ids [B, K * F].

    Raises:
        ValueError: not three dimensions, or a code outside [0, codebook_size).

    Example:
        >>> flatten_codes(torch.tensor([[[0, 1], [2, 3]]]), codebook_size=10)  # steps: [0], [1, 2], [3]
        tensor([[ 0,  1, 12, 13]])
    """
    if codes.dim() != 3 or codes.numel() == 0:
        raise ValueError(f"`codes` must be [B, K, F] with at least one frame, got shape {tuple(codes.shape)}.")
    if int(codes.min()) < 0 or int(codes.max()) >= codebook_size:
        raise ValueError(
            f"`codes` must lie in [0, {codebook_size}), got {int(codes.min())} to {int(codes.max())}; encode the clips "
            "with the generator's own codec."
        )
    num_codebooks, frames = codes.shape[1:]
    codes = codes + codebook_size * torch.arange(num_codebooks, device=codes.device)[:, None]
    delayed = delay_codes(codes, -1, audio_channels)
    mask = delay_mask(frames, num_codebooks, audio_channels, codes.device)
    return delayed.transpose(1, 2)[:, mask.T]


def unflatten_codes(flat: Tensor, num_codebooks: int, codebook_size: int, audio_channels: int = 1) -> Tensor:
    """Audio ids [B, K * F] back to codes [B, K, F].

    Raises:
        ValueError: a length that is no multiple of K, or ids whose codebooks are not in the order of the delayed steps.
    """
    if flat.dim() != 2 or flat.shape[1] == 0 or flat.shape[1] % num_codebooks:
        raise ValueError(
            f"`flat` must be [B, K * F] with K = {num_codebooks}, got shape {tuple(flat.shape)}: the sequence was "
            f"truncated, or comes from a generator with another number of codebooks; ask for {num_codebooks} * frames ids."
        )
    frames = flat.shape[1] // num_codebooks
    mask = delay_mask(frames, num_codebooks, audio_channels, flat.device)
    delayed = flat.new_full((len(flat), *mask.T.shape), -1)
    delayed[:, mask.T] = flat
    codes = undelay_codes(delayed.transpose(1, 2), audio_channels)
    _check_codebooks(codes // codebook_size, torch.arange(num_codebooks, device=flat.device)[:, None], "flat")
    return codes % codebook_size


def _check_codebooks(found: Tensor, expected: Tensor, name: str) -> None:
    wrong = found != expected
    if wrong.any():
        raise ValueError(
            f"`{name}` has an id of codebook {int(found[wrong][0])} where codebook "
            f"{int(expected.expand_as(found)[wrong][0])} is due: it was truncated, is not in the order of the delayed "
            "steps, or comes from a generator with other codebooks; make it with `flatten_codes`."
        )


@dataclass
class FlatBatch:
    """A batch of flat sequences taken apart.

    Attributes:
        text_ids, text_mask: [B, P], the prompt in the text encoder's own ids, padded on the right.
        codes: [B, K, F]; clips shorter than F end in `pad_code`.
        is_audio: bool [B, L], the flat columns that hold a code.
        is_code: bool [B, K, S], the places of the delay pattern that hold a code; as many a row as in `is_audio`.
    """

    text_ids: Tensor
    text_mask: Tensor
    codes: Tensor
    is_audio: Tensor
    is_code: Tensor

    def to_flat(self, values: Tensor) -> Tensor:
        """One value a code [B, K, S] to flat columns [B, L], 0 elsewhere."""
        picked = values.transpose(1, 2)[self.is_code.transpose(1, 2)]
        return values.new_zeros(self.is_audio.shape).masked_scatter(self.is_audio, picked)


def split_flat(input_ids: Tensor, attention_mask: Tensor | None, config: MusicRLConfig) -> FlatBatch:
    """Take flat sequences [B, L] (a prompt, then a clip, padded on either side) apart.

    Raises:
        ValueError: no prompt, no clip, a clip that is not whole, or codebooks out of order.
    """
    num_codebooks, size, pad = config.num_codebooks, config.codebook_size, config.pad_code
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_audio = kept & (input_ids < num_codebooks * size)
    lengths = is_audio.sum(1)
    if (lengths == 0).any() or (lengths % num_codebooks).any():
        raise ValueError(
            f"`input_ids` holds clips of {lengths.tolist()} ids, and a whole clip is a positive multiple of "
            f"{num_codebooks} codebooks: the sequence was truncated; leave `max_length` None, and set "
            "`max_completion_length` to codebooks * frames."
        )
    text_ids, text_mask = _split_text(input_ids, kept & ~is_audio, num_codebooks * size)
    frames = lengths // num_codebooks
    delays = torch.tensor(codebook_delays(num_codebooks, config.audio_channels), device=input_ids.device)
    steps = num_steps(int(frames.max()), num_codebooks, config.audio_channels)
    age = torch.arange(steps, device=input_ids.device) - delays[:, None]  # [K, S]: the frame that codebook k writes
    is_code = (age >= 0) & (age < frames[:, None, None])

    delayed = input_ids.new_full((len(input_ids), steps, num_codebooks), pad)
    audio_ids = input_ids[is_audio]
    due = torch.arange(num_codebooks, device=input_ids.device).expand_as(delayed)[is_code.transpose(1, 2)]
    _check_codebooks(audio_ids // size, due, "input_ids")
    delayed[is_code.transpose(1, 2)] = audio_ids % size
    codes = undelay_codes(delayed.transpose(1, 2), config.audio_channels)
    return FlatBatch(text_ids, text_mask, codes, is_audio, is_code)


def _split_text(input_ids: Tensor, is_text: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The prompts' ids [B, P] and mask, moved to the left edge; id 0 at padding."""
    lengths = is_text.sum(1)
    if (lengths == 0).any():
        raise ValueError("`input_ids` holds a sequence without a prompt; put the prompt's ids before the clip's.")
    mask = torch.arange(int(lengths.max()), device=input_ids.device) < lengths[:, None]
    text_ids = torch.zeros_like(mask, dtype=input_ids.dtype)
    text_ids[mask] = input_ids[is_text] - offset
    return text_ids, mask.to(input_ids.dtype)


def check_sampled_is_scored(config: GenerationConfig) -> None:
    """ValueError where a generation config would sample from another distribution than the one that is scored."""
    neutral: dict[str, tuple] = {
        "guidance_scale": (None, 1, 1.0),
        "top_k": (None, 0),
        "top_p": (None, 1, 1.0),
        "min_p": (None, 0, 0.0),
        "repetition_penalty": (None, 1, 1.0),
    }
    for name, allowed in neutral.items():
        value = vars(config).get(name)
        if value not in allowed:
            raise ValueError(
                f"`{name}` = {value}: while training, clips must come from exactly the distribution that is scored, so "
                f"leave `{name}` at {allowed[-1]}; use it when you generate with the trained model."
            )


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """While the body runs, what FSDP 2 shares out is whole in every process: sampling reads weights outside of `forward`."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


_STATISTICS: dict[str, Statistic] = {
    "log_sum_sq_probs": lambda logits, _: (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1),
    "mean_logits": lambda logits, _: logits.mean(-1),
    "is_top1": lambda logits, codes: logits.argmax(-1) == codes,
}
"""Fields of TRL's fused output beside log-probability and entropy, from logits [B, S, V] and codes [B, S]."""


class FlatMusicRLForCausalLM(MusicRLForConditionalGeneration):
    """A generator whose `forward` and `generate` speak flat ids; its checkpoints are stock MusicGens all the same.

    Example:
        >>> model = FlatMusicRLForCausalLM.from_pretrained("musicrl-tiny")
        >>> tokenizer = FlatTokenizer.for_generator(model)
        >>> prompt = tokenizer(["a slow air played by a flute"], return_tensors="pt")
        >>> flat = model.generate(**prompt, max_new_tokens=4 * 8)  # 8 frames of 4 codebooks
    """

    scoring_temperature: float = 1.0
    """What logits are divided by in the fused call; the temperature that the clips were sampled with."""

    scored: tuple[str, ...] = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    """Fields of the fused call's output that are worked out, as of TRL's `add_fused_lm_head`; the others are None."""

    entropy_gradient: bool = True
    """Have its entropies a gradient? Without one a loss that has none of them takes less memory and time."""

    @classmethod
    def from_generator(cls, generator: MusicRLForConditionalGeneration) -> "FlatMusicRLForCausalLM":
        """The same weights seen flat: nothing is copied, and training this trains `generator`."""
        flat = copy.copy(generator)
        flat.__class__ = cls
        return flat

    def get_output_embeddings(self) -> None:
        """None: there are K heads, and FSDP would gather them where their container is called, which it never is."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        use_cache: bool = False,
    ) -> FusedCausalLMOutput | CausalLMOutput:
        """Score flat sequences.

        Args:
            input_ids: [B, L], a prompt and then a whole clip.
            attention_mask: [B, L], 0 at padding.
            labels: [B, L], `input_ids` with -100 where nothing is to be scored; the caller need not shift them.
            fused_lm_head: TRL's call.
            use_cache: taken because trainers pass it; a whole clip is scored at once and leaves no cache.

        Returns:
            With `fused_lm_head`, TRL's `FusedCausalLMOutput`: of what `scored` names log-probabilities, entropies and so
            on [B, L - 1] of each next id, 0 where the label is -100, and the mean loss. Without, logits [B, L, K * V] of the next id, in which
            the other codebooks have (almost) no mass, and the loss where there are labels.

        Raises:
            ValueError: as `split_flat`; or `fused_lm_head` without `labels`.
        """
        batch = split_flat(input_ids, attention_mask, self.config)
        if not fused_lm_head:
            return self._plain(batch, labels)
        if labels is None:
            raise ValueError("`labels` are needed with `fused_lm_head`: the ids, and -100 where nothing is scored.")
        asked = {name: _STATISTICS[name] for name in _STATISTICS.keys() & set(self.scored)}
        scores = self.score_codes(
            batch.codes,
            batch.text_ids,
            batch.text_mask,
            self.scoring_temperature,
            statistics=asked,
            entropy_gradient=self.entropy_gradient,
        )
        label_mask = labels[:, 1:] != -100

        def columns(values: Tensor) -> Tensor:
            return batch.to_flat(values)[:, 1:].masked_fill(~label_mask, 0)

        log_probs = columns(scores.logprobs)
        found = {name: columns(values) for name, values in scores.statistics.items()}
        if "entropy" in self.scored:
            found["entropy"] = columns(scores.entropies)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / label_mask.sum().clamp(min=1), log_probs=log_probs, label_mask=label_mask, **found
        )

    def _plain(self, batch: FlatBatch, labels: Tensor | None) -> CausalLMOutput:
        of_codes = self.code_logits(batch.codes, batch.text_ids, batch.text_mask)
        shape = (*batch.is_audio.shape, self.config.num_codebooks, self.config.codebook_size)
        logits = of_codes.new_full(shape, torch.finfo(of_codes.dtype).min)
        rows, columns = batch.is_audio.nonzero(as_tuple=True)
        _, steps, codebooks = batch.is_code.transpose(1, 2).nonzero(as_tuple=True)
        logits[rows, columns - 1, codebooks] = of_codes[rows, codebooks, steps]
        logits = logits.flatten(2)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
    ) -> Tensor:
        """Continue flat prompts [B, P] with clips: [B, P + K * F], in S decoder steps with a KV cache.

        Reads `max_new_tokens`, `temperature` and `do_sample` (default: sample) of the generation config, and nothing of
        the model's own, which is for listening.

        Raises:
            ValueError: no length, one that is no multiple of K, or guidance, top-k, top-p, min-p, repetition penalty.
        """
        options = generation_config or GenerationConfig(do_sample=True)
        check_sampled_is_scored(options)
        length = max_new_tokens or options.max_new_tokens
        num_codebooks, size = self.config.num_codebooks, self.config.codebook_size
        if not length or length % num_codebooks:
            raise ValueError(
                f"`max_new_tokens` = {length} must be a positive multiple of the {num_codebooks} codebooks: "
                "codebooks * frames."
            )
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        text_ids, text_mask = _split_text(input_ids, kept, num_codebooks * size)
        with whole_weights(self):
            codes = self.sample_codes(
                text_ids,
                text_mask,
                length // num_codebooks,
                temperature=1.0 if options.temperature is None else options.temperature,
                do_sample=options.do_sample is not False,
            )
        return torch.cat([input_ids, flatten_codes(codes, size, self.config.audio_channels)], 1)


class FlatTokenizer(PreTrainedTokenizerBase):
    """A generator's text tokenizer whose ids start behind the audio ids; saved, it is the text tokenizer itself.

    Args:
        text_tokenizer: with a pad and an eos token.
        audio_ids: K * V, how far the text ids are moved.
    """

    def __init__(self, text_tokenizer: PreTrainedTokenizerBase, audio_ids: int):
        if text_tokenizer.pad_token is None or text_tokenizer.eos_token is None:
            raise ValueError("`text_tokenizer` needs a pad and an eos token; set text_tokenizer.pad_token / eos_token.")
        super().__init__(
            pad_token=text_tokenizer.pad_token, eos_token=text_tokenizer.eos_token, padding_side="left", backend="flat"
        )
        self.text_tokenizer = text_tokenizer
        self.audio_ids = audio_ids

    @classmethod
    def for_generator(cls, generator: MusicRLForConditionalGeneration) -> "FlatTokenizer":
        """The tokenizer that belongs to a generator (ValueError where that has no text tokenizer)."""
        if generator.tokenizer is None:
            raise ValueError(
                "`generator` has no tokenizer; load it with from_pretrained, or set `generator.tokenizer`."
            )
        return cls(generator.tokenizer, generator.config.num_codebooks * generator.config.codebook_size)

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> BatchEncoding:
        """Text to flat ids; keywords as of any tokenizer (`padding`, `return_tensors`)."""
        kwargs = {"padding_side": self.padding_side, "verbose": False} | kwargs
        batch = self.text_tokenizer(text, **kwargs)
        batch["input_ids"] = self._moved(batch["input_ids"])
        return batch

    def _moved(self, ids: Any) -> Any:
        if isinstance(ids, list):
            return [self._moved(part) for part in ids]
        return ids + self.audio_ids

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        words = [int(i) - self.audio_ids for i in ids if i >= self.audio_ids]
        text = str(self.text_tokenizer.decode(words, skip_special_tokens=skip_special_tokens))
        codes = len(ids) - len(words)
        return f"{text}[{codes} codes]" if codes else text

    def __len__(self) -> int:
        return self.audio_ids + len(self.text_tokenizer)

    def __repr__(self) -> str:
        return f"FlatTokenizer(audio_ids={self.audio_ids}, text_tokenizer={self.text_tokenizer!r})"

    @property
    def vocab_size(self) -> int:
        """Audio ids and text ids together."""
        return self.audio_ids + self.text_tokenizer.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """The text tokens with their flat ids; audio ids have no spelling."""
        return {token: self.audio_ids + i for token, i in self.text_tokenizer.get_vocab().items()}

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Text tokens to flat ids."""
        return self._moved(self.text_tokenizer.convert_tokens_to_ids(tokens))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Save the text tokenizer: what stands in a checkpoint is what MusicGen expects."""
        return self.text_tokenizer.save_pretrained(save_directory, *args, **kwargs)
