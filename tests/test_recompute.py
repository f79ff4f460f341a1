import gc
from contextlib import nullcontext

import pytest
import torch
from test_ppo import LORA
from tiny import tiny_generator
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUActivation

from musicrl_hf import generator as generator_module
from musicrl_hf import recompute
from musicrl_hf.recompute import recomputed
from musicrl_hf.training.ppo_policy import add_lora, generator_of

PROMPTS = ["slow piano", "fast guitar drums"]


def gradients(model: nn.Module, codes: Tensor, bf16: bool = False) -> dict[str, Tensor]:
    generator = generator_of(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        scores = generator.score_codes(codes, *generator.text_inputs(PROMPTS))
    (scores.logprobs.sum() + scores.entropies.square().sum()).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def kept_bytes(run) -> int:
    """What a forward pass leaves in memory, of all that it took."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        left = run()
    assert left is not None
    return sum(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_the_same_to_the_bit(monkeypatch, lora, checkpointing):
    model = tiny_generator()
    model.train().disable_dropout()
    model.freeze_codec()
    model = add_lora(model, LORA, "base") if lora else model
    if checkpointing:
        generator_of(model).decoder.gradient_checkpointing_enable()
    codes = torch.randint(0, 16, (2, 4, 7))
    ours = gradients(model, codes)
    monkeypatch.setattr(generator_module, "recomputed", lambda layers: nullcontext())
    kept = gradients(model, codes)
    assert len(ours) > 10
    assert ours.keys() == kept.keys()
    for name, gradient in kept.items():
        assert torch.equal(ours[name], gradient), name


def test_gradients_under_autocast_are_those_of_autocast(monkeypatch):
    model = tiny_generator()
    model.train().disable_dropout()
    model.freeze_codec()
    codes = torch.randint(0, 16, (2, 4, 7))
    exact, ours = gradients(model, codes), gradients(model, codes, bf16=True)
    monkeypatch.setattr(generator_module, "recomputed", lambda layers: nullcontext())
    kept = gradients(model, codes, bf16=True)

    def away(found: dict[str, Tensor]) -> float:
        errors = [(found[name] - gradient).norm() / gradient.norm().clamp(min=1e-3) for name, gradient in exact.items()]
        return float(torch.stack(errors).mean())

    assert 0 < away(ours) < 1.2 * away(kept)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_quarter_of_the_activations_or_more_is_not_kept(monkeypatch, bf16, lora):
    model = tiny_generator(layers=4)
    model.train().disable_dropout()
    model.text_encoder.requires_grad_(False)
    if lora:
        add_lora(model, LORA, "base")
    codes = torch.randint(0, 16, (2, 4, 60))
    states = model.encode_text(*model.text_inputs(PROMPTS)).detach()
    mask = model.text_inputs(PROMPTS)[1]

    def hidden() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model.decoder_hidden(codes, states, mask)[0]

    hidden()  # what a first call leaves for later ones is not counted
    ours = kept_bytes(hidden)
    monkeypatch.setattr(generator_module, "recomputed", lambda layers: nullcontext())
    assert 0 < ours <= 0.76 * kept_bytes(hidden)


def test_what_checkpointing_lets_go_is_let_go():
    """Nobody holds what a norm read inside of a layer that is run again, once the layer is left."""
    norm, states = nn.LayerNorm(4), torch.randn(3, 4, requires_grad=True)

    def held() -> int:
        return sum(isinstance(each, recompute._Again) for each in gc.get_objects())

    with recomputed([norm]):
        normed = norm(states)
        assert held() == 1
        loss = checkpoint(lambda given: norm(given * 2).sum(-1), normed, use_reentrant=False).sum()
        assert held() == 1
        loss.backward()
    assert states.grad is not None


def test_adapters_widen_their_inputs_again_afterwards():
    model = tiny_generator()
    layers = add_lora(model, LORA, "base").get_base_model().decoder.model.decoder.layers
    adapters = [part for part in layers.modules() if hasattr(part, "cast_input_dtype_enabled")]
    with torch.autocast("cpu", torch.bfloat16), recomputed(layers):
        assert not any(part.cast_input_dtype_enabled for part in adapters)
    assert adapters
    assert all(part.cast_input_dtype_enabled for part in adapters)


@pytest.mark.parametrize("changed", ["norm", "linear"])
def test_weights_that_change_before_the_backward_pass_are_an_error(changed):
    layer = nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)})
    states = torch.randn(2, 4, requires_grad=True)
    with recomputed([layer]):
        loss = layer["linear"](layer["norm"](states)).sum()
    with torch.no_grad():
        layer[changed].weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("activation", [nn.GELU(), GELUActivation(), nn.ReLU()])
def test_what_reads_a_norm_in_another_order_gets_its_own(activation):
    """The transpose of an output has its place and size, and so has what it was changed to; both are other tensors."""

    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.activation = nn.LayerNorm(6), activation
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, states: Tensor) -> Tensor:
            normed = self.norm(states)
            halved = self.norm(states.flip(0)).mul_(0.5)
            turned = self.activation((normed @ self.weight).T).T
            return (
                self.activation(normed.T @ self.weight) @ self.weight
                + normed.mul(normed)
                + (turned + halved) @ self.weight
            )

    layer, states = Twisted(), torch.randn(6, 6)
    layer(states).square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in layer.named_parameters()}
    layer.zero_grad()
    with recomputed([layer]):
        loss = layer(states).square().sum()
    loss.backward()
    for name, weight in layer.named_parameters():
        assert_close(weight.grad, expected[name], rtol=0, atol=0, msg=name)
