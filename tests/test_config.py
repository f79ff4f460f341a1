from dataclasses import dataclass, field
from typing import Literal

import pytest

from musicrl_hf.config import describe_fields, load_config


@dataclass
class Job:
    model: str = field(metadata={"help": "a name"})
    learning_rate: float = 1e-4
    max_steps: int = 10
    lora: bool = False
    adapter: str | None = None
    reward: list[str] = field(default_factory=lambda: ["adherence"])
    objective: Literal["paper", "ppo"] = "paper"


@dataclass
class Choices:
    normalise: str = "normalise_then_sum"
    device: str | None = "cpu"
    top_k: int | None = 250
    seed: int = 0


def test_none_is_nothing_where_there_may_be_nothing_and_else_a_choice(tmp_path):
    told = load_config(Choices, None, ["--normalise", "none", "--device", "none", "--top_k", "none"])
    assert (told.normalise, told.device, told.top_k) == ("none", None, None)
    (tmp_path / "job.yaml").write_text("normalise: none\ndevice: none\ntop_k: none\n")
    assert load_config(Choices, tmp_path / "job.yaml") == told
    with pytest.raises(ValueError, match="`seed` must be int"):
        load_config(Choices, None, ["--seed", "none"])


@pytest.mark.parametrize("seed", ["9007199254740993", "-9007199254740993"])
def test_whole_numbers_stay_whole(seed, tmp_path):
    (tmp_path / "job.yaml").write_text(f"seed: {seed}\n")
    for told in (load_config(Choices, None, ["--seed", seed]), load_config(Choices, tmp_path / "job.yaml")):
        assert told.seed == int(seed)
    assert load_config(Choices, None, ["--seed", "1e3"]).seed == 1000


def test_yaml_and_overrides(tmp_path):
    (tmp_path / "job.yaml").write_text("model: m\nlearning_rate: 1e-5\nreward: [a, b]\nobjective: ppo\n")
    job = load_config(Job, tmp_path / "job.yaml", ["--max_steps", "7", "--lora", "--adapter=none", "--model", "n"])
    assert job == Job("n", 1e-5, 7, True, None, ["a", "b"], "ppo")
    assert load_config(Job, None, ["--model", "m", "--reward", "x", "y"]).reward == ["x", "y"]
    twice = ["--model", "m", "--reward", "x", "y", "--max_steps", "7", "--reward=z"]
    assert load_config(Job, tmp_path / "job.yaml", twice).reward == ["x", "y", "z"]
    assert load_config(Job, None, ["--model", "m", "--learning-rate", "2e-3"]).learning_rate == 2e-3


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([], "`model` is needed"),
        (["--model", "m", "--max_step", "3"], "`max_step` in the command line is unknown: did you mean `max_steps`"),
        (["--model", "m", "--max_steps", "3.5"], "`max_steps` must be int, got '3.5'"),
        (["--model", "m", "--learning_rate", "fast"], "`learning_rate` must be float, got 'fast'"),
        (["--model", "m", "--objective", "dpo"], "`objective` must be one of paper, ppo, got 'dpo'"),
        (["--model", "m", "n"], "`model` takes one value"),
        (["model"], "expected --field value"),
        (["--model", "m", "--lora", "perhaps"], "`lora` must be bool, got 'perhaps'"),
    ],
)
def test_errors_name_the_field(overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_config(Job, None, overrides)


def test_unknown_key_and_nested_yaml(tmp_path):
    (tmp_path / "job.yaml").write_text("model: m\nlerning_rate: 1\n")
    with pytest.raises(ValueError, match="`lerning_rate` in .*job.yaml is unknown: did you mean `learning_rate`"):
        load_config(Job, tmp_path / "job.yaml")
    (tmp_path / "nested.yaml").write_text("model: {name: m}\n")
    with pytest.raises(ValueError, match="flat mapping"):
        load_config(Job, tmp_path / "nested.yaml")
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        load_config(Job, tmp_path / "missing.yaml")
    (tmp_path / "wrong.yaml").write_text("model: m\nmax_steps: many\n")
    with pytest.raises(ValueError, match=r"wrong.yaml: `max_steps` must be int, got 'many'"):
        load_config(Job, tmp_path / "wrong.yaml")


def test_help_names_every_field():
    text = describe_fields(Job)
    assert all(f"--{name}" in text for name in Job.__dataclass_fields__)
    assert "required" in text
    assert "(default none)" in text


def test_help_has_the_defaults_of_the_file(tmp_path):
    (tmp_path / "job.yaml").write_text("model: m\nmax_steps: 7\n")
    text = describe_fields(Job, tmp_path / "job.yaml")
    assert "(default 7)" in text
    assert "required" not in text
