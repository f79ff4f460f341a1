"""The policy with its value baseline as one module (so that one DDP forward serves both), its anchor, and their files."""

import copy
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..generator import MusicRLForConditionalGeneration, load_generator
from ..likelihood import logits_with_heads
from ..places import SAMPLING_FILE, unlock_weights, whole_path
from .checkpoints import ASIDE
from .losses import step_sums

VALUE_FILE = "value_head.safetensors"

LORA_TARGETS = r".*decoder\.model\.decoder\.layers\.\d+\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def add_lora(generator: MusicRLForConditionalGeneration, config: LoraConfig, base_name: str) -> PeftModel:
    """Put a fresh adapter on a generator; the saved adapter calls its base `base_name`, a folder by its whole path."""
    model = get_peft_model(generator, copy.copy(config))  # the caller's stays as it is
    model.peft_config["default"].base_model_name_or_path = whole_path(base_name)
    return model


def generator_of(model: MusicRLForConditionalGeneration | PeftModel) -> MusicRLForConditionalGeneration:
    """The generator itself; LoRA layers live inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class PolicyWithValue(nn.Module):
    """A generator and V(s_t), a number for each decoder step before its action.

    V starts as a constant on the base checkpoint's features: the head's weights are 0, and its bias is set to the mean
    return of the first clips by the trainer.

    Args:
        policy: the generator, or a LoRA adapter over one. Its codec and text encoder are frozen, dropout is zeroed.
        value_model: "shared" or "separate", see `PPOSettings`.
        learns_guidance: what is saved says that it is sampled at guidance scale 1 by default, for guidance comes to be in its weights.
    """

    def __init__(
        self,
        policy: MusicRLForConditionalGeneration | PeftModel,
        value_model: str = "shared",
        learns_guidance: bool = False,
    ) -> None:
        super().__init__()
        generator = generator_of(policy)
        if not isinstance(generator, MusicRLForConditionalGeneration):
            raise ValueError(
                f"`model` must be a MusicRLForConditionalGeneration (or a PEFT adapter over one), got "
                f"{type(generator).__name__}; load it with musicrl_hf.load_generator."
            )
        if value_model == "separate" and isinstance(policy, PeftModel):
            raise ValueError("`value_model` = 'separate' copies the whole trunk; with an adapter, use 'shared'.")
        generator.disable_dropout()
        generator.freeze_codec()
        generator.text_encoder.requires_grad_(False)
        self.policy = policy
        self.learns_guidance = learns_guidance
        if learns_guidance:
            generator.generation_config.guidance_scale = 1.0
        self.value_trunk = copy_decoder(generator) if value_model == "separate" else None
        self.value_head = nn.Linear(generator.config.decoder.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def generator(self) -> MusicRLForConditionalGeneration:
        """The generator that is trained."""
        return generator_of(self.policy)

    def forward(
        self, codes: Tensor, input_ids: Tensor, attention_mask: Tensor, temperature: float, ref_logits: Tensor
    ) -> dict[str, Tensor]:
        """Score codes [B, K, F] and their distributions' distance from the anchor's logits [B, K, S, V].

        Returns:
            logprobs, values, entropy and kl [B, S] of the steps, and mask [B, K, S].
        """
        scores = self.generator.score_codes(codes, input_ids, attention_mask, temperature, ref_logits)
        assert scores.kl is not None
        hidden = scores.hidden
        if self.value_trunk is not None:
            text_states = self.value_trunk.encode_text(input_ids, attention_mask)
            hidden, _ = self.value_trunk.decoder_hidden(codes, text_states, attention_mask)
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would leave a value of 8.8 in steps of 1/16
            values = self.value_head(hidden.to(self.value_head.weight.dtype))[..., 0].float()
        return {
            "logprobs": step_sums(scores.logprobs, scores.mask),
            "values": values,
            "entropy": step_sums(scores.entropies, scores.mask),
            "kl": step_sums(scores.kl, scores.mask),
            "mask": scores.mask,
        }

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Recompute the decoder's activations in the backward pass (called by the Trainer)."""
        self.generator.decoder.activation_checkpointing_enable(**kwargs)
        if self.value_trunk is not None:
            self.value_trunk.decoder.activation_checkpointing_enable(**kwargs)

    # -- files: a stock generator (or adapter), and the value baseline beside it ---------------------------------------

    def value_state(self) -> dict[str, Tensor]:
        """What V consists of: its head, and its trunk where that is not the policy's."""
        state = {f"value_head.{name}": tensor for name, tensor in self.value_head.state_dict().items()}
        if self.value_trunk is not None:
            trunk = self.value_trunk.state_dict()
            own = [name for name in trunk if name.startswith(("decoder.model.", "enc_to_dec_proj."))]
            state |= {f"value_trunk.{name}": trunk[name] for name in own}
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def save(self, folder: str | os.PathLike) -> None:
        """Write the generator (or adapter) under its stock names and the value baseline, file by file in one move each."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=folder) as scratch:
            # Adapters: without the flag PEFT asks the Hub whether the base's vocabulary was resized.
            options = {"save_embedding_layers": False} if isinstance(self.policy, PeftModel) else {}
            self.policy.save_pretrained(scratch, **options)
            if self.learns_guidance and isinstance(self.policy, PeftModel):  # a generator writes this file itself
                scale = {"guidance_scale": self.generator.generation_config.guidance_scale}
                (Path(scratch) / SAMPLING_FILE).write_text(json.dumps(scale, indent=2) + "\n")
            save_file(self.value_state(), Path(scratch) / VALUE_FILE, metadata={"format": "pt"})
            unlock_weights(scratch)
            for file in sorted(Path(scratch).iterdir()):
                if file.name != "README.md":  # PEFT's empty form of a model card; ours is written on publishing
                    file.replace(folder / file.name)

    def load(self, folder: str | os.PathLike) -> None:
        """Read back what `save` wrote."""
        path = Path(folder) / VALUE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"`resume_from_checkpoint`: {path} is missing; give a checkpoint-N folder that RL fine-tuning wrote."
            )
        if isinstance(self.policy, PeftModel):
            set_peft_model_state_dict(self.policy, load_peft_weights(str(folder), device="cpu"))
        else:
            saved = MusicRLForConditionalGeneration.from_pretrained(folder)
            self.generator.load_state_dict(saved.state_dict())
        state = load_file(path)
        if set(state) != set(self.value_state()):
            raise ValueError(
                f"{path} does not fit `value_model`; resume with the setting that the run was started with."
            )
        self.load_state_dict(state, strict=False)


def copy_decoder(generator: MusicRLForConditionalGeneration) -> MusicRLForConditionalGeneration:
    """A copy with a decoder trunk of its own; what is frozen, and the heads that a baseline has no use for, are shared."""
    shared = (generator.text_encoder, generator.audio_encoder, generator.decoder.lm_heads, generator.tokenizer)
    return copy.deepcopy(generator, {id(part): part for part in shared})


class Anchor:
    """pi_0, the frozen policy that the KL is measured from.

    Args:
        policy: where the run starts from.
        ref_model: the anchor, or its name; None for the start itself: with LoRA the model without its adapter, else a
            frozen copy. (MusicRL-RU starts from R: `load_generator` merges an adapter that R is, so "without its adapter"
            is R there, and not the base.)
        guidance_scale: above 1, pi_0 is what that model samples with so much classifier-free guidance.
    """

    def __init__(
        self,
        policy: MusicRLForConditionalGeneration | PeftModel,
        ref_model: MusicRLForConditionalGeneration | str | os.PathLike | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        self.guidance_scale = guidance_scale
        generator = generator_of(policy)
        self.adapted = policy if ref_model is None and isinstance(policy, PeftModel) else None
        if self.adapted is not None:
            self.generator = generator
            return
        if ref_model is None:
            frozen = (generator.text_encoder, generator.audio_encoder, generator.tokenizer)
            self.generator = copy.deepcopy(generator, {id(part): part for part in frozen})
        elif isinstance(ref_model, MusicRLForConditionalGeneration):
            self.generator = ref_model
        elif isinstance(ref_model, str | os.PathLike):
            self.generator = load_generator(ref_model)
        else:
            raise ValueError(
                f"`ref_model` must be a generator, its name or None, got {type(ref_model).__name__}; merge an adapter "
                "first (load_generator does)."
            )
        if self.generator is generator:
            raise ValueError(
                "`ref_model` is `model` itself, which is being trained; give None for a frozen copy of it."
            )
        for name in ("num_codebooks", "codebook_size", "audio_channels"):
            ours, theirs = getattr(generator.config, name), getattr(self.generator.config, name)
            if ours != theirs:
                raise ValueError(f"`ref_model` has {name} {theirs}, `model` {ours}; the anchor must share the codec.")
        self.generator.requires_grad_(False)
        self.generator.eval().disable_dropout()

    def to(self, device: torch.device) -> None:
        """Move the anchor where the policy is."""
        self.generator.to(device)

    @torch.no_grad()
    def logits(self, codes: Tensor, input_ids: Tensor, attention_mask: Tensor, temperature: float) -> Tensor:
        """The anchor's logits [B, K, S, V] of codes [B, K, F], guided, divided by `temperature`."""
        with nullcontext() if self.adapted is None else self.adapted.disable_adapter():
            text_states = self.generator.encode_text(input_ids, attention_mask)
            hidden, _ = self.generator.decoder_hidden(codes, text_states, attention_mask)
            if self.guidance_scale > 1:  # one step of zeros to attend to is no text; and heads are linear
                none, heard = torch.zeros_like(text_states[:, :1]), torch.ones_like(attention_mask[:, :1])
                hidden = self.generator.decoder_hidden(codes, none, heard)[0].lerp(hidden, self.guidance_scale)
            heads, size = self.generator.decoder.lm_heads, self.generator.config.codebook_size
            return logits_with_heads(hidden, heads, size, temperature)
