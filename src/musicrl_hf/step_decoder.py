"""The decoder one step at a time, its keys and values in place: what sampling spends its time on.

The same modules as the stock decoder's forward, in the same order; adapters and quantised layers are called as they are, and
plain linear layers that read the same input become one product (`FusedLinear`). What differs is around them: the cache is
allocated once and written in place, the keys and values of the text are computed once, a step needs no mask, and the K
codebooks are looked up and summed in one call.

Under classifier-free guidance a clip is decoded with its text and without, in one batch. A clip without text hears zeros,
whatever it asks: that is computed once. Until the first text is heard both are the same clip. And since the heads are linear, the
two trunks are combined in front of them.

A step has two forms. The dynamic one hears what there is of the cache. The static one hears all of it, with a mask over what is
to come, and its position is a tensor: no shape and no address depends on the step, as a recording asks (`step_graph`).

Left out: dropout and gradients. Sampling uses neither.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from transformers import MusicgenForCausalLM

from .fused_linear import FusedLinear

_ALIGNED = 16  # steps: fused attention copies a mask whose rows are of another multiple, in every layer


class StepDecoder:
    """State of B clips that are decoded together.

    It reads the weights once, when it is made: a change to them asks for a new one. While it lives it holds a second copy of the
    linear layers' weights that are fused, have adapters, or are laid out anew (nearly all of them on x86 CPUs).

    Args:
        decoder: MusicGen's decoder with its K heads.
        text_states: [B, P, H] that it attends to.
        text_mask: [B, P], 0 at padding; a row of zeros is a clip without text, whose states must be 0.
        steps: decoder steps S there is room for.
        guidance_scale: above 1, classifier-free guidance.

    Example:
        >>> from musicrl_hf import load_generator
        >>> model = load_generator("musicrl-tiny")
        >>> ids, mask = model.text_inputs(["a slow air"])
        >>> with torch.no_grad():
        ...     decoder = StepDecoder(model.decoder, model.encode_text(ids, mask), mask, steps=2)
        ...     logits = decoder.logits(decoder.step(torch.full((1, 4), model.config.pad_code)))
        >>> logits.shape
        torch.Size([1, 4, 1024])
    """

    def __init__(
        self,
        decoder: MusicgenForCausalLM,
        text_states: Tensor,
        text_mask: Tensor,
        steps: int,
        guidance_scale: float = 1.0,
    ):
        trunk = decoder.model.decoder
        heads, batch = trunk.config.num_attention_heads, text_states.shape[0]
        self.guidance_scale = guidance_scale
        text_bias: Tensor | None = None
        if not bool(text_mask.all()):
            padding = (text_mask == 0)[:, None, None]
            # Lowest numbers and not -inf: a clip without text has nothing to attend to, and would become NaN.
            lowest = torch.finfo(text_states.dtype).min
            text_bias = text_states.new_zeros(padding.shape).masked_fill(padding, lowest)
        guided = guidance_scale > 1
        self.layers = [
            _StepLayer(layer, heads, text_states, text_bias, guided, batch * 2 if guided and index else batch, steps)
            for index, layer in enumerate(trunk.layers)
        ]
        self.final_norm = trunk.layer_norm
        self.heads, self.num_codebooks = FusedLinear(decoder.lm_heads, batch), len(decoder.lm_heads)
        # The K tables one below the other: `embedding_bag` sums a code of each.
        self.table = torch.cat([table.weight for table in trunk.embed_tokens])
        rows = trunk.embed_tokens[0].num_embeddings
        self.offsets = torch.arange(len(trunk.embed_tokens), device=text_states.device) * rows
        self.positions = trunk.embed_positions(self.offsets.new_zeros(1, 1, steps)).to(text_states)
        self.steps = steps
        self.position: int | Tensor = 0
        self.ahead: Tensor | None = None  # [1, 1, 1, S'], the static form's mask

    def restart(self, static: bool = False) -> None:
        """Back to the first step, in the dynamic or the static form; the static one gets a new cache, in zeros."""
        self.position, self.ahead = 0, None
        if static:
            room = -(-self.steps // _ALIGNED) * _ALIGNED
            for layer in self.layers:
                layer.make_room(room)
            self.position = self.offsets.new_zeros(1)
            self.ahead = self.layers[0].keys.new_empty(1, 1, 1, room)
            self.rewind()

    def rewind(self) -> None:
        """Back to the first step, in place; what the static form had in its cache is 0 again."""
        if not isinstance(self.position, Tensor) or self.ahead is None:
            self.position = 0
            return
        self.position.zero_()
        # What no step has written yet is read, and weighs 0: of what memory held before, that could be NaN.
        self.ahead.fill_(torch.finfo(self.ahead.dtype).min)
        for layer in self.layers:
            layer.keys.zero_()
            layer.values.zero_()

    def step(self, codes: Tensor) -> Tensor:
        """Trunk states [B, H], guided, behind codes [B, K], those of the step before (pads at the first)."""
        if isinstance(self.position, Tensor) and self.ahead is not None:
            place = self.positions.index_select(0, self.position)
            self.ahead.index_fill_(-1, self.position, 0)
        else:
            place = self.positions[self.position]
        states = embedding_bag(codes + self.offsets, self.table, mode="sum") + place
        for layer in self.layers:
            states = layer.step(states, self.position, self.ahead)
        self.position += 1  # a tensor in place
        states = self.final_norm(states)
        if self.guidance_scale > 1:
            with_text, without = states.chunk(2)
            states = without + (with_text - without) * self.guidance_scale
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Trunk states [B, H] to logits [B, K, V] float32."""
        return self.heads(states).unflatten(-1, (self.num_codebooks, -1)).float()


class _StepLayer:
    """A MusicgenDecoderLayer, what it remembers of `clips` clips, and the text [B, P, H] that the first B of them hear."""

    def __init__(
        self,
        layer: Any,  # its parts are Tensor | Module to torch
        heads: int,
        text_states: Tensor,
        text_bias: Tensor | None,
        guided: bool,
        clips: int,
        steps: int,
    ):
        own, text, with_text = layer.self_attn, layer.encoder_attn, len(text_states)
        after = with_text * 2 if guided else with_text
        self.layer, self.heads, self.text_bias = layer, heads, text_bias
        self.query_key_value = FusedLinear([own.q_proj, own.k_proj, own.v_proj], clips)
        self.out = FusedLinear([own.out_proj], clips)
        self.text_query, self.text_out = (FusedLinear([each], with_text) for each in (text.q_proj, text.out_proj))
        self.inner, self.outer = FusedLinear([layer.fc1], after), FusedLinear([layer.fc2], after)
        self.text_keys = self._split(text.k_proj(text_states)).contiguous()
        self.text_values = self._split(text.v_proj(text_states)).contiguous()
        self.without_text: Tensor | None = None
        if guided:
            self.without_text = text.out_proj(text.v_proj(torch.zeros_like(text_states[:1, 0])))
        shape = (clips, heads, steps, text_states.shape[-1] // heads)
        self.keys, self.values = text_states.new_empty(shape), text_states.new_empty(shape)

    def _split(self, states: Tensor) -> Tensor:
        """[B, N, H] to [B, heads, N, H / heads]."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def make_room(self, steps: int) -> None:
        """A new cache for that many steps, with anything in it."""
        shape = (*self.keys.shape[:2], steps, self.keys.shape[-1])
        self.keys, self.values = self.keys.new_empty(shape), self.values.new_empty(shape)

    def step(self, states: Tensor, now: int | Tensor, ahead: Tensor | None) -> Tensor:
        """Step `now` of states [B, H], or [2 B, H] under guidance, where they may still be [B, H] on their way in."""
        query_key_value = self.query_key_value(self.layer.self_attn_layer_norm(states))
        query, key, value = query_key_value.unflatten(-1, (3, self.heads, -1)).unbind(1)
        states = states + self.out(_attend(query, *self._remember(key, value, now), ahead))

        with_text = states[: len(self.text_keys)]
        query = self.text_query(self.layer.encoder_attn_layer_norm(with_text)).unflatten(-1, (self.heads, -1))
        heard = self.text_out(_attend(query, self.text_keys, self.text_values, self.text_bias))
        if self.without_text is None:
            states = with_text + heard
        else:
            states = torch.cat([with_text + heard, states[-len(with_text) :] + self.without_text])

        inner = self.layer.activation_fn(self.inner(self.layer.final_layer_norm(states)))
        return states + self.outer(inner)

    def _remember(self, key: Tensor, value: Tensor, now: int | Tensor) -> tuple[Tensor, Tensor]:
        """Write [N, heads, D] to the cache; what of it can be heard: keys and values up to `now`, or all where it is a tensor."""
        if isinstance(now, Tensor):
            self.keys.index_copy_(2, now, key[:, :, None].to(self.keys))  # autocast may have made them narrower
            self.values.index_copy_(2, now, value[:, :, None].to(self.values))
            return self.keys, self.values
        self.keys[:, :, now], self.values[:, :, now] = key, value
        return self.keys[:, :, : now + 1], self.values[:, :, : now + 1]


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """What queries [N, heads, D] hear of keys and values [N, heads, T, D]: [N, heads * D]."""
    if query.dtype != torch.float32:
        return scaled_dot_product_attention(query[:, :, None], keys, values, bias).flatten(1)
    # The same in float32, where two batched products take two thirds of the time for one query each on a CPU, and make a whole
    # recorded step of musicrl-tiny 1.1 to 1.4 times as fast on an NVIDIA H200.
    query = (query * query.shape[-1] ** -0.5).reshape(-1, 1, query.shape[-1])
    scores = torch.bmm(query, keys.flatten(0, 1).mT)
    if bias is not None:
        scores = (scores.unflatten(0, keys.shape[:2]) + bias).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(len(keys), -1)
