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


def test_the_score_of_a_waltz_frame_by_frame(monkeypatch):
    """60 beats a minute, 3 in a bar, an upbeat of one beat; C5 from 1 to 2 s, else rests. Frames last 20 ms."""
    monkeypatch.syspath_prepend(RECIPES)
    score = importlib.import_module("score")
    row = {"bpm": 60.0, "first_bar_s": 1.0, "beats_in_bar": 3}
    melody, phase, beat = score.score_frames(row, [(0, False, [(1.0, 2.0, 72, 100)])])
    assert len(melody) == 500
    assert set(melody[:50]) | set(melody[100:]) == {0}
    assert set(melody[50:100]) == {72 - score.LOWEST + 1}
    assert beat[::50].tolist() == [2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert phase[::50].tolist() == [0] * 10
    assert phase[75] == score.PHASES // 2


def test_step_f_is_asked_for_the_frame_that_it_predicts_first(monkeypatch):
    """States that spell the classes of a score: no loss where they stand, some where they stand a step later."""
    monkeypatch.syspath_prepend(RECIPES)
    score = importlib.import_module("score")
    layer, width = torch.nn.Identity(), sum(score.SIZES.values())
    heads = score.ScoreHeads(layer, width)
    torch.nn.init.eye_(heads.head.weight)
    torch.nn.init.zeros_(heads.head.bias)
    classes = torch.stack([torch.randint(size, (2, 20)) for size in score.SIZES.values()], 1)
    hot = [torch.nn.functional.one_hot(classes[:, i], size) for i, size in enumerate(score.SIZES.values())]
    states = 100.0 * torch.cat(hot, -1)
    layer(torch.cat([states, torch.zeros(2, 3, width)], 1))  # as many steps more as the codebooks lag
    assert heads.losses(classes).max() < 1e-3
    layer(torch.cat([torch.zeros(2, 1, width), states], 1))
    assert heads.losses(classes).min() > 1


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
