"""EnCodec between waveforms [B, C, T] and codes [B, K, F], through transformers' `EncodecModel`, with exact lengths."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import EncodecModel

from .audio import check_audio
from .bundled import loading, resolve
from .codec_decoder import speed_up_decoder


@dataclass
class EncodedAudio:
    """Codes of a batch of clips.

    Attributes:
        codes: [B, K, F] int64. Models that work in chunks (48 kHz) have their chunks' frames one after the other.
        scales: [B, number of chunks] loudness of each chunk for models with `normalize`, else None.
        lengths: [B] samples of each clip; frames behind a clip's own are 0.
    """

    codes: Tensor
    scales: Tensor | None
    lengths: Tensor


class AudioCodec:
    """A frozen `EncodecModel` that keeps exact lengths and takes clips of unequal length.

    Args:
        model: any EnCodec, mono or stereo, causal or not, 16 to 48 kHz.
        num_codebooks: how many of the model's codebooks to use (its bandwidth); None uses all that its highest
            target bandwidth has.
        fast_decoder: waves 1e-6 off what `EncodecModel` and the `encodec` package make of the same codes, in half the time on a
            CPU. The model's decoder keeps it.

    Raises:
        ValueError: `num_codebooks` that no target bandwidth of the model gives.

    Example:
        >>> codec = AudioCodec.from_pretrained("facebook/encodec_32khz")  # doctest: +SKIP
        >>> codes = codec.encode(audio).codes  # doctest: +SKIP
    """

    def __init__(self, model: EncodecModel, num_codebooks: int | None = None, fast_decoder: bool = False):
        self.model = model.eval().requires_grad_(False)
        if fast_decoder:
            speed_up_decoder(model)
        config = model.config
        self.sampling_rate: int = config.sampling_rate
        self.channels: int = config.audio_channels
        self.hop_length: int = config.hop_length
        self.frame_rate: float = config.sampling_rate / config.hop_length
        self.codebook_size: int = config.codebook_size
        by_codebooks = {model.quantizer.get_num_quantizers_for_bandwidth(b): b for b in config.target_bandwidths}
        self.num_codebooks = max(by_codebooks) if num_codebooks is None else num_codebooks
        if self.num_codebooks not in by_codebooks:
            raise ValueError(
                f"`num_codebooks` = {num_codebooks}: this codec offers {sorted(by_codebooks)} codebooks "
                f"(target bandwidths {config.target_bandwidths} kbit/s)."
            )
        self.bandwidth = by_codebooks[self.num_codebooks]

    @classmethod
    def from_pretrained(cls, name_or_path: str, num_codebooks: int | None = None) -> "AudioCodec":
        """Load from a Hub id or a folder with an EncodecModel (safetensors only)."""
        source = resolve(name_or_path)
        with loading(source):
            model = EncodecModel.from_pretrained(
                source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        return cls(model, num_codebooks)

    @torch.no_grad()
    def encode(self, audio: Tensor, lengths: Tensor | None = None) -> EncodedAudio:
        """Waveforms to codes.

        Clips of unequal length are encoded group by group of equal length, so that each clip's codes are those that it
        would get alone: neither the padding nor its neighbours reach a non-causal convolution or the loudness scale.

        Args:
            audio: [B, C, T] float in [-1, 1] at `sampling_rate`, padded on the right.
            lengths: [B] samples of each clip; None where all fill T.

        Returns:
            EncodedAudio with F = ceil(T / hop_length) frames for codecs without chunks.

        Raises:
            ValueError: wrong number of channels, NaN, empty, lengths outside [1, T].
        """
        check_audio(audio)
        if audio.dim() != 3 or audio.shape[1] != self.channels:
            raise ValueError(
                f"`audio` must be [B, {self.channels}, T] for this codec, got shape {tuple(audio.shape)}; "
                "mix down to mono or copy mono to both sides first."
            )
        batch, _, samples = audio.shape
        if lengths is None:
            lengths = torch.full((batch,), samples, dtype=torch.long)
        lengths = lengths.cpu()
        if lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > samples:
            raise ValueError(f"`lengths` must be [B] in [1, {samples}], got {lengths.tolist()}.")
        groups = []
        for length, rows in self._passes(lengths, audio.device):
            codes, scales = self._encode_equal(audio[rows.to(audio.device), :, :length])
            groups.append((rows, codes, scales))
        codes = torch.zeros(batch, self.num_codebooks, max(g[1].shape[-1] for g in groups), dtype=torch.long)
        codes = codes.to(audio.device)
        chunks = max(0 if group_scales is None else group_scales.shape[-1] for _, _, group_scales in groups)
        scales = audio.new_ones(batch, chunks) if chunks else None
        for rows, group_codes, group_scales in groups:
            codes[rows.to(audio.device), :, : group_codes.shape[-1]] = group_codes
            if scales is not None and group_scales is not None:
                scales[rows.to(audio.device), : group_scales.shape[-1]] = group_scales
        return EncodedAudio(codes, scales, lengths)

    def _passes(self, lengths: Tensor, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Each length with rows [n] of that length that go through the model together.

        On a CPU one clip at a time is twice as fast as a batch: its activations stay in the cache.
        """
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            for group in rows.split(1 if device.type == "cpu" else len(rows)):
                yield length, group

    def _encode_equal(self, audio: Tensor) -> tuple[Tensor, Tensor | None]:
        chunks = self._chunk_starts(audio.shape[-1])
        codes, scales = [], []
        for start in chunks:
            piece = audio[..., start : start + (self.model.config.chunk_length or audio.shape[-1])]
            frame, scale = self.model._encode_frame(piece.to(self.model.dtype), self.bandwidth)
            codes.append(frame)
            scales.append(scale)
        return torch.cat(codes, -1), None if scales[0] is None else torch.cat(scales, -1)

    def _chunk_starts(self, length: int) -> range:
        return range(0, length, self.model.config.chunk_stride or length)

    @torch.no_grad()
    def decode(self, encoded: EncodedAudio | Tensor, length: int | None = None) -> Tensor:
        """Codes to waveforms.

        Args:
            encoded: what `encode` gave, or codes [B, K, F] alone for codecs without chunks and scales.
            length: samples of the result; by default the longest clip's (EncodedAudio) or F * hop_length (codes).

        Returns:
            audio [B, C, length] float32; samples behind a clip's own length are 0.

        Raises:
            ValueError: codes of another shape or beyond the codebook, or a `length` that the frames do not cover.
        """
        codes = encoded.codes if isinstance(encoded, EncodedAudio) else encoded
        scales = encoded.scales if isinstance(encoded, EncodedAudio) else None
        self.check_codes(codes)
        config = self.model.config
        if isinstance(encoded, Tensor):
            if config.chunk_length is not None or config.normalize:
                raise ValueError("`encoded` must be an EncodedAudio for this codec: it needs scales and clip lengths.")
            longest = codes.shape[-1] * self.hop_length
            lengths = torch.full((len(codes),), longest if length is None else length)
        else:
            lengths = encoded.lengths
        length = int(lengths.max()) if length is None else length
        audio = torch.zeros(len(codes), self.channels, length, device=codes.device)
        for own_length, rows in self._passes(lengths, codes.device):
            rows = rows.to(codes.device)
            decoded = self._decode_equal(codes[rows], None if scales is None else scales[rows], own_length).float()
            kept = min(own_length, length)
            if decoded.shape[-1] < kept:
                raise ValueError(
                    f"`length` = {length} samples, but {codes.shape[-1]} frames cover only {decoded.shape[-1]}."
                )
            audio[rows, :, :kept] = decoded[..., :kept]
        return audio

    def _decode_equal(self, codes: Tensor, scales: Tensor | None, length: int) -> Tensor:
        config = self.model.config
        if config.chunk_length is None:
            # A clip's own frames only: what pads it in a batch must not sound into its end.
            own = codes[..., : -(-length // self.hop_length)]
            return self.model._decode_frame(own, None if scales is None else scales[:, :1])
        pieces, first = [], 0
        for index, start in enumerate(self._chunk_starts(length)):
            frames = -(-min(config.chunk_length, length - start) // self.hop_length)
            scale = None if scales is None else scales[:, index]
            pieces.append(self.model._decode_frame(codes[..., first : first + frames], scale))
            first += frames
        return self.model._linear_overlap_add(pieces, config.chunk_stride or 1)

    def check_codes(self, codes: Tensor, name: str = "codes") -> None:
        """ValueError unless `codes` is an integer [B, K, F] with this codec's K and every code in [0, V)."""
        if codes.dim() != 3 or codes.shape[1] != self.num_codebooks or codes.is_floating_point():
            raise ValueError(
                f"`{name}` must be integers [B, {self.num_codebooks}, F] for this codec, got {codes.dtype} of shape "
                f"{tuple(codes.shape)}; encode the audio with the same codec that decodes it."
            )
        if codes.numel() == 0:
            raise ValueError(f"`{name}` is empty (shape {tuple(codes.shape)}); give at least one frame.")
        if int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size:
            raise ValueError(
                f"`{name}` must lie in [0, {self.codebook_size}), got {int(codes.min())} to {int(codes.max())}; "
                "they come from a codec with larger codebooks."
            )
