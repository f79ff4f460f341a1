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


def test_a_wrong_caption_differs_in_one_fact_and_what_follows_from_it(recipe):
    one_fact = recipe("one_fact")
    slow = ROW | {"tempo": "slow", "bpm": 56.0, "mood": "nostalgic"}
    follows = {"tempo": {"tempo", "bpm", "mood"}, "key": {"key", "mode", "mood"}}
    changed = dict.fromkeys(one_fact.FACTS, 0)
    for fact in one_fact.FACTS:
        for seed in range(30):
            other = one_fact.another(ROW, fact, [ROW, slow], random.Random(seed))
            differing = {name for name in ROW if other[name] != ROW[name]}
            assert differing <= follows.get(fact, {fact})
            assert len(differing - {"mood", "bpm"}) == 1
            changed[fact] += "mood" in differing
    assert changed["tempo"]  # a lively tune is not slow
    assert ROW["tempo"] == "fast"  # what was given stays as it was


def test_wrong_captions_keep_the_other_facts(recipe):
    one_fact, captions_of = recipe("one_fact"), recipe("captions")
    named = {
        "instrument": captions_of.SYNONYMS["violin"],
        "backing": captions_of.BACKING_PHRASES["bass"],
        "tempo": ["105 bpm"],
        "key": ["F sharp dorian"],
    }
    slow = ROW | {"tempo": "slow", "bpm": 56.0}
    drawn = [one_fact.draw_captions(ROW, [ROW, slow], random.Random(seed)) for seed in range(200)]
    whole = [captions for captions in drawn if captions.complete]
    assert 60 < len(whole) < 140
    for captions in whole:
        assert captions.right not in captions.wrong
        for changed, wrong in zip(one_fact.FACTS, captions.wrong, strict=True):
            for fact, phrases in named.items():
                assert any(phrase in wrong for phrase in phrases) == (fact != changed), wrong
    # Where a style leaves a fact out, its wrong caption is the right one, and asks for nothing.
    assert any(captions.right == captions.wrong[one_fact.FACTS.index("key")] for captions in drawn)


def test_the_losses_of_the_adherence_model_are_those_of_its_similarities(recipe):
    """Against a twin that compares each sound with each text, one pair at a time."""
    adherence, one_fact, facts = recipe("adherence"), recipe("one_fact"), recipe("facts")
    torch.manual_seed(0)
    model, _ = adherence.build()
    rows = [ROW, ROW | {"instrument": "flute"}, ROW | {"tempo": "slow", "bpm": 56.0, "key": "C"}]
    tokenizer = recipe("text").train_tokenizer([row["kind"] for row in rows], with_bos=True)
    learner = adherence.Learner(model.eval(), tokenizer)
    drawn = [one_fact.draw_captions(row, rows, random.Random(seed)) for seed, row in enumerate(rows)]
    drawn[0] = drawn[0]._replace(wrong=[drawn[0].right, *drawn[0].wrong[1:]])  # names no instrument
    features = torch.randn(3, 1, 501, 128)
    with torch.no_grad():
        found = learner.losses(features, drawn, facts.fact_classes(rows))
        with torch.autocast("cpu", torch.bfloat16):
            sound = model.audio_projection(learner.sound_state(features)).float()

            def embed(texts):
                return model.text_projection(learner.text_state(texts)).float()

            texts = embed([captions.right for captions in drawn] + [w for c in drawn for w in c.wrong])
    scale = model.logit_scale_a.exp()

    def similar(clip, text):
        return scale * torch.cosine_similarity(sound[clip], texts[text], dim=0)

    table = torch.stack([torch.stack([similar(i, j) for j in range(3)]) for i in range(3)])
    clips = -(table.log_softmax(1).diag().mean() + table.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(found["clips"], clips, rtol=1e-4, atol=1e-5)
    for column, fact in enumerate(one_fact.FACTS):
        lost = [
            -nn.functional.logsigmoid(similar(i, i) - similar(i, 3 + 4 * i + column))
            for i in range(3)
            if drawn[i].wrong[column] != drawn[i].right
        ]
        expected = torch.stack(lost).mean() if lost else torch.zeros(())
        torch.testing.assert_close(found[fact], expected, rtol=1e-4, atol=1e-5)
