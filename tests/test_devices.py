"""Where models run outside of training."""

import pytest
import torch

from musicrl_hf.devices import device_name, find_device, find_dtype


def test_without_a_name_it_is_the_accelerator_or_the_cpu(monkeypatch):
    there = torch.accelerator.current_accelerator(check_available=True)
    assert find_device() == find_device("") == (torch.device("cpu") if there is None else there)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert find_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "cpu:7"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"`device` = '{name}' cannot be used here .*; give cpu"):
        find_device(name)


def test_precisions_are_named():
    assert find_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16, got 'half'"):
        find_dtype("half")


def test_a_device_is_called_what_people_call_it():
    assert device_name(torch.device("cpu")).startswith("CPU (")
    assert device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads)")
    assert device_name(torch.device("mps")) == "MPS"
    if torch.cuda.is_available():
        assert device_name(torch.device("cuda")) == torch.cuda.get_device_name()
