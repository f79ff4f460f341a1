"""The recipe's codec training: quantiser, losses, and the order of its stages."""

import argparse
import copy
import importlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe module by name, as a script in that folder does."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


def test_further_losses_have_their_share_of_the_gradient_whatever_their_size(recipe):
    """Of 3 a, 1000 b and .01 c: lengths 3, 1000 and .01 before; 3, .5 * 3 and 2 * 3 after."""
    losses = recipe("codec_losses")
    source = torch.zeros(3, requires_grad=True)
    output = source * 1.0
    losses.balanced_backward(output, 3 * output[0], [(1000 * output[1], 0.5), (0.01 * output[2], 2.0)])
    assert source.grad.tolist() == pytest.approx([3.0, 1.5, 6.0])


def test_the_ear_hears_no_difference_where_there_is_none_and_learns_nothing_itself(recipe):
    """A muffled clip is further from the original than the clip a little louder: loudness is not heard."""
    ear_module, classifier = recipe("ear"), recipe("classifier")
    torch.manual_seed(0)
    ear = ear_module.Ear(classifier.Classifier())
    wave = 0.1 * torch.randn(2, 6400)
    muffled = torch.nn.functional.avg_pool1d(wave, 5, 1, 2).requires_grad_(True)
    assert ear.distance(wave, wave).item() == pytest.approx(0, abs=1e-6)
    far, near = ear.distance(wave, muffled), ear.distance(wave, 1.1 * wave)
    assert far > 10 * near
    far.backward()
    assert muffled.grad.abs().sum() > 0
    assert all(p.grad is None for p in ear.parameters())


def test_the_ears_are_trained_once_from_other_weights_than_each_other(recipe, tmp_path):
    ear_module, captions = recipe("ear"), recipe("captions")
    rng = np.random.default_rng(0)
    clips = rng.integers(-3000, 3000, (4, 96_000), dtype=np.int16)
    rows = [{"instrument": name, "backing": "none"} for name in list(captions.INSTRUMENTS)[:4]]
    first = ear_module.load_or_train_ears(tmp_path, clips, rows, seed=0, minutes=0.01, n_ears=2)
    again = ear_module.load_or_train_ears(tmp_path, clips[:0], [], seed=0, n_ears=2)
    wave, other = torch.randn(1, 6400), torch.randn(1, 6400)
    heard = [ear.features(wave)[1] for ear in first.ears]
    assert torch.equal(heard[0], again.ears[0].features(wave)[1])
    assert torch.equal(heard[1], again.ears[1].features(wave)[1])
    assert not torch.allclose(heard[0], heard[1])
    distances = [ear.distance(wave, other).item() for ear in first.ears]
    assert first.distance(wave, other).item() == pytest.approx(sum(distances) / 2)


def test_instruments_that_come_out_worse_are_played_more_often(recipe):
    """Distances 1 and 2, squared: 1 in 5 and 4 in 5 of the clips. An instrument without a clip is not chosen."""
    mining = recipe("mining").Mining(["flute", "harp", "flute", "flute"], {"harp": 2.0, "cello": 9.0})
    chosen = mining.choose(5000, np.random.default_rng(0))
    assert np.mean(chosen == 1) == pytest.approx(0.8, abs=0.02)
    assert set(chosen.tolist()) == {0, 1, 2, 3}
    mining.learn([1], [1.0])
    assert mining.distances == pytest.approx({"flute": 1.0, "harp": 0.99 * 2.0 + 0.01})


def test_crops_come_from_the_clips_that_were_chosen(recipe):
    clips = np.arange(4, dtype=np.int16)[:, None] * np.ones(100, np.int16)
    crops, chosen = recipe("common").random_crops(clips, 3, 10, np.random.default_rng(0), np.array([2, 0, 2]))
    assert chosen == [2, 0, 2]
    assert crops.shape == (3, 10)
    assert (crops[:, 0] * 32767).round().tolist() == [2, 0, 2]


def test_hinge_losses_by_hand(recipe):
    losses = recipe("codec_losses")
    real, fake = [torch.tensor([2.0, 0.0])], [torch.tensor([-2.0, 0.5])]
    # real: (0 + 1) / 2; fake: (0 + 1.5) / 2
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(0.5 + 0.75)
    features = [[torch.tensor([1.0, -3.0])]]
    # doubt: (3 + .5) / 2; features: mean |difference| 1 over mean |real| 2
    moved = [[torch.tensor([2.0, -2.0])]]
    assert losses.adversarial_loss(fake, features, moved).item() == pytest.approx(1.75 + 0.5)


def test_reconstruction_is_nothing_only_for_the_same_wave(recipe):
    criterion = recipe("codec_losses").ReconstructionLoss()
    wave = 0.1 * torch.randn(2, 6400, generator=torch.Generator().manual_seed(0))
    assert criterion(wave, wave, 0.4).item() == pytest.approx(0, abs=1e-6)
    # Silence: 1 for the wave, and 1 in all for spectra and magnitudes, each relative to the target's own.
    assert criterion(wave, 0 * wave, 0.0).item() == pytest.approx(2, abs=0.01)
    assert criterion.mel_distance(wave, -wave).item() == pytest.approx(0, abs=1e-6)


def test_all_cosine_coefficients_give_the_wave_back(recipe):
    """Princen and Bradley: as many coefficients as samples, and each half window's alias cancels with its neighbour's."""
    start = recipe("codec_start")
    basis = start.cosine_basis(16, 16)
    wave = torch.randn(1, 160, generator=torch.Generator().manual_seed(0))
    found = start.coefficients(wave, basis)
    assert found.shape == (1, 16, 10)
    output = torch.zeros(1, 160 + 16)
    for frame in range(10):  # the window of frame n begins a quarter of its length before sample 16 n
        output[:, 16 * frame : 16 * frame + 32] += found[:, :, frame] @ basis.T
    assert torch.allclose(output[:, 16:-16], wave[:, 8:-8], atol=1e-5)


def test_the_codec_starts_as_that_transform_and_not_at_silence(recipe):
    """Two tones below 3.2 kHz lie within the 128 coefficients that are carried; torch's random weights know nothing."""
    codec, start, measures = recipe("codec"), recipe("codec_start"), recipe("measures")
    time = torch.arange(16_000) / 16_000
    wave = (0.1 * torch.sin(2 * math.pi * 440 * time) + 0.05 * torch.sin(2 * math.pi * 1318.5 * time))[None]
    torch.manual_seed(0)
    model = codec.build().eval()

    def ratio() -> float:
        with torch.no_grad():
            return measures.signal_to_noise_db(wave.numpy(), model.decoder(model.encoder(wave[:, None]))[:, 0].numpy())

    assert ratio() < 1
    noise = torch.randn(4, 16_000, generator=torch.Generator().manual_seed(1))
    start.start_from_cosines(model, codec.RATIOS, 0.1 * noise)
    assert ratio() > 12


def test_codebooks_start_where_the_latents_are_and_pass_the_gradient_through(recipe):
    """Four codebooks of 1,024 entries hold 1,200 latents nearly exactly: what each leaves over shrinks."""
    codec, quantiser = recipe("codec"), recipe("quantiser")
    torch.manual_seed(0)
    model = codec.build()
    latents = torch.randn(3, codec.DIMENSION, 400)
    vectors = latents.transpose(1, 2).reshape(-1, codec.DIMENSION)
    quantiser.initialise_codebooks(model, vectors, batch_vectors=160)
    latents.requires_grad_(True)
    value, commitment = quantiser.quantise(model, latents, update=False)
    assert (value - latents).pow(2).mean() < 0.2 * latents.pow(2).mean()
    assert commitment > 0
    value.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_dead_entries_restart_at_latents_of_the_batch(recipe):
    codec, quantiser = recipe("codec"), recipe("quantiser")
    torch.manual_seed(0)
    model = codec.build()
    latents = torch.randn(2, codec.DIMENSION, 100)
    far = torch.full((codec.DIMENSION,), 100.0)
    for book in quantiser.codebooks(model):
        book.embed[:] = far
        book.embed_avg[:] = 0
        book.cluster_size[:] = 0
    quantiser.quantise(model, latents, update=True)
    vectors = latents.transpose(1, 2).reshape(-1, codec.DIMENSION)
    first = quantiser.codebooks(model)[0].embed
    near = torch.cdist(first, vectors, compute_mode="donot_use_mm_for_euclid_dist").min(1).values < 1e-3
    assert near.float().mean() > 0.99


def test_the_stages_follow_the_time_and_never_go_back(recipe):
    codec = recipe("codec")
    begins = dict(codec.STAGES)
    for name, begin in begins.items():
        assert codec.Budget(10, 600 * begin + 1e-6).stage() == name
    assert codec.Budget(1000, 60.0).stage("decoder") == "decoder"  # the budget was raised after the encoder was frozen


def test_only_the_decoder_learns_once_the_codes_are_fixed(recipe):
    codec = recipe("codec")
    torch.manual_seed(0)
    model = codec.build()
    wave = 0.1 * torch.randn(2, 6400)
    for stage, is_frozen in (("quantised", False), ("decoder", True)):
        model.zero_grad()
        output, _ = codec.decode_crops(model, wave, stage)
        assert output.shape == wave.shape
        output.pow(2).sum().backward()
        assert all((p.grad is None) == is_frozen for p in model.encoder.parameters())
        assert all(p.grad is not None for p in model.decoder.parameters())


def test_the_package_and_transformers_agree_on_the_codec(recipe, tmp_path):
    codec, quantiser = recipe("codec"), recipe("quantiser")
    torch.manual_seed(0)
    model = codec.build().eval()
    wave = 0.1 * torch.randn(1, 1, 16_000)
    with torch.no_grad():
        latents = model.encoder(wave).transpose(1, 2).reshape(-1, codec.DIMENSION)
    quantiser.initialise_codebooks(model, latents.repeat(30, 1) + 0.01 * torch.randn(1500, codec.DIMENSION), 160)
    parity = codec.convert(model, tmp_path / "codec", wave)
    assert parity["codes_equal"]
    assert parity["codes_shape"] == [1, 4, 50]
    assert parity["largest_wave_difference"] < 1e-5
    assert pytest.approx(4 * math.log2(1024) * 50 / 1000) == codec.BANDWIDTH


def test_what_a_codec_keeps_is_measured(recipe):
    measures, codec_measures = recipe("measures"), recipe("codec_measures")
    time = np.arange(32_000) / 16_000
    a, e = (np.sin(2 * np.pi * f * time).astype(np.float32) for f in (440, 659.3))
    for cosine in (measures.chroma_cosine, measures.librosa_chroma_cosine):
        assert cosine(a, 0.3 * a) == pytest.approx(1, abs=1e-4)
        assert cosine(a, e) < 0.1
    noise = 0.1 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    assert codec_measures.si_sdr_db(a, 0.2 * (a + noise)) == pytest.approx(10 * np.log10(0.5 / 0.01), abs=0.1)
    assert measures.signal_to_noise_db(a, 0.2 * (a + noise)) < 2.1  # which the plain ratio calls bad


@pytest.fixture
def small_codec(recipe):
    """The recipe's codec with random weights, and codebooks that hold something."""
    torch.manual_seed(0)
    model = recipe("decoder").EncodecModel(recipe("codec").transformers_config()).eval()
    for layer in model.quantizer.layers:
        layer.codebook.embed.copy_(torch.randn_like(layer.codebook.embed))
    return model


def test_entries_that_clips_take_are_counted(recipe, small_codec):
    clips = np.random.default_rng(0).integers(-3000, 3000, (2, 16_000), dtype=np.int16)
    found = recipe("codec_measures").entries_used(small_codec, clips)
    with torch.no_grad():
        codes = small_codec.encode(recipe("common").to_float(clips)[:, None]).audio_codes[0]
    assert found["entries"] == [len(codes[:, k].unique()) for k in range(4)]
    assert found["clips"] == 2
    assert found["share"] == round(min(found["entries"]) / 1024, 3)


@torch.no_grad()
def test_a_crop_is_what_decoding_all_frames_gives_there_and_hears_what_came_before(recipe, small_codec):
    decoder = recipe("decoder")
    latents = torch.randn(2, 128, 90, generator=torch.Generator().manual_seed(0))
    whole = small_codec.decoder(latents)[:, 0]
    crop = decoder.decode_crop(small_codec.decoder, latents, 30, 40)
    assert crop.shape == (2, 40 * 320)
    assert torch.allclose(crop, whole[:, 30 * 320 : 70 * 320], atol=1e-6)
    for begin in (0, 1):  # where the latents begin, and as many follow as training hears
        heard = latents[:, :, : begin + 40 + decoder.AFTER]
        crop = decoder.decode_crop(small_codec.decoder, heard, begin, 40)
        assert torch.allclose(crop, whole[:, begin * 320 : (begin + 40) * 320], atol=1e-6)
    crop = decoder.decode_crop(small_codec.decoder, latents, 60, 30)
    assert torch.allclose(crop, whole[:, 60 * 320 :], atol=1e-6)
    lstm = next(module for module in small_codec.decoder.modules() if isinstance(module, torch.nn.LSTM))
    lstm.bias_ih_l0[256:512] = 5.0  # the gates that keep what was heard
    crop = decoder.decode_crop(small_codec.decoder, latents, 30, 40)
    latents[:, :, :5] += 3.0  # 25 frames before the crop: further than any convolution looks
    assert (decoder.decode_crop(small_codec.decoder, latents, 30, 40) - crop).abs().max() > 1e-4


def test_frames_before_a_crop_end_where_the_clip_begins(recipe):
    """As many as there are and no more than wanted; over many draws both ends of the clip are reached."""
    decoder, rng = recipe("decoder"), np.random.default_rng(0)
    drawn = [decoder.choose_frames(500, rng) for _ in range(4000)]
    for first, end, begin in drawn:
        assert begin - first == min(begin, decoder.BEFORE)
        assert end == min(begin + decoder.CROP + decoder.AFTER, 500)
    begins = [begin for _, _, begin in drawn]
    assert (min(begins), max(begins)) == (0, 500 - decoder.CROP)


def test_the_decoder_learns_from_codes_and_goes_on_where_it_stopped(recipe, small_codec, tmp_path):
    """Encoder and codebooks stay to the last bit; the weights that are left are the averaged ones."""
    decoder, ear = recipe("decoder"), recipe("ear")
    rows = [{"instrument": name, "backing": "none"} for name in ("flute", "harp")]
    rng = np.random.default_rng(0)
    clips = rng.integers(-3000, 3000, (2, 160_000), dtype=np.int16)
    codes = torch.randint(1024, (2, 4, 500), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    ears = ear.Ears([ear.Ear(recipe("classifier").Classifier())])
    before = {name: tensor.clone() for name, tensor in small_codec.state_dict().items()}
    args = argparse.Namespace(work=tmp_path, seed=0, minutes=0.0)
    fresh = copy.deepcopy(small_codec)
    first = {"step": 0}
    while first["step"] < 2:  # however slow the machine is
        args.minutes += 0.02
        first = decoder.train(args, small_codec, codes, clips, rows, ears)
    after = small_codec.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    saved = load_file(tmp_path / "decoder_training" / "state.safetensors")
    assert saved["model.averaged.n_averaged"] == first["step"]
    last = {name: saved[f"model.decoder.{name}"] for name in small_codec.decoder.state_dict()}
    assert any(not torch.equal(last[name], after[f"decoder.{name}"]) for name in last)
    assert all(torch.equal(saved[f"model.averaged.module.{name}"], after[f"decoder.{name}"]) for name in last)
    args.minutes = first["seconds"] / 60 + 0.01
    again = decoder.train(args, fresh, codes, clips, rows, ears)
    assert again["step"] > first["step"]
    saved = load_file(tmp_path / "decoder_training" / "state.safetensors")
    assert saved["model.averaged.n_averaged"] == again["step"]
    args.minutes = 0.0
    rested = copy.deepcopy(small_codec)
    decoder.train(args, rested, codes, clips, rows, ears)  # nothing to do but to take what was saved
    assert all(torch.equal(a, b) for a, b in zip(rested.parameters(), fresh.parameters(), strict=True))


def test_what_is_kept_of_the_decoder_lies_between_the_weights_before_and_after(recipe, small_codec):
    decoder = recipe("decoder")
    before = {name: tensor.clone() for name, tensor in small_codec.decoder.state_dict().items()}
    with torch.no_grad():
        for parameter in small_codec.decoder.parameters():
            parameter += 1.0
    decoder.mix(small_codec.decoder, before, 0.3)
    after = small_codec.decoder.state_dict()
    weights = {name for name, _ in small_codec.decoder.named_parameters()}
    assert weights
    assert all(torch.allclose(after[name], before[name] + 0.7, atol=1e-6) for name in weights)


def test_another_codec_is_trained_further_from_its_own_start(recipe, tmp_path):
    for name in (
        "decoder_before.json",
        "decoder_before.safetensors",
        "decoder_finished.json",
        "codes_train.safetensors",
    ):
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "decoder_training").mkdir()
    recipe("codec").forget_further_training(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["codes_train.safetensors"]


def test_a_codec_is_replaced_as_a_whole(recipe, small_codec, tmp_path):
    decoder = recipe("decoder")
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "model.safetensors").write_bytes(b"the one before")
    decoder.replace_codec(small_codec, tmp_path / "codec")
    again = decoder.EncodecModel.from_pretrained(tmp_path / "codec")
    assert all(torch.equal(a, b) for a, b in zip(small_codec.parameters(), again.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def test_the_curves_are_drawn_from_what_was_recorded(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    curves = recipe("curves")
    for name in ("generator", "text_encoder", "decoder_trials"):
        shutil.copy(RECIPES / "results" / f"{name}.json", tmp_path)
    trials = json.loads((tmp_path / "decoder_trials.json").read_text())
    assert sum(name.startswith(curves.KEPT) for name in trials["trials"]) == 1
    assert all(len(row) == len(trials["columns"]) for trial in trials["trials"].values() for row in trial["rows"])
    drawn = curves.draw(tmp_path).read_bytes()
    assert drawn == curves.draw(tmp_path).read_bytes()
    assert (RECIPES / "results" / "curves.svg").is_file()


@pytest.mark.slow
def test_the_decoders_stage_from_start_to_end(recipe, small_codec, tmp_path, monkeypatch):
    """The codec of the folder is another one after it, and `before` stays what was measured first, however often it goes on."""
    decoder, classifier, judges = recipe("decoder"), recipe("classifier"), recipe("judges")
    rng = np.random.default_rng(0)
    clips = rng.integers(-3000, 3000, (2, 160_000), dtype=np.int16)
    rows = [{"instrument": name, "backing": "none"} for name in ("flute", "harp")]
    for split in ("train", "test", "test_other_font"):
        np.save(tmp_path / f"clips_{split}.npy", clips)
        (tmp_path / f"rows_{split}.json").write_text(json.dumps(rows))
    codes = torch.randint(1024, (2, 4, 500), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    save_file({"codes": codes}, tmp_path / "codes_train.safetensors")
    judges.Judges(classifier.Classifier().eval(), np.ones((2, 12))).save(tmp_path)
    for number in range(recipe("ear").N_EARS):
        save_file(classifier.Classifier().state_dict(), tmp_path / f"ear_{number}_weights.safetensors")
    small_codec.save_pretrained(tmp_path / "codec")
    was = (tmp_path / "codec" / "model.safetensors").read_bytes()
    start = {name: tensor.clone() for name, tensor in small_codec.decoder.state_dict().items()}
    words = ["decoder.py", "--work", str(tmp_path), "--tiny", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", [*words, "--minutes", "0.01"])
    decoder.main()
    now = (tmp_path / "codec" / "model.safetensors").read_bytes()
    first = json.loads((tmp_path / "results" / "decoder.json").read_text())
    assert now != was
    averaged = load_file(tmp_path / "decoder_training" / "state.safetensors")
    kept = decoder.EncodecModel.from_pretrained(tmp_path / "codec").decoder.state_dict()
    for name, tensor in kept.items():
        between = start[name].lerp(averaged[f"model.averaged.module.{name}"], 1 - decoder.SHARE_BEFORE)
        assert torch.allclose(tensor, between, atol=1e-6)
    assert first["4_codebooks"]["si_sdr_db"] != first["before"]["4_codebooks"]["si_sdr_db"]
    decoder.main()
    assert (tmp_path / "codec" / "model.safetensors").read_bytes() == now
    monkeypatch.setattr("sys.argv", [*words, "--minutes", str(first["minutes"] + 0.1), "--force"])
    decoder.main()
    again = json.loads((tmp_path / "results" / "decoder.json").read_text())
    assert (tmp_path / "codec" / "model.safetensors").read_bytes() != now
    assert again["before"] == first["before"]
    assert again["step"] > first["step"]
