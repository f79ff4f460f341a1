"""Products of several linear layers against the layers one by one."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.ao.quantization import quantize_dynamic

from musicrl_hf import fused_linear
from musicrl_hf.fused_linear import FusedLinear


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(12, features, bias=False) for features in (8, 8, 20))


@torch.no_grad()
def one_by_one(modules, states):
    return torch.cat([module(states) for module in modules], -1)


@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float64, 1e-12)]
)
def test_a_product_equals_its_layers(rows, dtype, tolerance, intel, monkeypatch):
    """On this computer, as it is done on an Intel CPU and on another."""
    monkeypatch.setattr(fused_linear, "_is_intel", lambda: intel)
    modules, states = layers().to(dtype), torch.randn(rows, 12, dtype=dtype)
    with torch.no_grad():
        product = FusedLinear(modules)
        together = product(states)
    assert product.weight is not None
    assert product.turned == (intel and dtype == torch.float32 and torch.backends.mkl.is_available())
    assert not (product.turned and product.packed)
    assert together.dtype == dtype
    torch.testing.assert_close(together, one_by_one(modules, states), rtol=0, atol=tolerance)


def test_a_weight_that_is_larger_than_a_cache_is_not_turned(monkeypatch):
    monkeypatch.setattr(fused_linear, "_is_intel", lambda: True)
    monkeypatch.setattr(fused_linear, "_SMALL", 12 * 8)
    modules, states = layers(), torch.randn(2, 12)
    for few, small in ((modules[:1], torch.backends.mkl.is_available()), (modules, False)):
        with torch.no_grad():
            product = FusedLinear(few)
            torch.testing.assert_close(product(states), one_by_one(few, states), rtol=0, atol=1e-6)
        assert product.turned == small


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_casts_a_weight_once(weights):
    modules, states = layers().to(weights), torch.randn(5, 12, dtype=weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        product = FusedLinear(modules)
        together, expected = product(states), one_by_one(modules, states)
        narrow = states.to(product.dtype)
        with torch.profiler.profile() as profile:
            product(narrow)
    assert together.dtype == expected.dtype
    torch.testing.assert_close(together, expected, rtol=0, atol=0.02)
    assert "aten::_to_copy" not in {event.name for event in profile.events()}


def adapted(modules):
    config = LoraConfig(r=2, target_modules=["1"], init_lora_weights=False)
    return inject_adapter_in_model(config, nn.Sequential(*modules))


def hooked(modules):
    modules[1].register_forward_hook(lambda module, inputs, output: output + 1)
    return modules


def offloaded(modules):
    forward = modules[1].forward
    modules[1].forward = lambda states: forward(states) + 1  # as accelerate's device maps do
    return modules


def with_bias(modules):
    modules[1] = nn.Linear(12, 8)
    return modules


def quantised(modules):
    return quantize_dynamic(nn.Sequential(*modules), {nn.Linear})


@pytest.mark.parametrize("change", [adapted, hooked, offloaded, with_bias, quantised])
def test_what_is_more_than_a_linear_layer_is_called_as_it_is(change):
    states = torch.randn(3, 12)
    plain = layers()
    changed = change(copy.deepcopy(plain))
    with torch.no_grad():
        product = FusedLinear(list(changed))
        assert product.weight is None
        assert torch.equal(product(states), one_by_one(changed, states))
    assert not torch.equal(one_by_one(changed, states), one_by_one(plain, states))


def test_under_autocast_a_product_is_in_autocasts_precision():
    modules, states = layers(), torch.randn(3, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = FusedLinear(modules)(states)
        assert together.dtype == torch.bfloat16
        torch.testing.assert_close(together, one_by_one(modules, states), rtol=0, atol=0.02)
