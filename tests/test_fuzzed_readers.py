"""Every reader of a user's files on generated ones: it reads them, or refuses them with an error of this package's own.

About 2,000 inputs in the default suite and 100,000 among the slow tests, shared out by what a reader costs.
"""

import io
import json
import shutil
import traceback
import warnings
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import tiny_codec_config, tiny_generator

import musicrl_hf
from musicrl_hf import places, records
from musicrl_hf.audio import audio_bytes, match_loudness, read_audio, resample
from musicrl_hf.bundled import resolve
from musicrl_hf.codec import AudioCodec
from musicrl_hf.codec_conversion import convert_encodec_checkpoint
from musicrl_hf.collect.job import CollectJob
from musicrl_hf.config import load_config
from musicrl_hf.evaluation.counting import count_votes, ratings_in
from musicrl_hf.generator import load_generator
from musicrl_hf.preferences.codes import cache_codes
from musicrl_hf.preferences.importers import (
    import_aime,
    import_cmi_pref,
    import_folder,
    import_music_arena,
    import_musiceval,
    import_musicprefs,
    import_songeval,
    read_votes,
)
from musicrl_hf.preferences.importers.sources import open_source
from musicrl_hf.preferences.importers.tables import read_rows
from musicrl_hf.preferences.schema import load_preferences, preferences_from_rows, read_prompts, save_preferences
from musicrl_hf.rewards.combine import load_reward
from musicrl_hf.rewards.preference import PreferenceModel
from musicrl_hf.training.checkpoints import check_checkpoint
from musicrl_hf.training.dpo import DPOJob
from musicrl_hf.training.online import GRPOJob
from musicrl_hf.training.ppo_config import PPOJob
from musicrl_hf.training.reward import RewardJob

RATE = 8000
TONE = 0.3 * torch.sin(torch.arange(RATE // 4) * 0.3)[None]
CLIPS = {f"{name}.wav": audio_bytes(TONE * level, RATE, "wav") for name, level in (("a", 1), ("b", 2))}

# -- what files may hold ---------------------------------------------------------------------------------------------------

# values that readers have met in the wild, and those that break a reader that did not expect them
ODD = [
    *(None, True, False, 0, -1, 1, 2.5, 1e400, float("nan"), 10**30, "", " ", "nan", "inf", "1e400", "a", "b", "tie"),
    *("../x.wav", "/etc/passwd", "a\0b", "n" * 300, "\ud800", "é", "a.wav", "b.wav", "A", "BOTH_BAD", "0x10", "²"),
    *([], {}, [[]], [None], {"a": 1}, ["a"], "=1+1", "2026-01-01", "musicgen", "clap", "encodec"),
]
odd = st.sampled_from(ODD) | st.text(max_size=8) | st.integers() | st.floats()
KEYS = ["prompt", "audio", "system", "score", "audio_a", "audio_b", "preference", "system_a", "system_b", "model_a"]
KEYS += ["model_b", "listener", "confidence", "seconds_a", "seconds_b", "battle_id", "", "other"]
rows = st.lists(st.dictionaries(st.sampled_from(KEYS), odd, max_size=8), max_size=5)


def text_of(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def as_text_file(value) -> bytes:
    return text_of(value).encode("utf-8", "surrogatepass")


def as_json_lines(table: list[dict]) -> bytes:
    return "\n".join(json.dumps(row) for row in table).encode("utf-8", "surrogatepass")


def as_csv(table: list[dict]) -> bytes:
    header = sorted({key for row in table for key in row}) or ["prompt"]
    lines = [",".join(header), *(",".join(text_of(row.get(key)) for key in header) for row in table)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


edit = st.tuples(
    st.integers(0, 2**30),
    st.sampled_from(["set", "insert", "delete", "cut", "repeat"]),
    st.binary(min_size=1, max_size=6)
    | st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b'"', b"\n", b"{", b"[" * 3000]),
)


def edited(*whole: bytes):
    """Whole files with some places overwritten, cut out, doubled, or the end cut off."""

    def apply(case) -> bytes:
        data, edits = case
        for place, kind, piece in edits:
            at = place % (len(data) + 1)
            if kind == "set":
                data = data[:at] + piece + data[at + len(piece) :]
            elif kind == "insert":
                data = data[:at] + piece + data[at:]
            elif kind == "delete":
                data = data[:at] + data[at + len(piece) :]
            elif kind == "cut":
                data = data[:at]
            else:
                data = data[:at] + data[max(0, at - 40) :]
        return data

    return st.tuples(st.sampled_from(whole), st.lists(edit, min_size=1, max_size=4)).map(apply)


def changed(whole: dict):
    """A JSON object with some values, at any depth, replaced or left out."""

    def places_of(value, path=()):
        for key, part in value.items():
            yield (*path, key)
            if isinstance(part, dict):
                yield from places_of(part, (*path, key))

    def apply(changes) -> bytes:
        made = json.loads(json.dumps(whole))
        for path, value, keep in changes:
            part = made
            for key in path[:-1]:
                part = part.get(key) if isinstance(part, dict) else None
            if isinstance(part, dict):
                part.pop(path[-1], None)
                if keep:
                    part[path[-1]] = value
        return json.dumps(made).encode("utf-8", "surrogatepass")

    small = odd.filter(lambda value: not isinstance(value, int) or abs(value) < 1000)  # a user's own sizes are believed
    return st.lists(
        st.tuples(st.sampled_from(sorted(places_of(whole), key=str)), small, st.booleans()), min_size=1, max_size=3
    ).map(apply)


# -- the readers: what they are given, how many of 1,000 inputs they get ---------------------------------------------------


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def with_clips(folder: Path) -> Path:
    for name, clip in CLIPS.items():
        written(folder, name, clip)
    return folder


GOOD_CLIPS = [{"prompt": "air", "audio": f"{name}.wav", "system": name, "score": i} for i, name in enumerate("ab")]
GOOD_PAIR = {"prompt": "air", "audio_a": "a.wav", "audio_b": "b.wav", "preference": "a", "confidence": 3}
GOOD_VOTE = {"prompt": "air", "system_a": "x", "system_b": "y", "preference": "TIE", "listener": "l"}


def clips_jsonl(folder, data):
    written(with_clips(folder), "clips.jsonl", data)
    import_folder(folder, folder / "out")


def clips_csv(folder, data):
    written(with_clips(folder), "clips.csv", data)
    import_folder(folder, folder / "out", score_column="score")


def pairs_csv(folder, data):
    written(with_clips(folder), "pairs.csv", data)
    import_folder(folder, folder / "out")


def prompts_txt(folder, data):
    read_prompts(written(folder, "prompts.txt", data))


def votes_csv(folder, data):
    votes = read_votes(written(folder, "votes.csv", data))
    if len(votes) < 4:
        count_votes(votes)


def votes_json(folder, data):
    read_votes(written(folder, "votes.jsonl", data))


def yaml_file(folder, data):
    path = written(folder, "job.yaml", data)
    for job in (PPOJob, DPOJob, GRPOJob, RewardJob, CollectJob):
        try:
            load_config(job, path)
        except ValueError as error:
            if type(error) is not ValueError:
                raise


def audio_file(folder, data):
    audio, rate = read_audio(data)
    match_loudness(resample(audio, rate, 16_000), 16_000)
    read_audio(written(folder, "a.wav", data), channels=2, start_s=0.01, end_s=0.1)


def json_files(folder, data):
    for name in ("config.json", "adapter_config.json", "model.safetensors.index.json", "result.json", "import.json"):
        here = folder / name.partition(".")[0]
        written(here, name, data)
        for read in (
            *(
                resolve,
                places.contents_of,
                places.model_type_of,
                records.read_record,
                records.read_import,
                records.base_of,
            ),
            *(records.read_collection, lambda where: places.find_model(where, "musicgen")),
            lambda where: places.check_output(where, "a generator"),
        ):
            try:
                read(here)
            except (ValueError, FileNotFoundError) as error:
                if type(error) not in (ValueError, FileNotFoundError):
                    raise


def preference_rows(folder, table):
    preferences_from_rows(table)


def parquet_file(folder, data):
    written(folder, "votes/data/train-00000-of-00001.parquet", data)
    ratings = list(read_rows(open_source(folder / "votes"), ("prompt",)))
    assert ratings
    read_votes(folder / "votes")
    ratings_in(folder / "votes")


def parquet_preferences(folder, data):
    written(folder, "votes/data/train-00000-of-00001.parquet", data)
    load_preferences(folder / "votes")


def data_card(folder, data):
    written(with_clips(folder), "clips.jsonl", as_json_lines(GOOD_CLIPS))
    written(folder, "README.md", data)
    read_rows(open_source(folder), ("prompt",), config="one")


def songeval(folder, data):
    written(with_clips(folder), "metadata.jsonl", data)
    import_songeval(folder, folder / "out")


def music_arena(folder, data):
    written(with_clips(folder), "battle.json", data)
    import_music_arena(folder, folder / "out")


def aime(folder, data):
    written(folder, "00001.wav", CLIPS["a.wav"])
    written(folder, "00002.wav", CLIPS["b.wav"])
    written(folder, "survey.jsonl", data)
    import_aime(folder, folder / "out")


def musicprefs(folder, data):
    written(with_clips(folder), "human_preference.csv", data)
    import_musicprefs(folder, folder / "out")


def cmi_pref(folder, data):
    written(with_clips(folder), "votes.jsonl", data)
    import_cmi_pref(folder, folder / "out")


def musiceval(folder, data):
    written(folder, "wav/S001_P001.wav", CLIPS["a.wav"])
    written(folder, "wav/S002_P001.wav", CLIPS["b.wav"])
    written(folder, "sets/train_mos_list.txt", data)
    written(folder, "prompt_info.txt", data)
    import_musiceval(folder, folder / "out")


def codec_weights(folder, data):
    config = folder / "config.json"
    tiny_codec_config().to_json_file(config)
    convert_encodec_checkpoint(written(folder, "weights.safetensors", data), folder / "out", config)


def codec_config(folder, data):
    save_file({"encoder.model.0.conv.conv.bias": torch.zeros(4)}, folder / "weights.safetensors")
    convert_encodec_checkpoint(folder / "weights.safetensors", folder / "out", written(folder, "config.json", data))


def generator_config(folder, data):
    shutil.copytree(GENERATOR, folder, dirs_exist_ok=True)
    written(folder, "config.json", data)
    load_generator(str(folder))


def generation_config(folder, data):
    shutil.copytree(GENERATOR, folder, dirs_exist_ok=True)
    written(folder, "generation_config.json", data)
    load_generator(str(folder))


def reward_config(folder, data):
    shutil.copytree(GENERATOR.with_name("reward"), folder, dirs_exist_ok=True)
    written(folder, "config.json", data)
    load_reward(f"preference:{folder}")


def codes_cache(folder, data):
    pairs = load_preferences(GENERATOR.with_name("votes"))
    (shard,) = GENERATOR.with_name("codes").rglob("*.safetensors")
    written(folder, f"{shard.parent.name}/{shard.name}", data)
    cache_codes(pairs, CODEC, folder)[:]


def tokenizer_files(folder, data):
    shutil.copytree(GENERATOR, folder, dirs_exist_ok=True)
    written(folder, "tokenizer.json", data)
    written(folder, "tokenizer_config.json", data)
    load_generator(str(folder))


def checkpoint_files(folder, data):
    shutil.copytree(GENERATOR, folder, dirs_exist_ok=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": torch.ones(2), "n": [1, 2]}, folder / name)
    written(folder, "trainer_state.json", b'{"global_step": 1}')
    name = ("optimizer.pt", "rng_state.pth", "trainer_state.json", "model.safetensors")[len(data) % 4]
    written(folder, name, data)
    check_checkpoint(folder)


GENERATOR: Path
CODEC: AudioCodec
READERS: dict = {}  # name: (reader, inputs, share of 1,000)


@pytest.fixture(scope="module", autouse=True)
def inputs(tmp_path_factory):
    global GENERATOR, CODEC
    GENERATOR = tmp_path_factory.mktemp("generator")
    generator = tiny_generator()
    generator.save_pretrained(GENERATOR)
    PreferenceModel.from_generator(generator).save_pretrained(GENERATOR.with_name("reward"))
    CODEC = generator.codec
    sound = [audio_bytes(TONE, RATE, kind) for kind in ("wav", "flac")]
    for kind in ("OGG", "MP3"):
        buffer = io.BytesIO()
        soundfile.write(buffer, TONE.T.numpy(), RATE, format=kind)
        sound.append(buffer.getvalue())
    names = dict.fromkeys(("chosen_model", "rejected_model", "listener", "source"), "x")
    row = {
        "prompt": "air",
        "chosen": sound[0],
        "rejected": sound[1],
        "preference": "a",
        "created_at": "2026-01-01",
    } | names
    save_preferences(preferences_from_rows([row, row | {"rejected_model": "y"}]), GENERATOR.with_name("votes"))
    cache_codes(load_preferences(GENERATOR.with_name("votes")), CODEC, GENERATOR.with_name("codes"))
    (codes,) = (path.read_bytes() for path in GENERATOR.with_name("codes").rglob("*.safetensors"))
    (parquet,) = (path.read_bytes() for path in GENERATOR.with_name("votes").rglob("*.parquet"))
    config = json.loads((GENERATOR / "config.json").read_text())
    sampling = json.loads((GENERATOR / "generation_config.json").read_text())
    reward = json.loads((GENERATOR.with_name("reward") / "config.json").read_text())
    tokenizer = (GENERATOR / "tokenizer.json").read_bytes()
    codec = tiny_codec_config().to_dict()
    save_file({"encoder.model.0.conv.conv.bias": torch.zeros(4)}, GENERATOR.with_name("codec.safetensors"))
    weights = GENERATOR.with_name("codec.safetensors").read_bytes()
    buffer = io.BytesIO()
    torch.save({"step": torch.ones(2), "n": [1, 2]}, buffer)
    job = yaml.safe_dump(
        {"prompts": "p.txt", "output_dir": "o", "learning_rate": 1e-4, "reward": ["adherence"], "seed": 1}
    )
    fields = [
        "prompts",
        "output_dir",
        "learning_rate",
        "reward",
        "seed",
        "preferences",
        "ties",
        "max_steps",
        "bf16",
        "x",
    ]
    yaml_values = odd.filter(lambda value: "\ud800" not in str(value))
    jobs = st.dictionaries(
        st.sampled_from(fields) | yaml_values.filter(lambda v: not isinstance(v, list | dict)), yaml_values
    )
    card = b"---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: '*.jsonl'\n---\nText\n"
    rating = dict.fromkeys(("Coherence", "Musicality", "Memorability", "Clarity", "Naturalness"), 3)
    songs = [{"file_name": f"{name}.wav", "annotation": [rating | {"Clarity": i}]} for i, name in enumerate("ab")]
    battle = {
        "prompt": {"prompt": "p"},
        "timestamp": 1.7e9,
        "vote": {"preference": "A"},
        "a_metadata": {},
        "audio_a": "a.wav",
        "audio_b": "b.wav",
    }
    survey = {"question-type": "Music Quality", "description": "air", "answer": 1}
    for side in "12":
        survey |= {f"model-{side}": side, f"track-{side}-id": int(side)}
        survey |= {f"track-{side}-begin": "00:00:00", f"track-{side}-end": "00:00:01"}
    preferred = {"audio_a": "a.wav", "audio_b": "b.wav", "caption": "air", "musicality": "a_wins"}
    cmi = {"audio-path": "a.wav", "audio2": "b.wav", "prompt": "air", "model_a": "x", "model_b": "y"}
    cmi |= {"preference-musicality": "model_a", "confidence_preference-musicality": 3}
    preference = dict.fromkeys(("prompt", "chosen", "rejected", "preference", "created_at", "confidence", *names), odd)
    READERS.update(
        clips_jsonl=(clips_jsonl, rows.map(as_json_lines) | edited(as_json_lines(GOOD_CLIPS)), 124),
        clips_csv=(clips_csv, rows.map(as_csv) | edited(as_csv(GOOD_CLIPS)), 90),
        pairs_csv=(pairs_csv, rows.map(as_csv) | edited(as_csv([GOOD_PAIR])), 90),
        prompts_txt=(prompts_txt, st.binary(max_size=40) | edited("air\n\u2028jig\n".encode()), 120),
        votes_csv=(votes_csv, rows.map(as_csv) | edited(as_csv([GOOD_VOTE] * 2)), 120),
        votes_json=(votes_json, rows.map(as_json_lines) | edited(as_json_lines([GOOD_VOTE])), 80),
        yaml_file=(yaml_file, jobs.map(lambda job: yaml.safe_dump(job).encode()) | edited(job.encode()), 60),
        audio_file=(audio_file, edited(*sound) | st.binary(max_size=60), 120),
        json_files=(
            json_files,
            edited(json.dumps(config).encode()) | odd.map(as_text_file) | changed(config),
            50,
        ),
        preference_rows=(preference_rows, st.lists(st.fixed_dictionaries({}, optional=preference), max_size=2), 60),
        parquet_file=(parquet_file, edited(parquet), 12),
        parquet_preferences=(parquet_preferences, edited(parquet), 3),
        data_card=(data_card, edited(card), 12),
        songeval=(songeval, edited(as_json_lines(songs)) | rows.map(as_json_lines), 10),
        music_arena=(music_arena, edited(json.dumps(battle).encode()) | changed(battle), 6),
        aime=(aime, edited(as_json_lines([survey])) | changed(survey), 8),
        musicprefs=(
            musicprefs,
            edited(as_csv([preferred])) | changed(preferred).map(lambda row: as_csv([json.loads(row)])),
            6,
        ),
        cmi_pref=(cmi_pref, edited(as_json_lines([cmi])) | changed(cmi), 6),
        musiceval=(musiceval, edited(b"S001_P001.wav,3.0,4.0\nS002_P001.wav,2,2\n", b"id\tprompt\nP001\tair\n"), 6),
        codec_weights=(codec_weights, edited(weights), 3),
        codec_config=(codec_config, changed(codec), 3),
        generator_config=(generator_config, changed(config), 2),
        generation_config=(generation_config, changed(sampling) | edited(json.dumps(sampling).encode()), 2),
        reward_config=(reward_config, changed(reward), 2),
        codes_cache=(codes_cache, edited(codes), 2),
        tokenizer_files=(tokenizer_files, edited(tokenizer), 1),
        checkpoint_files=(checkpoint_files, edited(buffer.getvalue(), b'{"global_step": 1}'), 2),
    )


def is_ours(error: BaseException) -> bool:
    """ValueError or FileNotFoundError itself, or one that this package defines, raised here and not below; and it says something."""
    own = type(error) in (ValueError, FileNotFoundError) or type(error).__module__.startswith("musicrl_hf")
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return own and raised_in.is_relative_to(Path(musicrl_hf.__file__).parent) and len(str(error)) > 10


def fuzz(name: str, inputs_of_all: int, folder: Path) -> None:
    reader, strategy, share = READERS[name]
    wanted, tried = max(5, inputs_of_all * share // 1000), 0

    @seed(inputs_of_all)
    @settings(
        max_examples=wanted,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @given(strategy)
    def read(data):
        nonlocal tried
        tried += 1
        here = folder / "here"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        try:
            reader(here, data)
        except Exception as error:
            if not is_ours(error):
                raise

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read()
    assert tried >= wanted


NAMES = """clips_jsonl clips_csv pairs_csv prompts_txt votes_csv votes_json yaml_file audio_file json_files preference_rows
parquet_file parquet_preferences data_card songeval music_arena aime musicprefs cmi_pref musiceval codec_weights codec_config
generator_config generation_config reward_config codes_cache tokenizer_files checkpoint_files""".split()


def test_each_reader_has_its_share():
    assert set(NAMES) == set(READERS)
    assert sum(share for _, _, share in READERS.values()) == 1000


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_on_some_files(name, tmp_path, monkeypatch, capsys):
    fuzz(name, 2000, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_on_many_files(name, tmp_path, capsys):
    fuzz(name, 100_000, tmp_path)
