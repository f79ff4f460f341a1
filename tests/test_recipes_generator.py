"""The recipe's generator: what it starts from."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import EncodecModel

RECIPES = Path(__file__).parent.parent / "recipes"


def test_codes_that_sound_alike_start_alike(monkeypatch):
    """Distances between a codebook's entries are, up to its scale, those between their embeddings and output weights."""
    monkeypatch.syspath_prepend(RECIPES)
    codec, generator = importlib.import_module("codec"), importlib.import_module("generator")
    torch.manual_seed(0)
    encodec = EncodecModel(codec.transformers_config())
    for layer in encodec.quantizer.layers:
        layer.codebook.embed.normal_(mean=1.0, std=3.0)
    model = generator.build(encodec)
    size = codec.CODEBOOK_SIZE
    for k, layer in enumerate(encodec.quantizer.layers):
        entries = torch.pdist(layer.codebook.embed[:50])
        table = model.decoder.model.decoder.embed_tokens[k].weight.detach()
        for weight, spread in ((table[:size], 0.35), (model.decoder.lm_heads[k].weight.detach(), 0.05)):
            assert weight.pow(2).mean().sqrt() == pytest.approx(spread, rel=1e-3)
            ratio = torch.pdist(weight[:50]) / entries
            assert ratio.std() < 1e-4 * ratio.mean()
