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


CPUS = pytest.mark.parametrize(("intel", "avx512"), [(True, True), (False, True), (False, False)])


@CPUS
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float64, 1e-12)]
)
def test_a_product_equals_its_layers(rows, dtype, tolerance, intel, avx512, monkeypatch):
    """On this computer, as it is done on an Intel CPU, on another, and on one without AVX-512; of any number of rows."""
    monkeypatch.setattr(fused_linear, "_is_intel", lambda: intel)
    monkeypatch.setattr(fused_linear, "_has_avx512", lambda: avx512)
    modules, states = layers().to(dtype), torch.randn(rows, 12, dtype=dtype)
    for laid_out_for in (1, rows):
        with torch.no_grad():
            product = FusedLinear(modules, laid_out_for)
            together = product(states)
        assert product.weight is not None
        fast = intel or (not avx512 and laid_out_for == 1)
        assert product.turned == (fast and dtype == torch.float32 and torch.backends.mkl.is_available())
        assert not (product.turned and product.packed)
        assert together.dtype == dtype
        torch.testing.assert_close(together, one_by_one(modules, states), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_of_a_long_input_takes_the_weight_as_it_is(rows, monkeypatch):
    monkeypatch.setattr(fused_linear, "_has_avx512", lambda: False)
    monkeypatch.setattr(fused_linear, "_is_intel", lambda: False)
    layer, states = nn.Linear(12, 8, bias=False), torch.randn(rows, 12)
    with torch.no_grad():
        product = FusedLinear([layer], rows)
        torch.testing.assert_close(product(states), layer(states), rtol=0, atol=1e-6)
        assert rows > 1 or torch.equal(product(states), layer(states))
    if torch.backends.mkl.is_available():
        assert (product.turned, product.packed) == (False, rows > 1)
        assert rows > 1 or product.weight.data_ptr() == layer.weight.data_ptr()  # and holds no copy of it


def test_one_row_has_no_use_for_a_packed_weight_of_any_size(monkeypatch):
    monkeypatch.setattr(fused_linear, "_has_avx512", lambda: False)
    monkeypatch.setattr(fused_linear, "_SMALL", 1)
    modules = layers()
    for rows, turned in ((1, torch.backends.mkl.is_available()), (2, False)):
        with torch.no_grad():
            product = FusedLinear(modules, rows)
            states = torch.randn(rows, 12)
            torch.testing.assert_close(product(states), one_by_one(modules, states), rtol=0, atol=1e-6)
        assert product.turned == turned


def test_bfloat16_without_its_instructions_is_not_packed(monkeypatch):
    """Asked of this computer; and, whatever that has, as where there are none."""
    supported = fused_linear._packs_bfloat16()
    modules, states = layers().to(torch.bfloat16), torch.randn(2, 12, dtype=torch.bfloat16)
    for packs in (supported, False):
        with torch.no_grad():
            product = FusedLinear(modules, 2)
            torch.testing.assert_close(product(states), one_by_one(modules, states), rtol=0, atol=0.02)
        assert product.packed == (packs and torch.backends.mkl.is_available())
        monkeypatch.setattr(fused_linear, "_packs_bfloat16", lambda: False)


def test_a_weight_that_is_larger_than_a_cache_is_not_turned(monkeypatch):
    monkeypatch.setattr(fused_linear, "_is_intel", lambda: True)
    monkeypatch.setattr(fused_linear, "_has_avx512", lambda: True)
    monkeypatch.setattr(fused_linear, "_SMALL", 12 * 8)
    modules, states = layers(), torch.randn(2, 12)
    for few, small in ((modules[:1], torch.backends.mkl.is_available()), (modules, False)):
        with torch.no_grad():
            product = FusedLinear(few, 2)
            torch.testing.assert_close(product(states), one_by_one(few, states), rtol=0, atol=1e-6)
        assert product.turned == small


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_casts_a_weight_once(weights):
    modules, states = layers().to(weights), torch.randn(5, 12, dtype=weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        product = FusedLinear(modules, 2)
        together, expected = product(states), one_by_one(modules, states)
        narrow = states.to(product.dtype)
        with torch.profiler.profile() as profile:
            product(narrow)
    assert together.dtype == expected.dtype
    torch.testing.assert_close(together, expected, rtol=0, atol=0.02)
    assert "aten::_to_copy" not in {event.name for event in profile.events()}


def adapted(modules, names="02", **how):
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[*names], init_lora_weights=False, **how)
    return inject_adapter_in_model(config, nn.Sequential(*modules)).eval()


def hears_an_adapter(modules):
    changed = adapted(modules)
    changed[0].lora_A["default"].register_forward_hook(lambda module, inputs, output: output + 1)
    return changed


def drops(modules):
    return adapted(modules, lora_dropout=1e-9).train()


def weighs_directions(modules):
    return adapted(modules, use_dora=True)


def merged_and_disabled(modules):
    changed = adapted(modules)
    for module in (changed[0], changed[2]):
        module.merge()
        module.enable_adapters(False)
    return changed


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


@pytest.mark.parametrize(
    "change", [hears_an_adapter, drops, weighs_directions, hooked, offloaded, with_bias, quantised]
)
def test_what_is_more_than_a_linear_layer_is_called_as_it_is(change):
    states = torch.randn(3, 12)
    plain = layers()
    changed = change(copy.deepcopy(plain))
    with torch.no_grad():
        product = FusedLinear(list(changed), 2)
        assert product.weight is None
        assert torch.equal(product(states), one_by_one(changed, states))
    assert not torch.equal(one_by_one(changed, states), one_by_one(plain, states))


def test_under_autocast_a_product_is_in_autocasts_precision():
    modules, states = layers(), torch.randn(3, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = FusedLinear(modules, 2)(states)
        assert together.dtype == torch.bfloat16
        torch.testing.assert_close(together, one_by_one(modules, states), rtol=0, atol=0.02)


@CPUS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float64, 1e-11)]
)
def test_adapters_are_part_of_the_product(dtype, tolerance, intel, avx512, monkeypatch):
    monkeypatch.setattr(fused_linear, "_is_intel", lambda: intel)
    monkeypatch.setattr(fused_linear, "_has_avx512", lambda: avx512)
    plain, states = layers().to(dtype), torch.randn(3, 12, dtype=dtype)
    changed = adapted(copy.deepcopy(plain))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), changed, "second")
    changed[0].set_adapter(["default", "second"])
    with torch.no_grad():
        product = FusedLinear(list(changed), 2)
        together = product(states)
    assert product.weight is not None
    assert (product.low_rank is None) == (dtype != torch.bfloat16)  # a narrow weight would lose what is added to it
    assert together.dtype == dtype
    torch.testing.assert_close(together, one_by_one(changed, states), rtol=0, atol=tolerance)
    for module, kept in zip(changed, plain, strict=True):  # the layers' own weights are as they were
        assert torch.equal(getattr(module, "base_layer", module).weight, kept.weight)
    assert (together - one_by_one(plain, states)).abs().max() > 10 * tolerance


@pytest.mark.parametrize("how", ["disabled", "merged", "another"])
def test_adapters_that_are_not_at_work_are_left_out(how):
    plain, states = layers(), torch.randn(3, 12)
    changed = adapted(copy.deepcopy(plain))
    if how == "another":
        inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), changed, "second")
    for module in (changed[0], changed[2]):
        if how == "disabled":
            module.enable_adapters(False)
        elif how == "merged":
            module.merge()
        else:
            module.set_adapter(["second"])
    with torch.no_grad():
        product = FusedLinear(list(changed), 2)
        assert product.weight is not None
        torch.testing.assert_close(product(states), one_by_one(changed, states), rtol=0, atol=1e-5)


def test_what_was_merged_and_is_disabled_is_taken_out_again():
    plain, states = layers(), torch.randn(3, 12)
    changed = merged_and_disabled(copy.deepcopy(plain))
    with torch.no_grad():
        together = FusedLinear(list(changed), 2)(states)
    torch.testing.assert_close(together, one_by_one(plain, states), rtol=0, atol=1e-5)


def test_under_autocast_adapters_stay_apart_from_the_narrow_weight():
    changed, states = adapted(layers()), torch.randn(3, 12)
    for module in (changed[0], changed[2]):
        module.lora_B["default"].weight.data.mul_(1e-3)  # what a bfloat16 weight hardly holds
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        product = FusedLinear(list(changed), 2)
        together = product(states)
        torch.testing.assert_close(together, one_by_one(changed, states), rtol=0, atol=0.02)
    assert together.dtype == torch.bfloat16
    assert product.low_rank is not None
