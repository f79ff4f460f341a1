import gc
import inspect
import json
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from published import write_table, write_tones
from tiny import tiny_generator

from musicrl_hf.audio import read_audio, write_audio
from musicrl_hf.cli import IMPORTS, JOBS, main
from musicrl_hf.preferences import importers
from musicrl_hf.preferences.importers.ratings import SONGEVAL_AXES
from musicrl_hf.rewards import scoring


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_generator().save_pretrained(folder)
    return str(folder)


def loudness_reward(prompts, audio, sampling_rate):
    return audio.square().mean((1, 2))


def test_generate_writes_clips(model, tmp_path):
    single = ["generate", "slow piano", "--model", model, "--duration", "0.5", "--seed", "3"]
    assert main([*single, "-o", str(tmp_path / "a.wav")]) == 0
    assert main([*single, "-o", str(tmp_path / "b.wav")]) == 0
    audio, rate = read_audio(tmp_path / "a.wav")
    assert (rate, audio.shape) == (400, (1, 200))
    assert torch.equal(audio, read_audio(tmp_path / "b.wav")[0])
    assert main([*single, "-n", "2", "-o", str(tmp_path / "many.flac")]) == 0
    assert {path.name for path in tmp_path.glob("many*")} == {"many_1.flac", "many_2.flac"}
    for name in ("a.ogg", "b.ogg"):
        assert main([*single, "-o", str(tmp_path / name)]) == 0
    lossy, rate = read_audio(tmp_path / "a.ogg")
    assert (rate, lossy.shape) == (400, (1, 200))
    assert torch.equal(lossy, read_audio(tmp_path / "b.ogg")[0])
    assert (tmp_path / "a.ogg").read_bytes() == (tmp_path / "b.ogg").read_bytes()


def test_generate_samples_among_the_likeliest_codes_or_all(model, tmp_path):
    found = {}
    for top_k in (1, 0):
        for seed in (3, 4):
            path = tmp_path / f"{top_k}_{seed}.wav"
            words = ["generate", "slow piano", "--model", model, "--duration", "0.5", "--seed", str(seed)]
            assert main([*words, "--top_k", str(top_k), "-o", str(path)]) == 0
            found[top_k, seed] = path.read_bytes()
    assert found[1, 3] == found[1, 4]
    assert len(set(found.values())) == 3
    assert main([*words, "--top_k", "-1"]) == 2


@pytest.mark.parametrize("words", [["--traceback", "generate", " "], ["generate", " ", "--traceback"]])
def test_a_traceback_is_shown_wherever_it_is_asked_for(words):
    with pytest.raises(ValueError, match="`prompt` is ' '"):
        main(words)
    assert main(["generate", " "]) == 2


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score_clips", stopped)
    words = ["score", "--reward", "quality", "--prompt", "slow piano", "a.wav"]
    assert main(words) == 130
    assert capsys.readouterr().err == "\nmusicrl: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        main(["--traceback", *words])


def test_generate_keeps_the_best_of_several_by_a_reward(model, tmp_path, capsys):
    words = ["generate", "slow piano", "--model", model, "--duration_s", "0.5", "--seed", "3"]
    reward = ["--reward", f"2*{__name__}:loudness_reward"]
    assert main([*words, "-o", str(tmp_path / "plain.wav")]) == 0
    assert main([*words, *reward, "-o", str(tmp_path / "one.wav")]) == 0
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "plain.wav").read_bytes()
    capsys.readouterr()
    assert main([*words, *reward, "--best_of", "4", "-n", "2", "-o", str(tmp_path / "best.wav")]) == 0
    told = re.findall(r"Wrote (.*) \((.*) (-?\d+\.\d+), best of 4\)", capsys.readouterr().out)
    assert [Path(path).name for path, _, _ in told] == ["best_1.wav", "best_2.wav"]
    for path, label, score in told:
        assert label == f"2*{__name__}:loudness_reward"
        assert float(score) == pytest.approx(2 * float(read_audio(path)[0].square().mean()), abs=1e-3)


def test_the_default_file_is_never_written_over(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "slow piano", "--model", model, "--duration_s", "0.5", "--seed", "3"]
    assert main(words) == 0
    first = (tmp_path / "out.wav").read_bytes()
    capsys.readouterr()
    words[-1] = "4"
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "musicrl: error: `output`: out.wav is there already; name a file, as in -o another.wav or -o out.wav.\n"
    )
    assert (tmp_path / "out.wav").read_bytes() == first
    assert main([*words, "-o", "out.wav"]) == 0
    assert (tmp_path / "out.wav").read_bytes() != first


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["generate", "piano", "--durattion_s", "3"], "unknown argument --durattion_s: did you mean --duration_s?"),
        (["generate", "piano", "--temprature=3"], "unknown argument --temprature: did you mean --temperature?"),
        (["generate", "slow", "piano"], "too many arguments: piano; put quotes around a text of several words\n"),
        (
            ["score", "--reward", "quality", "adherence", "--prompt", "a reel", "out.wav"],
            "too many arguments: out.wav; put quotes around a text of several words; give --reward once for each reward",
        ),
        (["push", "a", "me/b", "--licence", "mit"], "unknown argument --licence: did you mean --license?"),
        (["push", "a", "me/b", "--xyzzy"], "unknown argument --xyzzy: it takes --base_model"),
    ],
)
def test_an_unknown_argument_is_told_with_the_nearest_known_one(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert f"musicrl {words[0]}: error: {complaint}" in capsys.readouterr().err


def test_a_folder_of_another_kind_is_not_written_into(model, tmp_path, capsys):
    (tmp_path / "votes/data").mkdir(parents=True)
    (tmp_path / "votes/data/train.parquet").write_bytes(b"")
    (tmp_path / "prompts.txt").write_text("a reel\n")
    prompts, votes = str(tmp_path / "prompts.txt"), str(tmp_path / "votes")
    writes = {
        "preference reward": ["reward", "--preferences", votes, "--output_dir", model],
        "generator": ["dpo", "--preferences", votes, "--output_dir", votes],
        "an adapter": ["ppo", "--prompts", prompts, "--output_dir", model, "--lora_r", "2"],
        " generator": ["rloo", "--prompts", prompts, "--output_dir", votes],
        "a generator": ["grpo", "--prompts", prompts, "--output_dir", votes],
        "evaluation": ["evaluate", "--models", model, "--prompts", prompts, "--out", model],
        "whole loop": ["align", "--output_dir", model],
        "preferences": ["import", "folder", str(tmp_path), "--out", model],
        "votes": ["import", "battles", str(tmp_path / "v.csv"), "--out", model],
        "a codec": ["convert-codec", "encodec_24khz", model],
    }
    before = sorted(Path(model).iterdir())
    for made, words in writes.items():
        assert main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(
            rf"holds (a generator|preferences), and this command writes .*{made}.*another folder", error
        ), error
    assert sorted(Path(model).iterdir()) == before


def test_evaluate_tells_a_wrong_name_before_it_samples(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a reel\n")
    words = ["evaluate", "--models", model, "second=no/such", "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "`models` = 'no/such'" in capsys.readouterr().err
    words[3] = f"second={model}"
    assert main([*words, "--rewards", "quality", "preference:no/such", "--out", str(tmp_path / "out")]) == 2
    assert "`reward` = 'no/such'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_says_what_was_written(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "votes.csv").write_text("prompt,model_a,model_b,preference,listener\nair,x,y,a,ann\nreel,x,y,a,ann\n")
    assert main(["evaluate", "--votes", str(tmp_path / "votes.csv"), "--out", str(tmp_path / "out")]) == 0
    assert (f"Wrote {tmp_path / 'out'}" in capsys.readouterr().out) == (rank == "0")
    assert (tmp_path / "out" / "results.json").is_file()


def test_a_job_that_is_done_leaves_the_other_processes():
    """And ends the threads between them, though a data-parallel model that nobody collected holds on to the group."""

    def gloo_threads():
        names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]  # none where there is no /proc
        return [name for name in names if "gloo" in name]

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    gc.disable()  # else it may come by itself, or not
    try:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model.itself = [model]
        del model
        assert gloo_threads() or not Path("/proc").exists()
        assert main(["power"]) == 0
        assert not torch.distributed.is_initialized()
        assert not gloo_threads()
    finally:
        gc.enable()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_training_says_on_what_it_runs_and_one_short_line_for_each_log(model, tmp_path):
    """In a process of its own, as a user starts it: what libraries say besides would stand there too."""
    (tmp_path / "prompts.txt").write_text("slow air\nfast reel\n")
    words = ["rloo", "--model", model, "--prompts", "prompts.txt", "--reward", "test_cli:loudness_reward"]
    words += ["--output_dir", "out", "--max_steps", "2", "--logging_steps", "1", "--duration_s", "0.2"]
    words += ["--per_device_train_batch_size", "4", "--num_generations", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "musicrl_hf.cli", *words]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    where = lines.pop(0)
    assert re.fullmatch(r"Training on 1 x CPU \(.+, \d+ threads\), in the weights' own precision\.", where), where
    assert json.loads((tmp_path / "out" / "result.json").read_text())["hardware"] in where
    assert [line.partition(":")[0] for line in lines[:-1]] == ["step 1 of 2", "step 2 of 2", "step 2 of 2"]
    assert re.fullmatch(
        r"step 1 of 2: loss [-\d.e]+, reward [-\d.e]+, kl [-\d.e]+, .*learning_rate [-\d.e]+", lines[0]
    ), lines
    assert lines[-1] == "Wrote out"
    for noise in ("Warning", "PAD/BOS/EOS", "Loading weights", "Writing model shards", "{"):
        assert noise not in run.stderr + run.stdout


def test_generate_shows_a_bar_of_its_steps_on_a_terminal_alone(model, tmp_path):
    command = [sys.executable, "-m", "musicrl_hf.cli", "generate", "slow air", "--model", model, "--duration", "1"]
    command += ["--temperature", "1", "--guidance_scale", "1", "--top_k", "0", "-o"]
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    subprocess.run([*command, str(tmp_path / "a.wav")], stderr=follower, stdout=follower, check=True, timeout=300)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert re.search(r"generating: +\d+%.*\d+/\d+ \[", shown), shown
    run = subprocess.run([*command, str(tmp_path / "b.wav")], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.splitlines() == [f"Wrote {tmp_path / 'b.wav'}"]
    assert "generating" not in run.stderr


def test_score_prints_each_reward_and_the_users_own_function(model, tmp_path, capsys, monkeypatch):
    write_audio(tmp_path / "loud.wav", torch.full((1, 400), 0.5), 400)
    write_audio(tmp_path / "soft.wav", torch.full((1, 400), 0.1), 400)
    monkeypatch.chdir(Path(__file__).parent)
    clips = [str(tmp_path / "loud.wav"), str(tmp_path / "soft.wav")]
    assert main(["score", "--reward", "test_cli:loudness_reward", "--prompt", "piano", *clips]) == 0
    printed = capsys.readouterr().out
    assert "loud.wav" in printed
    assert "0.25" in printed  # 0.5 squared
    assert "0.01" in printed  # 0.1 squared


def test_import_takes_the_options_of_its_kind(tmp_path, capsys):
    songs = [{"file_name": f"{n}.flac", "annotation": [dict.fromkeys(SONGEVAL_AXES, n + 1)]} for n in range(3)]
    write_table(tmp_path / "songs/metadata.jsonl", songs)
    write_tones(tmp_path / "songs", {"0.flac": 300, "1.flac": 400})
    words = ["import", "songeval", str(tmp_path / "songs"), "--out", str(tmp_path / "out")]
    words += ["--criterion", "clarity", "--min_gap", "0.1", "--pairs_per_prompt", "5", "--crop_s", "0.5"]
    assert main([*words, "--skip_bad_clips"]) == 0
    assert capsys.readouterr().out == (
        f"Wrote {tmp_path / 'out'}: 1 comparisons (1 decided, 0 ties) of 1 prompts, systems unknown; left out: 1 clip missing\n"
    )
    options = json.loads((tmp_path / "out/import.json").read_text())["options"]
    assert options == {
        "crop_s": 0.5,
        "loudness_lufs": -23.0,
        "skip_bad_clips": True,
        "min_gap": 0.1,
        "pairs_per_prompt": 5,
    }
    for name, takes in IMPORTS.values():
        parameters = set(inspect.signature(getattr(importers, name)).parameters)
        assert set(takes) - {"crop_s", "skip_bad_clips"} <= parameters


@pytest.mark.parametrize("job", JOBS)
def test_every_job_explains_its_fields(job, capsys):
    assert main([job, "--help"]) == 0
    printed = capsys.readouterr().out
    if job != "power":  # which writes nothing and needs nothing
        assert any(name in printed for name in ("--output_dir", "--out", "--store"))
        assert ("required" in printed) != (
            job in ("collect", "align")
        )  # which open a page, run a recipe, with nothing given
    if job == "align":
        assert next(line for line in printed.splitlines() if "--pairs_per_prompt" in line).endswith("(default 12)")
    described = [line for line in printed.splitlines() if line.startswith("  --")]
    assert described
    assert all(len(line.split("  ")) > 2 for line in described), "a field without help"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["generate", "piano", "--model", "musicrl-huge"], "musicrl-huge.*musicrl-tiny"),
        (["generate", "piano", "--duration", "31"], r"`duration_s` must be in \(0, 30\]"),
        (["generate", "piano", "-o", "clip.mp4"], "`output` must end in .wav, .flac or .ogg, got 'clip.mp4'; give it"),
        (["generate", "piano", "-n", "0"], "`number` must be at least 1"),
        (["generate", "piano", "--best_of", "4"], "`best_of` is 4, and `reward` is not given"),
        (["generate", "piano", "--best_of", "0", "--reward", "quality"], "`best_of` is 0"),
        (["generate", " "], "`prompt` is ' ': say what to play"),
        (["generate", "piano", "--duration_s", "31"], r"`duration_s` must be in \(0, 30\]"),
        (["generate", "piano", "--temperature", "0"], "`temperature` must be above 0"),
        (["generate", "piano", "--guidance_scale", "0.5"], "`guidance_scale` must be at least 1"),
        (["generate", "piano", "--model", "nosuch/model"], "`model` = 'nosuch/model'.*HF_HUB_OFFLINE"),
        (["score", "--reward", "adherence", "--prompt", "p", "gone.wav"], "there is no file gone.wav"),
        (["score", "--reward", "adherence", "--prompt", "", "gone.wav"], "`prompt` is empty"),
        (
            ["score", "--reward", "adherence", "--reward", "preference:no/such", "--prompt", "p", "c.wav"],
            "no/such.*HF_HUB",
        ),
        (
            ["reward", "--preferences", "runs/votes", "--output_dir", "o"],
            "`preferences` = 'runs/votes'.*musicrl import",
        ),
        (["dpo", "--preferences", "p", "--output_dir", "o", "--model", "no/such"], "`model` = 'no/such'"),
        (["dpo", "--preferences", "p", "--output_dir", "o", "--betta", "1"], "`betta`.*did you mean `beta`"),
        (["ppo", "--config", "missing.yaml"], "there is no file missing.yaml"),
        (["align", "--recipe", "huge"], "`recipe` = 'huge' is neither a bundled recipe"),
        (["score", "--reward", "beauty", "--prompt", "p", "clip.wav"], "beauty"),
        (["import", "folder", "nowhere", "--out", "o"], "nowhere"),
        (["import", "aime", "nowhere", "--out", "o"], "there is no folder nowhere"),
        (["import", "cmi-pref", ".", "--out", "o"], "has no table"),
        (
            ["import", "folder", ".", "--out", "o", "--config", "x"],
            "--config is x: `import folder` takes --score_column",
        ),
        (["import", "battles", "v.csv", "--out", "o", "--min_gap", "1"], "--min_gap is 1.0.*takes no option but --out"),
        (["import", "songeval", ".", "--out", "o", "--crop_s", "-1"], "crop_s is -1.0"),
        (["push", "nowhere", "me/model"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(words, complaint, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "--model" not in words and words[0] == "generate":
        words = [*words, "--model", model]
    assert main(words) == 2
    printed = capsys.readouterr().err
    error = printed.strip().splitlines()[-1]  # what stands before it is the progress of loading
    assert error.startswith("musicrl: error: ")
    assert "Traceback" not in printed
    assert re.search(complaint, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_broken_torchaudio_is_one_clear_line(tmp_path):
    """As PyPI's torchaudio beside a CPU-only torch: it cannot load its library."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "musicrl_hf.cli", "generate", "piano"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "libcudart.so.13" in run.stderr
    assert "fresh environment" in run.stderr
    code = "import musicrl_hf\ntry:\n    musicrl_hf.load_generator\nexcept ImportError as error:\n    print(error)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "do not fit together" in run.stdout
