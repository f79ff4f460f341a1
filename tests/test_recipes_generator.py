"""The recipe's generator: what it starts from."""

import importlib
from pathlib import Path

import numpy as np
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
    chords = (0, False, [(1.51, 1.6, 48, 62), (9.99, 12.0, 48, 62), (10.0, 11.0, 48, 62)])
    found = score.score_frames(row, [(0, False, [(1.0, 2.0, 72, 100)]), chords])
    assert list(score.SIZES) == ["phase", "beat", "melody", "onset", "other_onset"]
    phase, beat, melody, onset, other_onset = found
    assert found.shape == (5, 500)
    assert onset.nonzero()[0].tolist() == [50]
    assert other_onset.nonzero()[0].tolist() == [75, 499]
    assert set(melody[:50]) | set(melody[100:]) == {0}
    assert set(melody[50:100]) == {72 - score.LOWEST + 1}
    assert beat[::50].tolist() == [2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert phase[::50].tolist() == [0] * 10
    assert phase[75] == score.PHASES // 2
    assert score.bar_lines(found[None])[0].tolist() == [50, 200, 350]


def test_a_bar_of_one_beat_begins_where_its_beat_does(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    score = importlib.import_module("score")
    row = {"bpm": 60.0, "first_bar_s": 0.0, "beats_in_bar": 1}
    assert score.bar_lines(score.score_frames(row, [(0, False, [])])[None])[0].tolist() == [50 * i for i in range(10)]


def test_crops_begin_at_bar_lines_and_their_score_is_that_of_their_codes(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    generator, score = (importlib.import_module(name) for name in ("generator", "score"))
    rows = [{"bpm": 60.0, "first_bar_s": 0.5 * i, "beats_in_bar": 3} for i in range(4)]
    scores = np.stack([score.score_frames(row, [(0, False, [])]) for row in rows])
    codes = torch.arange(500).repeat(4, 4, 1) + 1000 * torch.arange(4)[:, None, None]  # says its clip and frame
    bars = score.bar_lines(scores)
    for batch in (*generator.BATCHES, generator.BLIND):
        clips, crops, found = generator.draw_codes(codes, scores, bars, batch, np.random.default_rng(0))
        assert len(clips) == len(crops) == len(found) == batch.size
        assert found.shape[-1] == crops.shape[-1] <= batch.frames
        assert (found[:, :2, 0] == 0).all()  # the first beat of a bar begins
        if batch.is_blind:
            assert (crops == generator.CODEBOOK_SIZE).all()
            continue
        first = crops[:, 0, 0] - 1000 * torch.from_numpy(clips)
        assert all(int(f) in bars[i] for f, i in zip(first, clips, strict=True))
        if batch.from_start == 1:
            assert first.tolist() == [bars[i][0] for i in clips]
        assert (np.diff(crops[:, 0], axis=1) == 1).all()


def test_what_is_damaged_shows_no_code_before_its_time(monkeypatch):
    """Rows of ascending codes: what is shown is a code of the same frame, an earlier one, another clip's, or a pad."""
    monkeypatch.syspath_prepend(RECIPES)
    generator = importlib.import_module("generator")
    codes = (torch.arange(200) + 10_000 * torch.arange(40)[:, None, None]).expand(40, 4, 200)
    shown = generator.damaged(codes, np.random.default_rng(0))
    assert shown.shape == codes.shape
    changed = shown != codes
    assert 10 < changed.any(-1).all(-1).sum() < 30  # about half of the clips
    is_own = (shown // 10_000 == codes // 10_000) & (shown != generator.CODEBOOK_SIZE)
    assert (shown[is_own] <= codes[is_own]).all()
    others = changed & ~is_own & (shown != generator.CODEBOOK_SIZE)
    assert ((shown % 10_000) == (codes % 10_000))[others].all()
    for some in (others, shown == generator.CODEBOOK_SIZE, changed & is_own):  # each kind is there
        assert some.any()


def test_blind_batches_are_every_second_one_at_first(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    generator = importlib.import_module("generator")
    first, often = generator.BLIND_EVERY
    length = 7 * often * first
    at_first = [generator.plan(step, 0) for step in range(length)]
    later = [generator.plan(step, generator.BLIND_FIRST) for step in range(length)]
    assert sum(batch.is_blind for batch in at_first) == length // first
    assert sum(batch.is_blind for batch in later) == length // often
    assert {*later} == {*generator.BATCHES, generator.BLIND}


def test_step_f_is_asked_for_the_frame_that_it_predicts_first(monkeypatch):
    """States that spell the classes of a score: no loss where they stand, some where they stand a step later."""
    monkeypatch.syspath_prepend(RECIPES)
    score = importlib.import_module("score")
    layer, width = torch.nn.Identity(), sum(score.SIZES.values())
    heads = score.ScoreHeads(layer, layer, width)
    rows = torch.eye(width).split(list(score.SIZES.values()))
    with torch.no_grad():
        for head, weight in zip(heads.heads.values(), rows, strict=True):
            head.weight.copy_(weight)
            head.bias.zero_()
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
