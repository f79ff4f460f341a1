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
