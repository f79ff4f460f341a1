"""The generator's configuration: MusicGen's, with the answers that language-model trainers ask for."""

import logging
import re
from typing import ClassVar

from transformers import MusicgenConfig


class _PadBesideTheCodes(logging.Filter):
    """Drops transformers' warning that a token id lies one past the vocabulary: MusicGen's pad does so by design."""

    def filter(self, record: logging.LogRecord) -> bool:
        found = re.search(r"_token_id must be .*between 0 and (\d+)\), got (\d+)\.", record.getMessage())
        return found is None or int(found[2]) != int(found[1]) + 1


logging.getLogger("transformers.configuration_utils").addFilter(_PadBesideTheCodes())


class MusicRLConfig(MusicgenConfig):
    """A `MusicgenConfig` that answers what trainers ask of a language model's configuration."""

    auto_map: ClassVar[dict] = {}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None):
        """The part that describes the language model: this config, where the caller does not say which part.

        The stock class refuses, since it has two candidates. Trainers write text token ids into what they get here,
        and in the decoder's config those would be taken for codes.
        """
        if decoder or encoder:
            return super().get_text_config(decoder=decoder, encoder=encoder)
        return self

    @property
    def num_codebooks(self) -> int:
        """K."""
        return self.decoder.num_codebooks

    @property
    def codebook_size(self) -> int:
        """V, codes a codebook."""
        return self.decoder.vocab_size

    @property
    def pad_code(self) -> int:
        """The id that the decoder reads where the delay pattern holds no code, and as its start; never sampled."""
        return self.decoder.pad_token_id

    @property
    def audio_channels(self) -> int:
        """C of the generated audio."""
        return self.decoder.audio_channels
