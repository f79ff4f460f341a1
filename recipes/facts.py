"""Facts of a clip as classes, and heads that read them from the middle of the generator's decoder while it trains.

Once a second of a tune was heard, its key and tempo are no news: the words that name them save a code model next to
nothing, and it learns to ignore them. So a linear layer has to tell the facts from the decoder's states half way up, at
every step. At the first steps only the text says them; what carries them there is then at hand for the codes. (Deep
supervision: Lee et al. 2015, arXiv:1409.5185.) The heads are thrown away with the training.
"""

import numpy as np
import torch
from arrange import NOTE_NAMES
from captions import BACKINGS, INSTRUMENTS, TEMPI
from render import MODE_SHARES
from torch import Tensor, nn

BPM_EDGES = np.geomspace(48, 128, 13)[1:-1]  # 12 classes, each 8.5 % wide
CLASSES = {
    "instrument": list(INSTRUMENTS),
    "backing": list(BACKINGS),
    "tempo": list(TEMPI),
    "key": list(NOTE_NAMES),
    "mode": list(MODE_SHARES),
}
SIZES = {name: len(classes) for name, classes in CLASSES.items()} | {"bpm": len(BPM_EDGES) + 1}


def fact_classes(rows: list[dict]) -> Tensor:
    """Class indices [N, facts] of clips, in the order of `SIZES`."""
    columns = [[classes.index(row[name]) for row in rows] for name, classes in CLASSES.items()]
    columns.append(np.digitize([row["bpm"] for row in rows], BPM_EDGES).tolist())
    return torch.tensor(columns).T


def fact_losses(head: nn.Module, states: Tensor, facts: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy in nats [facts] of `head` on `states` [B, S, D] where `mask` [B, S], for `facts` [B, facts]."""
    logits = head(states[mask]).float().split(list(SIZES.values()), dim=-1)
    wanted = facts[:, None].expand(-1, mask.shape[1], -1)[mask]
    return torch.stack([nn.functional.cross_entropy(some, wanted[:, i]) for i, some in enumerate(logits)])


class FactHeads(nn.Module):
    """Linear heads on the states behind one layer of the decoder and on the text's states.

    Args:
        layer: of the decoder; its output [B, S, D] is kept at each forward pass.
        text: the module whose output [B, P, D] the decoder attends to; kept likewise.
        width: D.
    """

    def __init__(self, layer: nn.Module, text: nn.Module, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, sum(SIZES.values())) for name in ("decoder", "text")})
        self.states: dict[str, Tensor] = {}
        for name, module in (("decoder", layer), ("text", text)):
            module.register_forward_hook(lambda module, inputs, output, name=name: self._keep(name, output))

    def _keep(self, name: str, output: Tensor | tuple) -> None:
        self.states[name] = output if isinstance(output, Tensor) else output[0]

    def losses(self, facts: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        """Cross entropy in nats [facts] of "decoder" and "text" in the last forward pass.

        Means over all steps of the decoder and over all ids of the text: each of them has to know all that was said, so
        that wherever the decoder attends at first, it finds it.

        Args:
            facts: [B, facts].
            text_mask: [B, P], 1 where there is text.
        """
        states = self.states["decoder"]
        heard = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        masks = {"decoder": heard, "text": text_mask == 1}
        return {name: fact_losses(self.heads[name], self.states[name], facts, mask) for name, mask in masks.items()}
