"""The generator as stock TRL would have it: one head over K * V at every flat position, driven by TRL's own fused head."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from musicrl_hf.flat import FlatMusicRLForCausalLM, split_flat

NO_MASS = 1e4  # added to the logits of the other codebooks, negative


class KVTrunk(nn.Module):
    """Hidden states [B, L, H + K] at flat positions; the last K say which codebook the next id belongs to."""

    def __init__(self, model: FlatMusicRLForCausalLM):
        super().__init__()
        self.of = [model]  # not a submodule: the weights have one owner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> BaseModelOutput:
        model = self.of[0]
        batch = split_flat(input_ids, attention_mask, model.config)
        hidden, _ = model.decoder_hidden(
            batch.codes, model.encode_text(batch.text_ids, batch.text_mask), batch.text_mask
        )
        selectors = (torch.eye(model.config.num_codebooks, device=hidden.device) - 1) * NO_MASS
        flat = hidden.new_zeros(*input_ids.shape, hidden.shape[-1] + model.config.num_codebooks)
        rows, columns = batch.is_audio.nonzero(as_tuple=True)
        _, steps, codebooks = batch.is_code.transpose(1, 2).nonzero(as_tuple=True)
        flat[rows, columns - 1] = torch.cat([hidden[rows, steps], selectors[codebooks].to(hidden)], -1)
        return BaseModelOutput(last_hidden_state=flat)


class KVHead:
    """What TRL reads of an output layer: weight [K * V, H + K] and no bias."""

    bias = None

    def __init__(self, heads: nn.ModuleList):
        self.heads = heads

    @property
    def weight(self) -> Tensor:
        stacked = torch.cat([head.weight for head in self.heads])
        selectors = torch.eye(len(self.heads), device=stacked.device, dtype=stacked.dtype)
        selectors = selectors.repeat_interleave(self.heads[0].weight.shape[0], 0)
        return torch.cat([stacked, selectors], 1)


class KVVariant(FlatMusicRLForCausalLM):
    """Same weights, same ids; TRL projects them, not we."""

    @property
    def base_model(self) -> KVTrunk:  # type: ignore[override]
        return KVTrunk(self)

    def get_output_embeddings(self) -> KVHead:  # type: ignore[override]
        return KVHead(self.decoder.lm_heads)
