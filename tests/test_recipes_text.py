"""The recipe's text encoder and the facts that it learns: what captions say, what the heads are asked, what is handed on."""

import importlib
import random
from pathlib import Path

import pytest
import torch
from torch import nn

RECIPES = Path(__file__).parent.parent / "recipes"
ROW = {
    "instrument": "violin", "backing": "bass", "bpm": 104.9, "tempo": "fast", "key": "F sharp", "mode": "dorian",
    "metre": "6/8", "kind": "jig", "mood": "lively",
}  # fmt: skip


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's modules, by name."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


def test_a_complete_caption_names_every_fact(recipe):
    captions = recipe("captions")
    texts = {captions.complete(ROW, random.Random(seed)) for seed in range(40)}
    assert len(texts) > 30
    for text in texts:
        assert any(text.startswith(f"{name}, ") for name in captions.SYNONYMS["violin"])
        assert "105 bpm" in text
        assert "F sharp dorian mode" in text
        assert any(phrase in text for phrase in captions.BACKING_PHRASES["bass"])
    assert any("up-tempo" in text for text in texts)


def test_facts_are_classes_of_their_own(recipe):
    facts = recipe("facts")
    found = dict(zip(facts.SIZES, facts.fact_classes([ROW])[0].tolist(), strict=True))
    for name, classes in facts.CLASSES.items():
        assert classes[found[name]] == ROW[name]
    low, high = facts.BPM_EDGES[found["bpm"] - 1], facts.BPM_EDGES[found["bpm"]]
    assert low <= ROW["bpm"] < high
    assert high / low == pytest.approx(1.085, abs=0.01)


def test_losses_are_means_over_what_is_not_padding(recipe):
    facts = recipe("facts")
    torch.manual_seed(0)
    layer, text = nn.Identity(), nn.Identity()
    heads = facts.FactHeads(layer, text, 8)
    decoder_states, text_states = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    layer(decoder_states)
    text(text_states)
    wanted = facts.fact_classes([ROW, ROW | {"key": "C", "bpm": 50.0}])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = heads.losses(wanted, mask)
    seen = {"decoder": (decoder_states, torch.ones(2, 5)), "text": (text_states, mask)}
    for name, (states, kept) in seen.items():
        for i, logits in enumerate(heads.heads[name](states).split(list(facts.SIZES.values()), -1)):
            nats = [
                -logits[b, s].log_softmax(-1)[wanted[b, i]]
                for b in range(2)
                for s in range(states.shape[1])
                if kept[b, s]
            ]
            torch.testing.assert_close(found[name][i], torch.stack(nats).mean())


def test_the_generator_begins_with_the_text_encoder_of_its_stage(recipe, tmp_path):
    text_encoder, common = recipe("text_encoder"), recipe("common")
    torch.manual_seed(0)
    trained, other = text_encoder.TextWithFacts(), text_encoder.TextWithFacts()
    common.save_training_state(tmp_path / "text_training", trained, torch.optim.AdamW(trained.parameters()), {})
    text_encoder.load_text_encoder(tmp_path, other.encoder, other.projection)
    ids = torch.tensor([[5, 6, 1]])
    states = [model.projection(model.encoder(input_ids=ids).last_hidden_state) for model in (trained, other)]
    assert torch.equal(*states)
    assert not torch.equal(trained.head.weight, other.head.weight)
