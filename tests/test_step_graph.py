"""A recorded step against the step run one by one: on a CPU what is recorded is run again, on CUDA it is a graph."""

import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recorders import Again
from tiny import tiny_generator

from musicrl_hf import step_graph
from musicrl_hf.step_decoder import StepDecoder
from musicrl_hf.step_graph import RecordedStep

PROMPTS = ["a slow piano air played at night", "drums"]  # of unequal length: the second is padded
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
modes = pytest.mark.parametrize("guidance_scale", [1.0, 3.0])


class Never(Again):
    def record(self, function):
        super().record(function)  # as far as it came
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def on_cpu(monkeypatch):
    made: list[Again] = []
    monkeypatch.setitem(step_graph.RECORDERS, "cpu", lambda device: made.append(Again(device)) or made[-1])
    return made


@torch.no_grad()
def logits_both_ways(model, guidance_scale, steps, make):
    """[S, B, K, V] of the dynamic steps, and of what `make` of another decoder turns codes into logits; the text is loud."""
    ids, mask = model.text_inputs([*PROMPTS, PROMPTS[0]])
    mask[2] = 0  # a clip without text
    states = 300 * model.encode_text(ids, mask)  # random weights hardly listen
    K = model.config.num_codebooks
    codes = torch.randint(0, model.config.codebook_size, (steps, 3, K), generator=torch.Generator().manual_seed(1))
    codes[0] = model.config.pad_code
    codes = codes.to(model.device)
    one_by_one, other = (StepDecoder(model.decoder, states, mask, steps, guidance_scale) for _ in range(2))
    step = make(other, codes[0])
    return (
        torch.stack([one_by_one.logits(one_by_one.step(now)) for now in codes]),
        torch.stack([step(now).clone() for now in codes]),
    )


def static_step(decoder, codes):
    decoder.restart(static=True)
    return lambda codes: decoder.logits(decoder.step(codes))


def with_adapter(model):
    torch.manual_seed(1)
    targets = r".*decoder\.model\.decoder\.layers\.\d+\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_static_form_equals_the_dynamic_one(dtype, guidance_scale):
    model = tiny_generator().to(dtype).eval()
    dynamic, static = logits_both_ways(model, guidance_scale, 19, static_step)  # more than one multiple of 16
    assert dynamic.std() > 0.1
    # In bfloat16 two sums differ in their last of 8 bits, and guidance takes three times the difference.
    tolerance = 1e-4 if dtype is torch.float32 else 0.02 * guidance_scale * dynamic.abs().max().item()
    torch.testing.assert_close(static, dynamic, rtol=0, atol=tolerance)


@modes
@pytest.mark.parametrize("steps", [2, 19])  # 2 are fewer than the warm-up has
def test_recorded_steps_equal_the_others(on_cpu, steps, guidance_scale):
    for model in (tiny_generator().eval(), with_adapter(tiny_generator()).eval()):
        dynamic, recorded = logits_both_ways(model, guidance_scale, steps, RecordedStep)
        torch.testing.assert_close(recorded, dynamic, rtol=0, atol=1e-4)
    assert [recorder.replays for recorder in on_cpu] == [steps] * 2


def test_what_memory_held_before_is_not_heard(on_cpu, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *shape: like.new_zeros(*shape).fill_(torch.nan))
    dynamic, recorded = logits_both_ways(tiny_generator().eval(), 3.0, 19, RecordedStep)
    torch.testing.assert_close(recorded, dynamic, rtol=0, atol=1e-4)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_codes_are_the_same(on_cpu, dtype, guidance_scale):
    model = tiny_generator().to(dtype).eval()
    how = {"do_sample": False, "guidance_scale": guidance_scale}
    inputs = model.text_inputs(PROMPTS)
    assert torch.equal(
        model.sample_codes(*inputs, 12, **how, cuda_graph=True),
        model.sample_codes(*inputs, 12, **how, cuda_graph=False),
    )
    assert [recorder.replays for recorder in on_cpu] == [15]  # 12 frames, and 3 steps of delay
    how = {"duration_s": 0.2, "guidance_scale": guidance_scale, "seed": 1}
    assert torch.equal(
        model.sample(PROMPTS, **how, cuda_graph=True).codes, model.sample(PROMPTS, **how, cuda_graph=False).codes
    )
    assert len(on_cpu) == 2


def test_under_autocast_too(on_cpu):
    model = tiny_generator().eval()
    inputs = model.text_inputs(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        recorded = model.sample_codes(*inputs, 12, do_sample=False, cuda_graph=True)
        assert torch.equal(recorded, model.sample_codes(*inputs, 12, do_sample=False))
    assert len(on_cpu) == 1


def test_a_graph_is_recorded_where_it_is_worth_it(on_cpu):
    model = tiny_generator()
    inputs = model.text_inputs(PROMPTS)
    for frames, recorded in ((28, 0), (29, 1)):  # 31 steps, and 32
        model.sample_codes(*inputs, frames)
        assert len(on_cpu) == recorded
    model.sample_codes(*inputs, 29, cuda_graph=False)
    assert len(on_cpu) == 1


def test_the_decoder_is_let_go_with_its_recording(on_cpu):
    model = tiny_generator()
    ids, mask = model.text_inputs(PROMPTS)
    with torch.no_grad():
        decoder = StepDecoder(model.decoder, model.encode_text(ids, mask), mask, 4)
        recorded = RecordedStep(decoder, torch.zeros(2, 4, dtype=torch.long))
    on_cpu.clear()
    kept = weakref.ref(decoder)
    del decoder, recorded
    assert kept() is None


def test_what_cannot_be_recorded_is_run_step_by_step(monkeypatch):
    monkeypatch.setitem(step_graph.RECORDERS, "cpu", Never)
    model = tiny_generator()
    inputs = model.text_inputs(PROMPTS)
    with pytest.warns(UserWarning, match=r"cannot be recorded .*\(operation not permitted") as warned:
        codes = model.sample_codes(*inputs, 12, do_sample=False, cuda_graph=True)
    assert len(warned) == 1
    assert torch.equal(codes, model.sample_codes(*inputs, 12, do_sample=False, cuda_graph=False))


@pytest.mark.parametrize("method", ["sample", "sample_codes"])
def test_a_graph_on_a_cpu_is_refused(method):
    model = tiny_generator()
    arguments = [PROMPTS] if method == "sample" else [*model.text_inputs(PROMPTS), 5]
    with pytest.raises(ValueError, match="`cuda_graph` = True needs .* CUDA device, and it is on 'cpu'; move it there"):
        getattr(model, method)(*arguments, cuda_graph=True)


# -- on CUDA ----------------------------------------------------------------------------------------------------------


@needs_cuda
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_a_graph_equals_the_steps(dtype, guidance_scale):
    model = tiny_generator().to("cuda", dtype).eval()
    dynamic, recorded = logits_both_ways(model, guidance_scale, 40, RecordedStep)
    tolerance = 1e-4 if dtype is torch.float32 else 0.02 * guidance_scale * dynamic.abs().max().item()
    torch.testing.assert_close(recorded, dynamic, rtol=0, atol=tolerance)


@needs_cuda
@modes
def test_on_cuda_the_codes_are_the_same(guidance_scale):
    model = with_adapter(tiny_generator()).to("cuda").eval()
    inputs = model.text_inputs(PROMPTS)
    how = {"do_sample": False, "guidance_scale": guidance_scale}
    codes = model.sample_codes(*inputs, 40, **how, cuda_graph=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is a graph, and no fallback
        for cuda_graph in (True, None):
            assert torch.equal(model.sample_codes(*inputs, 40, **how, cuda_graph=cuda_graph), codes)
        with torch.autocast("cuda", torch.bfloat16):
            assert model.sample_codes(*inputs, 40, **how, cuda_graph=True).shape == codes.shape


@needs_cuda
def test_on_cuda_what_cannot_be_recorded_is_run_step_by_step():
    model = tiny_generator().to("cuda")
    inputs = model.text_inputs(PROMPTS)
    codes = model.sample_codes(*inputs, 40, do_sample=False, cuda_graph=False)
    # It waits for the GPU, and leaves the output alone.
    model.decoder.model.decoder.layer_norm.register_forward_hook(
        lambda module, args, output: None if output.sum().item() else None
    )
    with pytest.warns(UserWarning, match="cannot be recorded"):
        assert torch.equal(model.sample_codes(*inputs, 40, do_sample=False), codes)
    # Torch's own generator still draws, and a graph can still be recorded.
    assert model.sample_codes(*inputs, 40, cuda_graph=False).shape == codes.shape
    other = tiny_generator().to("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other.sample_codes(*inputs, 40, do_sample=False), codes)
