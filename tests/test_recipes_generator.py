"""The recipe's generator: what it starts from."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import EncodecModel

from musicrl_hf import load_generator

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


@pytest.mark.slow
def test_training_goes_on_from_what_is_published(monkeypatch, tmp_path):
    """What go_on.py leaves in a work folder scores codes as the bundled generator does, before the first step."""
    monkeypatch.syspath_prepend(RECIPES)
    generator, go_on = importlib.import_module("generator"), importlib.import_module("go_on")
    common = importlib.import_module("common")
    threads = str(torch.get_num_threads())
    words = ["go_on.py", "--work", str(tmp_path), "--recorded", str(RECIPES / "results"), "--threads", threads]
    monkeypatch.setattr("sys.argv", words)
    go_on.main()
    model = generator.build(EncodecModel.from_pretrained(tmp_path / "codec"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    progress = common.load_training_state(tmp_path / "generator_training", model, optimizer)
    assert progress["step"] == 0
    assert progress["earlier"]["step"] > 1000
    published = load_generator("musicrl-tiny")
    codes = torch.randint(published.config.codebook_size, (2, 4, 20), generator=torch.Generator().manual_seed(0))
    text = published.text_inputs(["a slow air", "a lively reel played by a fiddle"])
    with torch.no_grad():
        ours, theirs = (generator.code_losses(some, codes, text) for some in (model, published))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # their attention is computed in another way
    weights, kept = model.state_dict(), published.state_dict()
    assert weights.keys() == kept.keys()
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
