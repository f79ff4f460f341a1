"""The evaluation end to end on tiny generators: what is counted, what is written, and a page that is safe to open."""

import base64
import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny import tiny_generator

from musicrl_hf.audio import audio_bytes, match_loudness, read_audio
from musicrl_hf.config import load_config
from musicrl_hf.evaluation.metrics import CLIP_METRICS, DIVERSITY_METRICS, clip_metrics, distinct_ngrams
from musicrl_hf.evaluation.page import METRIC_LABELS, headline
from musicrl_hf.evaluation.report import EvaluateJob, evaluate_models, evaluate_votes, label_models, run_evaluate
from musicrl_hf.evaluation.study import best_of_player
from musicrl_hf.evaluation.win_rates import Rating, as_json, mean_opinion_scores, win_rate
from musicrl_hf.preferences.importers import import_battles, read_votes
from musicrl_hf.preferences.listeners import simulated_listeners
from musicrl_hf.preferences.schema import Vote, preferences_from_rows, save_preferences
from musicrl_hf.rewards.best_of import SEED_STEP, best_of

ATTACK = 'a slow <script>alert("x")</script> & "air"'
PROMPTS = ["slow air", "fast reel", ATTACK, "jazz piano", "loud rock"]


def level(prompts, audio, sampling_rate):
    return audio.abs().mean((1, 2))


class Page(HTMLParser):
    """Collects tags, and whether they are closed in order."""

    VOID = {"meta", "link", "line", "circle", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    models = {"base": tiny_generator(seed=0), "tuned <1>": tiny_generator(seed=1)}
    result = evaluate_models(
        models,
        PROMPTS,
        out,
        listeners=simulated_listeners(7),
        rewards={"level": level},
        duration_s=1.0,
        batch_size=4,
        players=3,
        seed=3,
    )
    return out, models, result


def test_result_is_what_a_direct_count_gives(study):
    out, models, result = study
    assert json.loads((out / "results.json").read_text()) == result
    votes = read_votes(out / "votes.csv")
    with open(out / "ratings.csv", newline="") as file:
        ratings = [Rating(r["prompt"], r["model"], float(r["score"]), r["listener"]) for r in csv.DictReader(file)]
    assert [as_json(score) for score in mean_opinion_scores(ratings, seed=result["settings"]["seed"])] == result["mos"]
    assert len(votes) == len(PROMPTS) * 2 * 3, "two clips a prompt, three listeners a clip, one pair of models"
    wins = sum(vote.preference == "a" for vote in votes)
    losses = sum(vote.preference == "b" for vote in votes)
    (rate,) = (r for r in result["win_rates"] if r["model"] == "base")
    assert (rate["wins"], rate["losses"], rate["ties"]) == (wins, losses, len(votes) - wins - losses)
    assert 0 <= rate["wilcoxon_p"] <= 1
    assert {score["count"] for score in result["mos"]} == {len(votes)}


def test_the_numbers_are_those_of_the_clips(study):
    out, models, result = study
    options = {"top_k": None, "guidance_scale": 1.0, "duration_s": 1.0}
    # Four clips a batch, two a prompt: prompts 0 and 1 are sampled with seed 3, 2 and 3 with 5, 4 with 7.
    batches = [
        models["base"].sample([p for p in PROMPTS[i : i + 2] for _ in range(2)], seed=3 + i, **options)
        for i in (0, 2, 4)
    ]
    audio, codes = (torch.cat([getattr(b, name) for b in batches]) for name in ("audio", "codes"))
    metrics = result["metrics"]["base"]
    expected = clip_metrics(audio, 400)["spectral_flatness"].mean()
    assert metrics["spectral_flatness"]["mean"] == pytest.approx(float(expected), rel=1e-4)
    assert metrics["distinct_ngrams"] == distinct_ngrams(codes)
    assert metrics["harmony_distance"]["count"] == len(PROMPTS)
    (mean,) = (m for m in result["rewards"]["level"]["means"] if m["model"] == "base")
    assert mean["mean"] == pytest.approx(float(level(None, audio, 400).mean()), rel=1e-4)
    saved, _ = read_audio(out / "clips" / "base" / "0001.flac")
    assert torch.allclose(saved, match_loudness(audio[2], 400), atol=1e-4)
    ratings = [
        float(simulated_listeners(7)[(clip * 3 + turn) % 7].rate([p], match_loudness(audio[clip], 400)[None], 400))
        for clip, p in enumerate(p for p in PROMPTS for _ in range(2))
        for turn in range(3)
    ]
    (score,) = (s for s in result["mos"] if s["model"] == "base")
    assert score["mean"] == pytest.approx(sum(ratings) / len(ratings))


def test_metrics_are_called_what_a_reader_calls_them(study):
    out, _, result = study
    text = "".join(Page((out / "index.html").read_text()).text)
    names = list(result["metrics"]["base"])
    assert set(names) == {*CLIP_METRICS, *DIVERSITY_METRICS, "distinct_ngrams"} == set(METRIC_LABELS)
    for name in names:
        assert METRIC_LABELS[name] in text
        assert re.search(r"\((share(?: of the \w+)?, )?0 to 1\)$|\(dB\)$", METRIC_LABELS[name]), "a unit"
        assert name not in text
        assert name.replace("_", " ") not in text


def test_the_page_stands_alone_and_escapes_what_users_wrote(study):
    out, _, _ = study
    text = (out / "index.html").read_text()
    page = Page(text)
    assert not page.open, "every element is closed"
    assert len(page.all("script")) == 1
    assert 'alert("x")' in "".join(page.text), "the prompt is there, as text"
    assert "tuned <1>" in "".join(page.text)
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "data", "poster")]
    assert addresses
    assert all(address.startswith("data:audio/flac;base64,") for address in addresses)
    assert not re.search(r"url\(|@import|https?:", text)
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.all("meta"))
    assert len(page.all("audio")) == 3 * 2, "three prompts are played, by two models"
    assert all(player["aria-label"] for player in page.all("audio"))
    assert len(page.all("table")) == 4
    assert all(table["aria-label"] for table in page.all("table"))
    assert len(page.all("figcaption")) == 4 + 2 + 3 * 2, "a caption for each table, plot and player"
    assert "2 clips of 1 s each, 3 ratings a clip. This page plays the first of the 2 clips." in "".join(page.text)
    assert {cell["data-head"] for cell in page.all("td") if "data-head" in cell} == {
        "Win / tie / loss %",
        "Win rate",
        "Comparisons",
        "Wilcoxon p",
    }
    assert len({attrs["id"] for _, attrs in page.tags if "id" in attrs}) == len(page.all("h2"))
    assert "simulated" in "".join(page.text)
    first = base64.b64decode(addresses[0].partition(",")[2])
    assert first == (out / "clips" / "base" / "0000.flac").read_bytes()


@pytest.mark.parametrize("column", ["", "battle_id,"])
def test_votes_without_prompts_are_not_said_to_have_some(tmp_path, capsys, column):
    rows = [f"{f'b{n},' if column else ''}x,y,{'ab'[n % 2]}" for n in range(9)]
    (tmp_path / "votes.csv").write_text("\n".join([f"{column}system_a,system_b,preference", *rows]) + "\n")
    page = run_evaluate(EvaluateJob(votes=str(tmp_path / "votes.csv"), out=str(tmp_path / "out"))).read_text()
    warning = "9 votes: too few to tell systems apart. Intervals are drawn over votes, and with fewer than 10"
    assert capsys.readouterr().out.startswith(f"Warning: {warning}")
    assert warning in page
    assert "9 votes between 2 systems." in page
    assert "prompt" not in page.partition("<body>")[2]
    # Nor is what was imported from there, or counted once before.
    import_battles(tmp_path / "votes.csv", tmp_path / "imported")
    for number, source in enumerate((tmp_path / "imported" / "votes.csv", tmp_path / "out" / "votes.csv")):
        assert evaluate_votes(source, tmp_path / f"again_{number}")["prompts"] is None


def test_ratings_of_an_evaluation_before_do_not_stay(tmp_path):
    votes = [Vote(f"p{n}", "x", "y", "ab"[n % 2], "3fa5") for n in range(10)]
    (tmp_path / "ratings.csv").write_text("prompt,model,score,listener\np0,x,3,simulated-2-0\n")
    evaluate_votes(votes, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "results.json", "votes.csv"]


def test_what_came_out_is_said_in_the_terminal(tmp_path, capsys):
    """x against y: won 6 of 10 prompts, lost 2, tied 2, so 75 % of 8; with z, x won 6 and 2 of 10 decided."""
    votes = [Vote(f"p{n}", "x", "y", "a" if n < 6 else "b" if n < 8 else "tie", "3fa5") for n in range(10)]
    rate = win_rate(votes, "x", "y")
    line = (
        f"x preferred to y in 75 % [{100 * rate.low:.0f}, {100 * rate.high:.0f}] of 8 decided votes, 2 ties beside them"
    )
    assert headline(evaluate_votes(votes, tmp_path)) == line
    more = [Vote("p0", "z", "x", "b", "simulated-2-0"), Vote("p1", "z", "x", "b", "3fa5")]
    told = headline(evaluate_votes(votes + more, tmp_path))
    assert told.startswith("x preferred to the others in 80 % [")
    assert told.endswith("of 10 decided votes, 2 ties beside them (1 of 2 listeners are simulated)")
    ties = [Vote(f"p{n}", "x", "y", "tie") for n in range(10)]
    assert headline(evaluate_votes(ties, tmp_path)) == "x preferred to y in no vote: 10 ties and nothing else"

    models = {name: tiny_generator(seed=seed) for seed, name in enumerate(("base", "one", "two"))}
    prompts = [f"slow air {n}" for n in range(10)]
    study = {"listeners": simulated_listeners(3), "duration_s": 0.2, "samples_per_prompt": 1}
    result = evaluate_models(models, prompts, tmp_path, **study)
    rates = {rate["model"]: rate for rate in result["win_rates"] if rate["against"] == "base"}
    lines = headline(result).splitlines()
    assert len(lines) == 2
    for name, told in zip(("one", "two"), lines, strict=True):
        assert told.startswith(f"{name} preferred to base in ")
        assert f"of {rates[name]['wins'] + rates[name]['losses']} decided rating" in told
        assert told.endswith("(the listeners are simulated)")


def test_one_model_by_itself_has_its_mean_rating_said(tmp_path, capsys):
    tiny_generator().save_pretrained(tmp_path / "only")
    (tmp_path / "prompts.txt").write_text("slow air\nfast reel\n")
    words = ["--models", str(tmp_path / "only"), "--prompts", str(tmp_path / "prompts.txt")]
    words += ["--out", str(tmp_path / "out"), "--duration_s", "0.5", "--samples_per_prompt", "1", "--listeners", "3"]
    run_evaluate(load_config(EvaluateJob, overrides=words))
    (score,) = json.loads((tmp_path / "out" / "results.json").read_text())["mos"]
    assert capsys.readouterr().out.splitlines()[1] == (
        f"only has a mean rating of {score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}] of 6 ratings; give a "
        "second generator to compare it with (the listeners are simulated)"
    )


@pytest.mark.parametrize(("prompts", "warned"), [(9, True), (10, False)])
def test_few_prompts_are_warned_of_on_the_page_and_in_the_terminal(tmp_path, capsys, prompts, warned):
    rows = [f"p{n},x,y,{'ab'[n % 2]}" for n in range(prompts)]
    (tmp_path / "votes.csv").write_text("\n".join(["prompt,system_a,system_b,preference", *rows]) + "\n")
    page = run_evaluate(EvaluateJob(votes=str(tmp_path / "votes.csv"), out=str(tmp_path / "out")))
    printed = capsys.readouterr().out
    assert printed.startswith("Warning: 9 prompts: too few to tell systems apart.") is warned
    assert ("too few to tell systems apart" in page.read_text()) is warned


def test_best_of_n_is_a_system_beside_the_others(study, tmp_path):
    _, models, plain = study
    result = evaluate_models(
        models,
        PROMPTS,
        tmp_path,
        listeners=simulated_listeners(7),
        rewards={"level": level},
        best_of=3,
        best_of_reward=level,
        best_of_name="level",
        duration_s=1.0,
        batch_size=4,
        players=3,
        seed=3,
    )
    assert result["models"] == ["base", "tuned <1>", "base best of 3"]
    assert result["best_of"] == {"model": "base best of 3", "of": "base", "n": 3, "reward": "level"}
    assert plain["best_of"] is None
    assert result["metrics"]["base"] == plain["metrics"]["base"], "the others are played as without it"
    options = {"top_k": None, "guidance_scale": 1.0, "duration_s": 1.0}
    kept = [
        best_of(
            models["base"],
            [p for p in PROMPTS[i : i + 2] for _ in range(2)],
            3,
            level,
            seed=3 + i + SEED_STEP,
            **options,
        )
        for i in (0, 2, 4)
    ]
    means = {mean["model"]: mean["mean"] for mean in result["rewards"]["level"]["means"]}
    assert means["base best of 3"] == pytest.approx(float(torch.cat([scores for _, scores in kept]).mean()), rel=1e-4)
    assert means["base best of 3"] > means["base"]
    text = "".join(Page((tmp_path / "index.html").read_text()).text)
    assert "base best of 3: of 3 clips that base plays, the one that the reward level scores highest." in text


def test_best_of_n_does_not_choose_among_the_clips_that_it_is_compared_with():
    """A clip against itself is a tie, which is left out; what is left would be won by the reward's choice alone."""
    model = tiny_generator()
    heard: list[bytes] = []

    def listening(prompts, audio, sampling_rate):
        heard.extend(clip.numpy().tobytes() for clip in audio)
        return level(prompts, audio, sampling_rate)

    options = {"duration_s": 0.4, "temperature": 1.0, "top_k": None, "guidance_scale": 1.0}
    best_of_player(model, 4, listening, "level")(PROMPTS, seed=1, **options)
    plain = {clip.numpy().tobytes() for clip in model.sample(PROMPTS, seed=1, **options).audio}
    assert len(set(heard)) == 4 * len(PROMPTS)
    assert not plain & set(heard)


@pytest.mark.parametrize(
    "given", [{"prompts": "p.txt"}, {"rewards": ["quality"]}, {"guidance_scale": 7.0}, {"best_of": 2}]
)
def test_what_is_for_sampling_is_refused_beside_votes(given):
    assert EvaluateJob(votes="v.csv", out="out", seed=3)
    with pytest.raises(ValueError, match=f"{next(iter(given))} is .*votes are counted"):
        EvaluateJob(votes="v.csv", out="out", **given)


def test_an_evaluation_writes_over_no_table_and_no_page_of_others(tmp_path):
    table = tmp_path / "votes.csv"
    table.write_text("prompt,system_a,system_b,preference,comment\nslow air,x,y,a,lovely\n")
    with pytest.raises(ValueError, match="lies in out"):
        run_evaluate(EvaluateJob(votes=str(table), out=str(tmp_path)))
    assert "lovely" in table.read_text()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my page")
    with pytest.raises(ValueError, match="index.html of something else"):
        run_evaluate(EvaluateJob(votes=str(table), out=str(tmp_path / "site")))
    assert (tmp_path / "site" / "index.html").read_text() == "my page"
    for _ in range(2):  # its own it writes over
        run_evaluate(EvaluateJob(votes=str(table), out=str(tmp_path / "counted")))


def test_an_imported_table_is_counted_by_its_folder(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,system_a,system_b,preference\nslow air,x,y,a\nfast reel,x,y,b\n")
    folder = import_battles(tmp_path / "mine.csv", tmp_path / "battles")
    assert evaluate_votes(tmp_path / "battles", tmp_path / "counted")["prompts"] == 2
    assert folder


def test_best_of_n_needs_a_reward_and_models():
    good = {"models": ["musicrl-tiny"], "prompts": "p.txt", "out": "out"}
    for change in (
        {"best_of": 4},
        {"best_of": 0, "best_of_reward": ["quality"]},
        {"best_of_reward": ["quality"]},
    ):
        with pytest.raises(ValueError, match="best_of is .* and best_of_reward is"):
            EvaluateJob(**good | change)
    with pytest.raises(ValueError, match="`rewards` names a reward twice"):
        EvaluateJob(**good | {"rewards": ["quality", "quality"]})


def test_one_model_is_measured_but_not_compared(tmp_path):
    result = evaluate_models(
        {"only": tiny_generator()}, ["slow air"], tmp_path, listeners=simulated_listeners(3), duration_s=0.5,
        samples_per_prompt=1,
    )  # fmt: skip
    assert result["win_rates"] == []
    assert result["ranking"] is None
    assert "harmony_distance" not in result["metrics"]["only"]
    assert len(Page((tmp_path / "index.html").read_text()).all("audio")) == 1


def test_each_model_may_be_heard_at_its_own_guidance_scale(tmp_path):
    """The first one's own is 1 and the second one's 3: as each of them in an evaluation at that scale."""
    models = {"plain": tiny_generator(seed=0), "guided": tiny_generator(seed=1)}
    models["plain"].generation_config.guidance_scale = 1.0
    models["guided"].generation_config.guidance_scale = 3.0
    options = {"listeners": simulated_listeners(6), "rewards": {"level": level}, "duration_s": 1.0, "batch_size": 4}

    def levels(scale):
        folder = tmp_path / str(scale)
        result = evaluate_models(models, PROMPTS[:2], folder, guidance_scale=scale, **options)
        assert result["settings"]["guidance_scale"] == scale
        return {row["model"]: row["mean"] for row in result["rewards"]["level"]["means"]}

    own, plain, guided = levels(None), levels(1.0), levels(3.0)
    assert own == {"plain": plain["plain"], "guided": guided["guided"]}
    assert plain["guided"] != guided["guided"]


def test_wrong_studies_are_refused(tmp_path):
    good = {"models": {"x": tiny_generator()}, "prompts": ["p"], "listeners": simulated_listeners(6)}
    for change, message in (
        ({"models": {}}, "models is empty"),
        ({"prompts": []}, "prompts has 0 texts"),
        ({"prompts": ["slow air", " Slow AIR "]}, "twice or empty: .'slow air'"),
        ({"prompts": ["  "]}, "prompts has 1 texts"),
        (
            {"listeners": simulated_listeners(5)},
            "raters_per_clip x samples_per_prompt is 3 x 2, but there are 5 listeners",
        ),
        ({"raters_per_clip": 0}, "raters_per_clip is 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        arguments = good | change
        with pytest.raises(ValueError, match=message):
            evaluate_models(arguments.pop("models"), arguments.pop("prompts"), tmp_path, **arguments)


def test_a_reward_that_gives_nan_is_named(tmp_path):
    def broken(prompts, audio, sampling_rate):
        return torch.full((len(prompts),), torch.nan)

    with pytest.raises(ValueError, match="broken"):
        evaluate_models(
            {"x": tiny_generator()}, ["p"], tmp_path, listeners=simulated_listeners(6), rewards={"broken": broken},
            duration_s=0.5,
        )  # fmt: skip


def test_votes_from_elsewhere_are_counted(tmp_path):
    table = tmp_path / "battles.csv"
    rows = [("x", "y", "A")] * 3 + [("y", "x", "A")] + [("y", "z", "B"), ("z", "y", "B"), ("x", "z", "TIE")]
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("system_a", "system_b", "preference"), *rows])
    page = run_evaluate(EvaluateJob(votes=str(table), out=str(tmp_path / "out")))
    assert page == tmp_path / "out" / "index.html"
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    # x won 3 and lost 1; y won 1 + 1 and lost 3 + 1; z won 1 and lost 1.
    counts = {entry["model"]: (entry["wins"], entry["losses"], entry["ties"]) for entry in result["overall"]}
    assert counts == {"x": (3, 1, 1), "y": (2, 4, 0), "z": (1, 1, 1)}
    assert result["models"] == ["x", "z", "y"], "best first"
    assert [entry["model"] for entry in result["ranking"]] == ["x", "z", "y"]
    assert not Page(page.read_text()).open


# (row beats column, ties, column beats row) of each two systems: 376 votes, in which no order of wins is without exception
LEAGUE = {
    ("ace", "bark"): (14, 3, 9),
    ("ace", "clef"): (17, 2, 6),
    ("ace", "drum"): (12, 4, 11),
    ("ace", "echo"): (19, 1, 4),
    ("ace", "fugue"): (20, 5, 3),
    ("bark", "clef"): (13, 3, 8),
    ("bark", "drum"): (10, 2, 13),
    ("bark", "echo"): (16, 2, 7),
    ("bark", "fugue"): (15, 4, 6),
    ("clef", "drum"): (7, 3, 12),
    ("clef", "echo"): (11, 2, 13),
    ("clef", "fugue"): (14, 1, 8),
    ("drum", "echo"): (18, 3, 5),
    ("drum", "fugue"): (9, 2, 11),
    ("echo", "fugue"): (12, 6, 10),
}


def test_the_leaderboard_ranks_as_a_direct_fit_does(tmp_path):
    """Against logistic regression on one row a vote, +1 for system a and -1 for b, by scipy's optimiser."""
    votes = []
    for (one, other), counts in LEAGUE.items():
        for label, count in zip(("A", "TIE", "B"), counts, strict=True):
            for number in range(count):
                swapped = number % 2  # each system stands on both sides
                shown = {"A": "B", "B": "A"}.get(label, label) if swapped else label
                votes.append((f"p{len(votes) % 120}", *((other, one) if swapped else (one, other)), shown))
    assert len(votes) == 376
    with open(tmp_path / "votes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "system_a", "system_b", "preference"), *votes])
    run_evaluate(EvaluateJob(votes=str(tmp_path / "votes.csv"), out=str(tmp_path / "out")))
    result = json.loads((tmp_path / "out" / "results.json").read_text())

    names = sorted({name for pair in LEAGUE for name in pair})
    design = np.zeros((len(votes), len(names)))
    outcome = np.array([{"A": 1.0, "TIE": 0.5, "B": 0.0}[label] for *_, label in votes])
    for i, (_, a, b, _) in enumerate(votes):
        design[i, names.index(a)], design[i, names.index(b)] = 1, -1

    def loss(free):  # the first system's strength is 0
        logits = design @ np.concatenate([[0.0], free])
        return np.sum(np.logaddexp(0, logits) - outcome * logits)

    fit = minimize(loss, np.zeros(len(names) - 1), method="BFGS")
    strengths = np.concatenate([[0.0], fit.x])
    direct = dict(zip(names, strengths - strengths.mean(), strict=True))
    ranking = result["ranking"]
    assert [entry["model"] for entry in ranking] == sorted(direct, key=direct.get, reverse=True)
    assert {entry["model"]: entry["strength"] for entry in ranking} == pytest.approx(direct, abs=1e-3)
    assert all(entry["low"] < entry["strength"] < entry["high"] for entry in ranking)


def test_the_win_rates_are_a_heat_map(tmp_path):
    """Colour says who wins and how clearly: 9 of 10 is 0.4 above a half, times 2, times the deepest shade of 0.55."""
    votes = [Vote(f"p{n}", "x", "y", "a" if n else "b") for n in range(10)]
    votes += [Vote("q", "y", "z", "a"), Vote("q", "y", "z", "b")]
    evaluate_votes(votes, tmp_path)
    page = Page((tmp_path / "index.html").read_text())
    cells = [(cell.get("class"), cell.get("style")) for cell in page.all("td")[1:10]]  # the first is the corner
    # in the order of the page: x won 9 of 10, z 1 of 2, y 2 of 12
    assert cells == [
        ("empty", None),
        ("empty", None),  # x never met z
        ("win", "--strength:0.44"),
        ("empty", None),
        ("empty", None),
        ("win", "--strength:0.0"),
        ("loss", "--strength:0.44"),
        ("win", "--strength:0.0"),
        ("empty", None),
    ]


def test_counted_votes_of_simulated_listeners_are_called_simulated(tmp_path):
    votes = [Vote("p", "x", "y", "a", simulated_listeners(1)[0].name), Vote("q", "y", "x", "a", "3fa5")]
    assert evaluate_votes(votes, tmp_path)["raters"] == {"listeners": 2, "simulated": 1, "rewards": 0}
    assert "1 of the 2 listeners are simulated" in (tmp_path / "index.html").read_text()
    assert evaluate_votes(votes[1:], tmp_path)["raters"] == {"listeners": 1, "simulated": 0, "rewards": 0}
    assert "simulated" not in (tmp_path / "index.html").read_text()
    by_reward = Vote("r", "y", "x", "a", "reward:preference:reward")
    assert evaluate_votes([*votes[1:], by_reward], tmp_path)["raters"] == {"listeners": 2, "simulated": 0, "rewards": 1}
    assert "1 of the 2 listeners are rewards" in (tmp_path / "index.html").read_text()


def test_preferences_of_one_system_have_nothing_to_count(tmp_path):
    clip = audio_bytes(torch.rand(1, 800) / 2, 8000)
    row = {
        "prompt": "p",
        "chosen": clip,
        "rejected": clip,
        "chosen_model": "x",
        "rejected_model": "x",
        "preference": "a",
    }
    row |= {"listener": "3fa5", "source": "test", "created_at": "2026-01-31T12:00:00+00:00"}
    save_preferences(preferences_from_rows([row]), tmp_path / "prefs")
    with pytest.raises(ValueError, match="prefs holds no vote between two systems"):
        run_evaluate(EvaluateJob(votes=str(tmp_path / "prefs"), out=str(tmp_path / "out")))


def test_votes_that_cannot_be_ranked_still_have_a_page(tmp_path):
    result = evaluate_votes([Vote("p", "x", "y", "a"), Vote("q", "y", "z", "tie")], tmp_path)
    assert result["ranking"] is None
    assert "infinite" in (tmp_path / "index.html").read_text()
    assert [r["win_rate"] for r in result["win_rates"] if r["model"] == "z"] == [None]
    with pytest.raises(ValueError, match="no votes"):
        evaluate_votes([], tmp_path)


def test_the_job_compares_saved_generators_by_label(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        tiny_generator(seed=seed).save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("slow air\nfast reel\n")
    words = ["--models", str(tmp_path / "one"), f"tuned={tmp_path / 'two'}", "--prompts", str(tmp_path / "prompts.txt")]
    words += ["--out", str(tmp_path / "out"), "--duration_s", "0.5", "--listeners", "6"]
    page = run_evaluate(load_config(EvaluateJob, overrides=words))
    assert json.loads((page.parent / "results.json").read_text())["models"] == ["one", "tuned"]


def test_wrong_jobs_are_refused():
    for options, message in (
        ({}, "give generators or a vote table"),
        ({"models": ["x"], "votes": "v.csv"}, "give generators or a vote table"),
        ({"models": ["x"]}, "prompts is not given"),
        ({"models": ["a/x", "b/x"], "prompts": "p"}, "'x' is there twice; write label=name"),
        ({"models": ["a b=x", "a_b=y"], "prompts": "p"}, "no folder of clips can have 'a_b' alone for a name"),
        ({"models": ["..=x"], "prompts": "p"}, r"no folder of clips can have '\.\.' alone for a name"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateJob(out="out", **options)
    assert label_models(["a/x", "y=b/x"]) == {"x": "a/x", "y": "b/x"}
