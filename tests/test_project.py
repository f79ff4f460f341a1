"""The project as a whole: modules, configurations, examples, README, cards and records. Each check says that it found some."""

import ast
import dataclasses
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import musicrl_hf
from musicrl_hf.audio import read_audio
from musicrl_hf.bundled import BUNDLED, CHECKPOINTS, resolve
from musicrl_hf.cards import check_card, model_card, python_blocks
from musicrl_hf.cli import JOBS, _parser
from musicrl_hf.config import load_config
from musicrl_hf.records import read_record

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "musicrl_hf"
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "musicrl_hf."))
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
YAML_FILES = sorted(
    path
    for pattern in ("*.yaml", "*.yml", "*.cff", ".github/**/*.yml", "examples/**/*.yaml", "recipes/**/*.yaml")
    for path in ROOT.glob(pattern)
)
JOB_CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(
            page
            for folder in ("docs", "recipes", "model_cards", "results", "benchmarks")
            for page in ROOT.glob(f"{folder}/*.md")
        ),
    }
)
README = ROOT / "README.md"
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md"))]  # what a user types stands here
_, COMMANDS = _parser()
LAYERS = (  # each may import from those before it, and from its own
    ("_environment", "audio", "descriptors", "config"),
    ("bundled", "places"),
    ("licences", "records"),
    ("cards",),
    ("hub",),
    (
        *(
            "codec",
            "codec_conversion",
            "codec_decoder",
            "delay",
            "sampling",
            "likelihood",
            "recompute",
            "fused_linear",
            "step_decoder",
        ),
        "step_graph",
    ),
    ("configuration",),
    ("generator",),
    ("flat",),
)


# -- code ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)


def test_there_are_modules_and_each_public_name_is_found():
    assert len(MODULES) > 20
    assert all(vars(importlib.import_module("musicrl_hf"))["__getattr__"](name) for name in musicrl_hf._PUBLIC)


def test_no_file_is_longer_than_400_lines():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 30
    assert not {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 400}


def imported_by(path: Path) -> set[str]:
    """Names below `musicrl_hf` that a module imports, at its top or inside a function: "hub", "training.dpo", ..."""
    package = list(path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("musicrl_hf."):
            found |= {f"{node.module}.{alias.name}".removeprefix("musicrl_hf.") for alias in node.names}
    return found


def imports_of(package: str) -> set[str]:
    """First parts of what the modules of a package, or one module, import from others of this project."""
    paths = [PACKAGE / f"{package}.py"] if (PACKAGE / f"{package}.py").is_file() else (PACKAGE / package).rglob("*.py")
    return {name.split(".")[0] for path in paths for name in imported_by(path)} - {package, ""}


def test_arrows_run_one_way():
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {"audio", "generator", "training", "cli"} <= parts
    arrows = {part: imports_of(part) & parts for part in parts - {"__init__"}}
    below: set[str] = set()
    for layer in LAYERS:
        below |= set(layer)
        for part in layer:
            assert arrows[part] <= below, f"{part} imports {arrows[part] - below}"
    assert not arrows["rewards"] & {"flat", "training", "evaluation", "preferences", "cli"}
    assert not arrows["preferences"] & {"flat", "training", "evaluation", "cli"}
    assert not arrows["evaluation"] & {"flat", "training", "cli"}
    assert {"preferences", "evaluation", "hub"} <= arrows["collect"]
    assert not arrows["collect"] & {"flat", "training", "align", "cli"}
    assert not [part for part, known in arrows.items() if known & {"cli", "collect"}]  # cli runs jobs by their names


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 30
    called = {
        f"{path.name}: {ast.unparse(node)}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads", "joblib.load")
            or any(word.arg == "trust_remote_code" and ast.unparse(word.value) != "False" for word in node.keywords)
            # Said, for otherwise transformers asks on the terminal whether to run what it found.
            or ast.unparse(node.func).startswith("AutoTokenizer.from_pretrained")
            and not any(word.arg == "trust_remote_code" for word in node.keywords)
        )
    }
    assert not called


def test_the_version_is_written_once_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == musicrl_hf.__version__ == citation["version"]
    assert f"## {musicrl_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# -- configurations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_yaml_file_parses(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_there_are_yaml_files():
    names = {path.name for path in YAML_FILES}
    assert {"ci.yml", "CITATION.cff", ".pre-commit-config.yaml"} <= names


def job_of(path: Path) -> str:
    """The command that a configuration says in its comments that it is for."""
    commands = re.findall(rf"musicrl (\w+) --config examples/configs/{re.escape(path.name)}", path.read_text())
    assert commands, f"{path} does not say how to run it"
    return commands[0]


@pytest.mark.parametrize("path", JOB_CONFIGS, ids=lambda path: path.name)
def test_every_job_configuration_is_one(path):
    module, config_class, _, _ = JOBS[job_of(path)]
    load_config(getattr(importlib.import_module(f"musicrl_hf.{module}"), config_class), path)


def test_there_is_a_configuration_for_each_training_job():
    assert {"reward", "dpo", "ppo", "rloo", "grpo"} <= {job_of(path) for path in JOB_CONFIGS}


def test_what_a_configuration_reads_is_made_by_another_or_by_the_readme():
    content = {path.name: yaml.safe_load(path.read_text()) for path in JOB_CONFIGS}
    made = {job["output_dir"] for job in content.values()}
    made |= {found for line in shell_lines(README) for found in re.findall(r"--out(?:put_dir)? (runs/\S+)", line)}
    read = {
        (name, found)
        for name, job in content.items()
        for key, value in job.items()
        if key != "output_dir"
        for found in re.findall(r"runs/[\w-]+", str(value))
    }
    assert len(read) > 5
    assert not {(name, found) for name, found in read if found not in made}
    files = {path for job in content.values() for path in (job.get("prompts"), job.get("eval_prompts")) if path}
    assert files
    assert not [path for path in files if not (ROOT / path).is_file()]


# -- examples ----------------------------------------------------------------------------------------------------------------


def test_the_examples_are_numbered_along_the_loop():
    assert len(EXAMPLES) >= 6
    numbers = [int(path.name[:2]) for path in EXAMPLES]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(path, tmp_path):
    """In an empty folder, offline, and without a word of error: what a reader would try first."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), "--tiny"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip()
    assert any(tmp_path.rglob("*")), "the example left nothing behind"


# -- pages -------------------------------------------------------------------------------------------------------------------


def local_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [
        target.split("#")[0] for target in targets if not target.startswith(("http://", "https://", "#", "mailto:"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_inside_the_project_leads_somewhere(page):
    missing = [target for target in local_links(page) if not (page.parent / target).exists()]
    assert not missing


def test_there_are_pages_with_links():
    names = {page.name for page in PAGES}
    assert {"FINDINGS.md", "SCALING.md", "collecting.md", "training.md"} <= names
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "ATTRIBUTION.md"} <= names
    assert sum(len(local_links(page)) for page in PAGES) > 5
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


def shell_lines(page: Path) -> list[str]:
    """Commands in the page's shell blocks, with lines that end in a backslash put together."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    blocks = [content for language, content in fenced if language in ("bash", "sh", "shell", "console", "")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip().removeprefix("$ ") for line in lines]


def options_of(command: str) -> set[str]:
    """What `musicrl COMMAND` takes, with the fields of its job."""
    options = set(COMMANDS[command]._option_string_actions)
    if command in JOBS:
        module, config_class, _, _ = JOBS[command]
        job = getattr(importlib.import_module(f"musicrl_hf.{module}"), config_class)
        options |= {f"--{field.name}" for field in dataclasses.fields(job)}
    return options


def test_git_passes_over_what_the_guides_have_one_write(tmp_path):
    """In a repository of its own, so that it holds outside of one too."""
    pages = "\n".join(page.read_text() for page in GUIDES)
    text = "\n".join(
        [*(line for page in GUIDES for line in shell_lines(page)), *re.findall(r"`(musicrl [^`\n]+)`", pages)]
    )
    made = set(re.findall(r"(?:-o|--out|--output_dir|--store|convert-codec \S+|>) ([\w./-]+)", text))
    made |= set(re.findall(r'(?:save_file|to_json_file)\([^"\n]*"([^"]+)"', pages))
    made = {name for name in made | {"collected"} if not name.startswith(("postgresql", "/"))}
    assert {"prefs", "tuned", "out.wav", "codec_24khz", "weights.safetensors", "study", "prompts.txt"} <= made
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for name in made:
        path = tmp_path / name / "x"
        if "." in name:
            path = path.parent
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    status = ["git", "-C", tmp_path, "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(status, capture_output=True, text=True, check=True).stdout == "?? .gitignore\n"
    tracked = [path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")]
    ignored = subprocess.run(["git", "-C", tmp_path, "check-ignore", "--no-index", *tracked], capture_output=True)
    assert ignored.stdout == b""


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_commands_on_the_pages_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    inline = re.findall(r"`((?:musicrl|make) [^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    checked = 0
    for line in [*shell_lines(page), *inline]:
        words = [word.rpartition("/")[2] if word.endswith("/musicrl") else word for word in line.split()]
        if words[:1] == ["musicrl"] and not words[1].startswith(("-", ".")):
            assert words[1] in COMMANDS, line
            unknown = {word.split("=")[0] for word in words[2:] if word.startswith("--")} - options_of(words[1])
            assert not unknown, line
            checked += 1
        elif words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
            checked += 1
        scripts = [word for word in words if re.fullmatch(r"(examples|recipes|model_cards)/[\w/.-]+", word)]
        assert not [word for word in scripts if not (ROOT / word).exists()], line
        checked += len(scripts)
    assert checked > 2, f"{page.name} shows hardly a command"


def test_every_test_that_the_architecture_names_exists():
    named = re.findall(r"(test_\w+\.py)`?::`?(test_\w+)", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(named) > 20
    written = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    assert not [(file, name) for file, name in named if f"def {name}(" not in written.get(file, "")]


def test_the_architecture_lists_every_module():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(modules) > 20
    assert not [path.name for path in modules if path.name not in page]


def test_python_on_the_pages_parses():
    blocks = [
        (page.name, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert blocks
    for name, code in blocks:
        compile(code, name, "exec")


def test_the_project_speaks_of_itself_alone():
    code = [path for folder in (PACKAGE, ROOT / "examples", ROOT / "recipes") for path in folder.rglob("*.py")]
    pages = [*PAGES, *code, *(ROOT / "recipes" / "results").glob("*.json")]
    assert len(pages) > 30
    named = {str(path.relative_to(ROOT)) for path in pages if re.search(r"/(?:tmp|home|root|Users)/", path.read_text())}
    assert not named


# -- cards and records --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build():
    """model_cards/build.py as a module."""
    path = ROOT / "model_cards" / "build.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("build_cards", path))
    module.__spec__.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(BUNDLED))
def test_the_card_of_a_bundled_model_says_what_was_recorded(build, name):
    """`python model_cards/build.py` writes both the record beside the weights and the card."""
    card = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert card == build.bundled_card(name)
    data = check_card(model_card(resolve(name), name))
    assert data["license"] == "apache-2.0"
    assert "No measurement was recorded" not in card


@pytest.mark.parametrize("name", BUNDLED)
def test_the_clips_on_a_card_can_be_heard(name):
    clips = read_record(CHECKPOINTS / name).clips
    for prompt in (
        "a dance tune with a melodic synth line and arpeggio",
        "a nostalgic tune played by an accordion band",
    ):
        assert any(text.startswith(prompt) for text in clips.values())
    card = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert "ATTRIBUTION.md" in card
    for path, text in clips.items():
        assert f"* [{text}](../src/musicrl_hf/checkpoints/{name}/{path})" in card
        audio, sampling_rate = read_audio(CHECKPOINTS / name / path)
        assert audio.shape[-1] == 5 * sampling_rate
        assert audio.abs().max() > 0.05


@pytest.mark.slow
def test_the_code_on_the_cards_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cards = [(ROOT / "model_cards" / f"{name}.md").read_text() for name in BUNDLED]
    blocks = [block for card in cards for block in python_blocks(card)]
    assert len(blocks) == 4 + 3  # each adapter has one
    for block in blocks:
        exec(block, {})
    audio, sampling_rate = read_audio(tmp_path / "tune.wav")
    assert audio.shape[-1] >= 4.9 * sampling_rate
    assert capsys.readouterr().out.count("tensor([") == 2


def test_the_records_beside_the_bundled_weights_are_those_of_the_recipes(build):
    assert set(build.STAGES) | set(build.KEYS) == set(BUNDLED)
    for name in BUNDLED:
        assert read_record(CHECKPOINTS / name) == build.record(name)
