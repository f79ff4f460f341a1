"""Weights of the `encodec` package as transformers' `EncodecModel`: what it published, and what was trained with it."""

import re
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import EncodecConfig, EncodecFeatureExtractor, EncodecModel

from .audio import atomic_path
from .bundled import loading, read_json
from .places import find_model, unlock_weights

_RENAMES = [
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.conv\.conv\.", ".conv."),
    (r"\.convtr\.convtr\.", ".conv."),
    (r"\.conv\.norm\.", ".norm."),
    (r"\.convtr\.norm\.", ".norm."),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
]

PUBLISHED: dict[str, tuple[str, dict]] = {
    "encodec_24khz": ("encodec_24khz-d7cc33bc.th", {}),  # the defaults of EncodecConfig are this model's
    "encodec_48khz": (
        "encodec_48khz-7e698e3e.th",
        {
            "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
            "sampling_rate": 48_000,
            "audio_channels": 2,
            "normalize": True,
            "chunk_length_s": 1.0,
            "overlap": 0.01,
            "norm_type": "time_group_norm",
            "use_causal_conv": False,
        },
    ),
}
"""What the `encodec` package publishes: file name, whose end is the start of its SHA-256, and EncodecConfig fields."""


def convert_encodec_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an `encodec` package model into those of transformers' `EncodecModel`.

    Values are untouched: codes come out equal and waves are the same to the last bit.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def convert_encodec_checkpoint(source: str | Path, output_dir: str | Path, config: str | Path | None = None) -> Path:
    """`musicrl convert-codec`: weights of the `encodec` package to a folder that `EncodecModel` loads.

    Args:
        source: "encodec_24khz" or "encodec_48khz", fetched from their publisher as the package itself does (torch's
            download cache, SHA-256 prefix checked) and read as tensors only; or a safetensors file with the state
            dict of an `encodec.EncodecModel`.
        output_dir: folder to write (config.json, model.safetensors, preprocessor_config.json).
        config: for a safetensors file, what it is: JSON file of a transformers `EncodecConfig`, or the name or folder
            of a codec of the same shape (for example "facebook/encodec_24khz").

    Raises:
        ValueError: an unknown `source`, a file that is no whole safetensors file, weights that do not fit `config`, or
            a `config` that is missing or too much.
        ConnectionError: the publisher was not reached; names the address, and the place where the file can be put.

    Example:
        >>> convert_encodec_checkpoint("encodec_24khz", "codec")  # doctest: +SKIP
    """
    if str(source) in PUBLISHED:
        if config is not None:
            raise ValueError(f"`config` = {str(config)!r}, but {source} has its own; leave it out.")
        file_name, fields = PUBLISHED[str(source)]
        codec_config, state = EncodecConfig(**fields), _published_weights(file_name)
    else:
        state = _own_weights(Path(source))
        if config is None:
            raise ValueError("`config` is missing: name an EncodecConfig JSON file, or a codec of the same shape.")
        is_file = Path(config).is_file()
        if is_file:
            fields = read_json(config)
            with loading(config):
                codec_config = EncodecConfig.from_dict(fields)
        else:
            codec_config = EncodecConfig.from_pretrained(find_model(config, "encodec", "config"))
    with loading(source):
        model = EncodecModel(codec_config)
        # Not strict, so that the message below says which.
        problem = model.load_state_dict(convert_encodec_state_dict(state), strict=False)
    if problem.missing_keys or problem.unexpected_keys:
        raise ValueError(
            f"`source` does not fit `config`: missing {problem.missing_keys[:3]}, unexpected "
            f"{problem.unexpected_keys[:3]} of {len(state)} tensors; check strides, filters and the number of codebooks."
        )
    with atomic_path(output_dir) as folder:
        model.save_pretrained(folder)
        unlock_weights(folder)
        EncodecFeatureExtractor(
            feature_size=codec_config.audio_channels,
            sampling_rate=codec_config.sampling_rate,
            chunk_length_s=codec_config.chunk_length_s,
            overlap=codec_config.overlap,
        ).save_pretrained(folder)
    return Path(output_dir)


def _published_weights(file_name: str) -> dict[str, Tensor]:
    from encodec.model import ROOT_URL

    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    try:
        # The published file is a pickle; `weights_only` builds tensors from it and runs nothing.
        return torch.hub.load_state_dict_from_url(
            ROOT_URL + file_name, map_location="cpu", check_hash=True, weights_only=True
        )
    except UnpicklingError:
        raise ValueError(f"`source`: {cached} holds more than tensors; delete it, and it is fetched again.") from None
    except (URLError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"`source`: {ROOT_URL + file_name} could not be fetched ({error}): check the network, or fetch it elsewhere and "
            f"put it at {cached}."
        ) from None


def _own_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"`source` = {str(path)!r} is neither a file nor one of {', '.join(PUBLISHED)}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"`source`: {path} is no whole safetensors file ({error}). If it is a pickle (.th, .pt), load it yourself "
            "where you trust it and save its state dict with safetensors.torch.save_file."
        ) from None
