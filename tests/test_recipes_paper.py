"""The recipe of the paper's tables: its commands are ones that the command line takes, and its tables say what the file says."""

import importlib
import json
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_schema import row
from tiny import tiny_generator

from musicrl_hf import load_generator
from musicrl_hf.align import recipe_file
from musicrl_hf.cli import JOBS
from musicrl_hf.config import load_config
from musicrl_hf.preferences.listeners import LISTENER_VERSION
from musicrl_hf.preferences.schema import load_preferences, preferences_from_rows, save_preferences
from musicrl_hf.rewards.combine import compares_clips
from musicrl_hf.rewards.variety import variety

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "recipes" / "paper"


@pytest.fixture
def recipe(monkeypatch):
    """Imports a module of that folder by name, as a script in it does."""
    monkeypatch.syspath_prepend(PAPER)
    return importlib.import_module


@pytest.mark.parametrize("script", ["gather", "run"])
def test_a_script_finds_what_it_imports(script):
    """Beside ../run.py and ../publish.py, which have the names of scripts here."""
    told = subprocess.run([sys.executable, PAPER / f"{script}.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    assert "--work" in told.stdout


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_every_planned_command_is_one(recipe, tmp_path, size):
    """Fields and values of each, as the command line reads them; nothing is run."""
    plan = recipe("plan")
    sizes = plan.TINY if size == "tiny" else plan.Sizes()
    runs = [plan.aligned(tmp_path, 1, sizes), plan.second_round(tmp_path, 1, sizes)]
    runs += [run for part in recipe("run").PLANS.values() for run in part(tmp_path, sizes)]
    assert len({run.name for run in runs}) == len(runs) > 12
    scripts = [run for run in runs if run.script]
    assert {run.script for run in scripts} == {"many_prompts", "join_votes", "one_adapter", "add_adapter"}
    for run in scripts:
        assert (PAPER / f"{run.script}.py").is_file()
        assert run.folder.is_relative_to(tmp_path)
        assert str(run.folder) in run.command
    for run in runs:
        if run.script:
            continue
        command, *words = run.command
        module, config, _, _ = JOBS[command]
        path = None
        if command == "align":
            assert words[:2] == ["--recipe", "paper"]
            path, words = recipe_file("paper"), words[2:]
        job = load_config(getattr(import_module(f"musicrl_hf.{module}"), config), path, words)
        folder = Path(getattr(job, "output_dir", None) or job.out)
        assert folder.is_relative_to(tmp_path)
        assert run.folder.is_relative_to(folder)


def test_single_runs_by_name(recipe, tmp_path, monkeypatch, capsys):
    words = ["run.py", "--work", str(tmp_path), "--tiny", "--parts", "guided", "--threads", "1", "--runs"]
    monkeypatch.setattr(sys, "argv", [*words, "guided_halves"])
    recipe("run").main()
    assert [path.stem for path in (tmp_path / "runs").iterdir()] == ["guided_halves"]
    halves = [(tmp_path / "guided" / f"prompts_{half}.txt").read_text().splitlines() for half in "ab"]
    assert [len(half) for half in halves] == [4, 4]
    assert (tmp_path / "guided" / "prompts.txt").read_text().splitlines() == halves[0] + halves[1]
    monkeypatch.setattr(sys, "argv", [*words, "guided_halves", "guided_thirds"])
    with pytest.raises(SystemExit):
        recipe("run").main()
    assert "--runs guided_thirds: there are guided_prompts, guided_distilled, " in capsys.readouterr().err


@pytest.fixture
def stack(tmp_path):
    """A generator and three adapters on each other, of other ranks and one scale, as PPO from an adapter leaves them."""
    tiny_generator().save_pretrained(tmp_path / "base")
    below = tmp_path / "base"
    torch.manual_seed(0)
    for number, rank in enumerate((2, 3, 4)):
        model = get_peft_model(
            load_generator(str(below)), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "fc1"])
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(below)
        below = tmp_path / f"adapter_{number}"
        model.save_pretrained(below)
    return below


def test_adapters_on_each_other_become_one(recipe, stack, tmp_path):
    assert recipe("one_adapter").join(stack, str(tmp_path / "base"), tmp_path / "one") == (3, 1.0)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (9, 18)
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    base, one, whole = (
        load_generator(str(folder)).state_dict() for folder in (tmp_path / "base", tmp_path / "one", stack)
    )
    assert any(not torch.allclose(base[name], value) for name, value in whole.items())
    for name, value in one.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_one_adapter_may_have_a_smaller_rank(recipe, stack, tmp_path):
    """As good as a singular value decomposition of the whole change."""
    one_adapter, base = recipe("one_adapter"), load_generator(str(tmp_path / "base")).state_dict()
    count, kept = one_adapter.join(stack, str(tmp_path / "base"), tmp_path / "small", rank=5)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (count, config["r"], config["lora_alpha"]) == (3, 5, 10)
    small, whole = (load_generator(str(folder)).state_dict() for folder in (tmp_path / "small", stack))
    shares = []
    for name in whole:
        change = whole[name] - base[name]
        if change.dim() == 2 and change.abs().max() > 1e-6:
            sizes = torch.linalg.svdvals(change) ** 2
            shares.append(float(sizes[:5].sum() / sizes.sum()))
            lost = (small[name] - whole[name]).square().sum() / change.square().sum()
            assert float(lost) == pytest.approx(1 - shares[-1], abs=1e-4)
        else:
            torch.testing.assert_close(small[name], whole[name])
    assert len(shares) > 1
    assert kept == pytest.approx(min(shares), abs=1e-4)
    assert kept < 0.999
    assert not (tmp_path / "small" / "generation_config.json").exists()
    with pytest.raises(ValueError, match="`rank` must be from 1 to 9.*got 10"):
        one_adapter.join(stack, str(tmp_path / "base"), tmp_path / "large", rank=10)
    assert not (tmp_path / "large").exists()


def publishing():
    spec = spec_from_file_location("publish_adapters", PAPER / "publish.py")  # ../publish.py has the same name
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_ships_keeps_the_figures_of_its_loop(recipe, tmp_path):
    """Cards tell them, and a later run of everything is of other adapters until those are published."""
    path, rows = tmp_path / "paper.json", [{"a": "r", "b": "base", "win_rate": 0.5}]
    found = {"seeds": [0, 1], "date": "2026-01-01", "hardware": "a CPU", "win_rates": rows, "systems": {}}
    found["runs"] = {"align_0": {"command": "musicrl align", "seconds": 1.0}}
    path.write_text(json.dumps(found))
    publishing().note_shipped(path)
    written = json.loads(path.read_text())
    of_loop = {name: found[name] for name in ("seeds", "date", "hardware", "win_rates")}
    assert written == found | {"shipped": of_loop | {"command": "musicrl align"}}


def test_an_adapter_says_and_is_published_with_what_guidance_it_is_played(recipe, stack, tmp_path):
    recipe("one_adapter").join(stack, str(tmp_path / "base"), tmp_path / "one", guidance_scale=1.0)
    assert load_generator(str(tmp_path / "one")).generation_config.guidance_scale == 1.0
    plain, published = tmp_path / "plain", tmp_path / "published"
    recipe("one_adapter").join(stack, str(tmp_path / "base"), plain)
    usual = load_generator(str(plain)).generation_config.guidance_scale
    assert usual != 1.0
    publish = publishing()
    for source, scale in ((tmp_path / "one", 1.0), (plain, None)):
        assert publish.publish(source, published, "base") > 0
        sampling = published / "generation_config.json"
        assert (json.loads(sampling.read_text())["guidance_scale"] if sampling.exists() else None) == scale


def test_what_the_adapters_stand_on_may_be_an_adapter(recipe, stack, tmp_path):
    below = tmp_path / "adapter_0"
    assert recipe("one_adapter").join(stack, str(below), tmp_path / "one") == (2, 1.0)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (7, str(below))
    one, whole = (load_generator(str(folder)).state_dict() for folder in (tmp_path / "one", stack))
    for name, value in one.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`base` = 'musicrl-tiny-r'.*stands on .*base"):
        recipe("one_adapter").join(stack, "musicrl-tiny-r", tmp_path / "another")


def test_a_share_of_an_adapter_is_added_to_another(recipe, stack, tmp_path):
    """What the lowest adapter changes, once more and by half, on top of all three."""
    base, lowest, whole = (
        load_generator(str(tmp_path / name)).state_dict() for name in ("base", "adapter_0", stack.name)
    )
    recipe("add_adapter").add(tmp_path / "adapter_0", 0.5, str(stack), tmp_path / "more")
    found = load_generator(str(tmp_path / "more")).state_dict()
    assert any(not torch.allclose(whole[name], value) for name, value in found.items())
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name] + (lowest[name] - base[name]) / 2, rtol=1e-5, atol=1e-6)


def test_no_share_is_added_to_what_has_grown_from_another_generator(recipe, stack, tmp_path):
    with pytest.raises(
        ValueError, match="`on` = 'musicrl-tiny-r' has grown from .*musicrl-tiny, and .*adapter_0 from .*base"
    ):
        recipe("add_adapter").add(tmp_path / "adapter_0", 0.5, "musicrl-tiny-r", tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_no_share_is_taken_of_what_is_no_adapter(recipe, tmp_path):
    save_file({"score.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="'score.weight' is no LoRA matrix"):
        recipe("add_adapter").add(tmp_path, 0.5, "musicrl-tiny", tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_adapters_that_do_not_go_together_are_refused(recipe, stack, tmp_path):
    one_adapter = recipe("one_adapter")
    with pytest.raises(ValueError, match="no LoRA matrix"):
        one_adapter.joined([{"head.weight": torch.zeros(1)}])
    with pytest.raises(ValueError, match="of different layers"):
        one_adapter.joined([{"a.lora_A.weight": torch.zeros(1)}, {"b.lora_A.weight": torch.zeros(1)}])
    config = json.loads((stack / "adapter_config.json").read_text())
    (stack / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(ValueError, match="scaled by"):
        one_adapter.join(stack, str(tmp_path / "base"), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_many_prompts_are_new_and_the_same_again(recipe, tmp_path, monkeypatch):
    many = recipe("many_prompts")
    files = [tmp_path / name for name in ("all.txt", "a.txt", "b.txt")]
    words = [str(files[0]), "--count", "300", "--halves", *map(str, files[1:])]
    part = tmp_path / "part.txt"
    monkeypatch.setattr(sys, "argv", ["many_prompts.py", *words, "--part", "150", "225", str(part)])
    many.main()
    assert part.read_text().splitlines() == files[2].read_text().splitlines()[:75]
    monkeypatch.setattr(sys, "argv", ["many_prompts.py", *words, "--part", "150", "301", str(part)])
    with pytest.raises(SystemExit, match="`--part` must be within 0 and 300.*got 150 301"):
        many.main()
    prompts, first, second = (file.read_text().splitlines() for file in files)
    assert first + second == prompts == many.many_prompts(300) == many.many_prompts(400)[:300]
    bundled = [ROOT / "src" / "musicrl_hf" / "prompts" / f"{name}.txt" for name in ("train", "heldout")]
    known = {line for file in bundled for line in file.read_text().splitlines()}
    assert len(set(prompts)) == 300
    assert len(known) == 128 + 104
    assert not known & set(prompts)
    assert many.many_prompts(300, seed=1) != prompts
    monkeypatch.setattr(sys, "argv", ["many_prompts.py", str(part), "--count", "350", "--but_not", str(files[0])])
    many.main()
    others = part.read_text().splitlines()
    assert others[:50] == many.many_prompts(350)[300:]  # as if the first 300 had been passed over
    assert len({*others, *prompts}) == 350 + 300


def test_another_key_is_no_variety(recipe):
    """Chords: the same a fourth higher counts in `variety` and not here; another kind of chord counts in both; silence in neither."""

    def chord(*semitones: int) -> torch.Tensor:
        time = torch.arange(2 * 16000) / 16000
        return sum(torch.sin(2 * torch.pi * 262 * 2 ** (step / 12) * time) for step in semitones) / 8

    major, higher, cluster, silence = chord(0, 4, 7), chord(5, 9, 12), chord(0, 1, 2), torch.zeros(2 * 16000)
    prompts = ["a", "a", "b", "b", "c", "c", "d"]
    audio = torch.stack([major, higher, major, cluster, major, silence, cluster])[:, None]
    found, plain = (score(prompts, audio, 16000) for score in (recipe("any_key").variety, variety))
    assert plain[0] > 0.5
    assert found[0] < 0.05
    assert found[2] > 0.2
    torch.testing.assert_close(found[[0, 2]], found[[1, 3]])
    assert found[4:].tolist() == [0, 0, 0]
    assert compares_clips(recipe("any_key").variety)


def test_votes_of_rounds_are_joined(recipe, tmp_path, monkeypatch):
    rounds = [tmp_path / name for name in ("one", "two")]
    for number, folder in enumerate(rounds):
        save_preferences(preferences_from_rows([row(f"prompt {i}") for i in range(number + 1)]), folder)
    monkeypatch.setattr(sys, "argv", ["join_votes.py", *map(str, rounds), "--out", str(tmp_path / "all")])
    recipe("join_votes").main()
    assert len(load_preferences(tmp_path / "all")) == 1 + 2


def test_where_guards_stop(recipe):
    """The panel is best at step 10 and no better three times; the other panel rises to the end; KL passes 30 nats and comes back."""
    tables, curves = recipe("tables"), recipe("curve_tables")
    panel, other = [0.0, 0.5, 0.4, 0.3, 0.45, 0.9], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    rows = [
        {"step": 10 * i, "kl": kl, "panel_taste": panel[i], "other_taste": other[i]}
        for i, kl in enumerate([0.0, 8.0, 16.0, 31.0, 29.0, 40.0])
    ]
    found = curves.stops(rows, patience=3, budgets=(10, 30, 60))
    assert {name: (row["step"], stopped) for name, (row, stopped) in found.items()} == {
        "held-out panel": (10, 40),  # and not the policy of 50, which it never saw
        "panel of another taste": (50, None),  # stops nothing
        "KL of 10 nats": (10, 20),
        "KL of 30 nats": (20, 30),  # and not 40, which comes after the budget was passed
        "KL of 60 nats": (50, None),
    }
    shown = curves.guards({"curves": {"one": [row | {"adherence": 0.5} for row in rows]}}, tables.REWARDS, tables.table)
    assert "| one | KL of 30 nats | 20 | 30 | 16.0 |" in shown
    assert "| one | panel of another taste | 50 |  | 40.0 |" in shown


def test_a_table_says_who_listened(recipe):
    tables = recipe("tables")
    found = {
        "listeners": "simulated-9",
        "seeds": [0, 1],
        "recipes": ["paper"],
        "win_rates": [
            {"a": "ru", "b": "base", "win_rate": 0.75, "low": 0.7, "high": 0.8, "wins": 6, "ties": 1, "losses": 2}
            | {"by_seed": [0.7, 0.8], "wilcoxon_p": 0.0123, "paper": 87}
        ],
        "mos": [{"model": "ru", "mean": 3.5, "low": 3.4, "high": 3.6, "by_seed": [3.4, 3.6], "paper": 3.82}],
    }
    text = tables.summary(found)
    assert "| RU against base | **75 %** [70, 80] | 6 / 1 / 2 | 70 %, 80 % | 0.012 | 87 % |" in text
    assert (
        "2 training seeds of `musicrl align --recipe paper`, listeners simulated-9: **simulated**, nobody listened."
        in text
    )


def test_what_judges_heard_is_one_row_a_system(recipe):
    def heard(instrument, stuck):
        shares = {key: {"share": instrument} for key in ("instrument", "backing", "tempo_within_8%", "key_neighbour")}
        faults = {"silent": 0, "clipped": 0, "stuck": stuck}
        return {**shares, "faulty_clips": faults, "frechet_distance": 48.2, "panel_taste": 0.25, "other_taste": -0.5}

    seeds = {"0": {"base": heard(0.7, 1), "ru": heard(0.6, 2)}, "1": {"base": heard(0.7, 1), "ru": heard(0.7, 7)}}
    lines = recipe("tables").judged_ranges({"judged": {"prompts": 9, "seeds": seeds}}).splitlines()
    assert lines[2].startswith("| base | **70** % | **70** %")
    assert lines[3].startswith("| RU | **65** % [60, 70] |")
    assert lines[3].endswith("| **4** [2, 7] | **48** | **0.25** | **-0.50** |")
    assert len(lines) == 4


def test_parts_that_were_made_with_other_models_say_so(recipe):
    tables = recipe("tables")
    found = {"systems": {"base": {"adherence": 0.44}}}
    assert tables.made_before(found, [{"adherence": 0.46}, {"adherence": 0.7}]) == []  # rows[0] is the base
    assert tables.made_before(found, []) == []
    (said,) = tables.made_before(found, [{"adherence": 0.73}])
    assert "in adherence the base has 0.730 here and 0.440 there" in said
    rewards = {"by_seed": {"0": {"n_votes": 5}}, "ablations": {"clap": {"n_votes": 5}}}
    assert tables.of_other_votes(rewards) == tables.of_other_votes(rewards | {"ablations": {}}) == []
    rewards["ablations"]["clap"]["n_votes"] = 6
    assert len(tables.of_other_votes(rewards)) == 1
    rewards["ablations"]["no_text"] = {"n_votes": 5, "note": "of another run."}
    assert tables.of_other_votes(rewards) == ["No text: of another run."]


def test_the_larger_budget_is_shown_without_judges_too(recipe):
    tables, larger = recipe("tables"), recipe("larger_tables")
    found = json.loads((ROOT / "results" / "paper.json").read_text())["larger"]
    whole, without = (larger.sections(some, tables.table) for some in (found, found | {"judged": {}}))
    assert whole[: len(without)] == without
    assert len(whole) == len(without) + 2
    assert "judges" not in "".join(without)
    assert all(len(part.splitlines()) == 2 + len(larger.NAMES) for part in (whole[-1], without[-1]))


def test_what_is_shown_is_what_was_gathered(recipe):
    tables = recipe("tables")
    found = json.loads((ROOT / "results" / "paper.json").read_text())
    assert found["listeners"] == LISTENER_VERSION
    assert {row["a"] for row in found["win_rates"]} >= {"r", "u", "ru"}
    shown = tables.shown(found)
    assert [[*names] for names in shown.values()] == [["summary", "shipped"], ["as played", "guided"]]
    for path, parts in shown.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for name, what in parts.items():
            assert len(what.splitlines()) > 4
            assert tables.filled(text, name, what) == text
    plots = [f"curves_{name}.svg" for name in found["curves"]]
    assert (ROOT / "results" / "README.md").read_text(encoding="utf-8") == tables.page(found, plots)
    assert all((ROOT / "results" / name).is_file() for name in plots)


def test_a_table_is_put_between_its_marks_alone(recipe):
    filled = recipe("tables").filled
    first, second = (
        "<!-- from results/paper.json, {0}: -->\n{1}\n<!-- :from results/paper.json, {0} -->".format for _ in "ab"
    )
    text = f"before\n{first('a', 'old')}\nbetween\n{second('b', 'old')}\nbehind\n"
    assert filled(text, "b", "new") == f"before\n{first('a', 'old')}\nbetween\n{second('b', 'new')}\nbehind\n"
    for wrong in (text + text, text.replace("<!-- :from results/paper.json, b -->", ""), "nothing"):
        with pytest.raises(ValueError, match="must have '<!-- from results/paper.json, b: -->' once"):
            filled(wrong, "b", "new")


def test_tables_of_guidance_have_each_system_once_and_say_who_is_people(recipe):
    """Against the file's own numbers, of the row that ships."""
    tables, guided = recipe("tables"), recipe("guided_tables")
    found = json.loads((ROOT / "results" / "paper.json").read_text())["guided"]
    shipped = guided.shipped(found, tables.table).splitlines()
    assert len(shipped) == 2 + len(guided.SHIPPED) + len(guided.PEOPLE)
    assert all(line.startswith("| *MusicRL's ") and ", people*" in line for line in shipped[-2:])
    rate = next(row for row in found["win_rates"] if (row["a"], row["b"]) == ("ru", "base"))
    assert f"| **{100 * rate['win_rate']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]** |" in shipped[-3]
    heard = found["judged"]["seeds"]["0"]["ru"]
    assert f" {100 * heard['instrument']['share']:.0f} % " in shipped[-3]
    played = guided.as_played(found, tables.table).splitlines()
    assert [line.split("|")[1].strip() for line in played[2:]] == ["base", *guided.PLAYED.values(), guided.OWN]
    assert len(guided.tried(found, tables.table).splitlines()) == 2 + len(guided.TRIED)
    unheard = found | {"judged": {}, "judged_at_3": {}}
    for made in (guided.shipped, guided.as_played, guided.tried):  # judges are asked by a script of their own
        whole, without = (made(some, tables.table).splitlines() for some in (found, unheard))
        assert [line.count("|") for line in without] == [line.count("|") for line in whole]


def test_the_readmes_words_have_the_files_figures():
    """Those of what ships that stand outside of its tables."""
    found = json.loads((ROOT / "results" / "paper.json").read_text())["guided"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def rate(evaluation: dict, other: str) -> str:
        row = next(row for row in evaluation["win_rates"] if (row["a"], row["b"]) == ("ru", other))
        return f"{100 * row['win_rate']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"

    fresh, heard = found["fresh"], found["judged"]["seeds"]["0"]
    assert f"on {fresh['prompts']} prompts used neither for training nor for choosing" in readme
    assert f"RU wins **{rate(fresh, 'base')}** against the base" in readme
    assert f"{rate(fresh, 'r')} against R and {rate(fresh, 'u')} against U" in readme
    assert f"preferred to the base at 3, as that is played, in {rate(found['as_played'], 'base')}" in readme
    assert f"RU is preferred to the base in {rate(found['as_played'], 'base')}, and keeps less" in readme
    ours, base = (round(heard[name]["key_neighbour"]["share"] * heard[name]["key_clips"]) for name in ("ru", "base"))
    assert f"is heard in {ours} of {heard['ru']['key_clips']} clips (base {base})" in readme
    stuck = [heard[name]["faulty_clips"]["stuck"] for name in ("ru", "base")]
    assert f"{stuck[0]} clips of {found['judged']['clips']} stick to one note (base {stuck[1]})" in readme
