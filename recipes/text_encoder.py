"""Stage 7: the generator's text encoder, a T5 of two layers, learns the facts that captions name before it meets music.

    python recipes/text_encoder.py --work build/tiny --threads 1 --minutes 8

From the states of each id of a caption, all of the clip's facts are to be told. Trained by the codes alone, the encoder learns
what is worth most to them, instruments and accompaniments, and lets the rest go: after an hour of that, the key could hardly
be told from its states. These losses did not bring it back, neither beside the codes in ten minutes nor alone in 300 steps, in
which an encoder learns it from random weights (README.md).
"""

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from captions import complete
from common import (
    load_training_state,
    read_json,
    record,
    save_training_state,
    say,
    stage_arguments,
    start,
    write_json,
)
from facts import SIZES, fact_classes, fact_losses
from safetensors.torch import load_file
from text import VOCABULARY, load_or_train_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WIDTH = 256  # of the states that the decoder attends to
BATCH, LEARNING_RATE, WARMUP_STEPS = 64, 1e-3, 100
COMPLETE, N_COMPLETE = 0.5, 4  # share of the captions that name every fact; such captions a clip
SAVE_EVERY_S = 60


class Captions:
    """Captions as padded ids, tokenised once.

    Args:
        rows: of the clips.
        tokenizer: of the text encoder.
    """

    def __init__(self, rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids, self.per_clip = self._encode(tokenizer, [row["captions"] for row in rows])
        words = random.Random("complete")
        self.complete_ids, self.n_complete = self._encode(
            tokenizer, [[complete(row, words) for _ in range(N_COMPLETE)] for row in rows]
        )

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[list[str]]) -> tuple[list[list[int]], int]:
        flat = [text for some in texts for text in some]
        # Without truncation, which a fast tokenizer would keep as a setting and save; no caption is that long.
        return tokenizer(flat, verbose=False)["input_ids"], len(texts[0])

    def draw(
        self,
        clips: np.ndarray,
        rng: np.random.Generator | None,
        null_share: float = 0.0,
        complete_share: float = COMPLETE,
    ) -> tuple[Tensor, Tensor]:
        """(input_ids, attention_mask) [B, P]: a random phrasing of each clip, or the first without `rng`.

        Args:
            clips: indices [B].
            rng: draws the phrasings.
            null_share: of the clips whose text is masked.
            complete_share: of the clips whose text names every fact.
        """
        chosen = []
        for i in clips:
            if rng and rng.random() < complete_share:
                chosen.append(self.complete_ids[i * self.n_complete + rng.integers(self.n_complete)])
            else:
                chosen.append(self.ids[i * self.per_clip + (rng.integers(self.per_clip) if rng else 0)])
        ids = torch.zeros(len(chosen), max(map(len, chosen)), dtype=torch.long)
        for row, tokens in zip(ids, chosen, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        mask = (ids != 0).long()
        if rng and null_share:
            mask[torch.from_numpy(rng.random(len(chosen)) < null_share)] = 0
        return ids, mask


def text_config() -> T5Config:
    """A small T5 encoder."""
    return T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip


class TextWithFacts(nn.Module):
    """The encoder, the projection to the decoder's width, and a linear head for all facts."""

    def __init__(self) -> None:
        super().__init__()
        config = text_config()
        self.encoder, self.projection = T5EncoderModel(config), nn.Linear(config.d_model, WIDTH)
        self.head = nn.Linear(WIDTH, sum(SIZES.values()))

    def losses(self, ids: Tensor, mask: Tensor, facts: Tensor) -> Tensor:
        """Cross entropy in nats [facts], mean over all ids [B, P] of the text, for `facts` [B, facts]."""
        states = self.projection(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
        return fact_losses(self.head, states, facts, mask == 1)


def load_text_encoder(work: Path, encoder: nn.Module, projection: nn.Module) -> None:
    """Weights of this stage into a generator's text encoder and its projection, in place."""
    state = load_file(work / "text_training" / "state.safetensors")
    for name, module in (("encoder", encoder), ("projection", projection)):
        prefix = f"model.{name}."
        module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})


def train(args, model: TextWithFacts, captions: Captions, facts: Tensor) -> dict:
    """Train until `args.minutes` are spent, over all restarts; a cosine schedule follows the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    folder = args.work / "text_training"
    progress = load_training_state(folder, model, optimizer) or {"step": 0, "seconds": 0.0, "log": []}
    rng = np.random.default_rng([args.seed, progress["step"]])
    began, spent_before, saved_at, recent = time.time(), progress["seconds"], time.time(), []
    while progress["seconds"] < 60 * args.minutes:
        warm = min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        decay = 0.5 * (1 + math.cos(math.pi * progress["seconds"] / (60 * args.minutes)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * decay)
        clips = rng.integers(len(facts), size=BATCH)
        losses = model.losses(*captions.draw(clips, rng), facts[clips])
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-99:], losses.tolist()]
        progress["step"] += 1
        progress["seconds"] = spent_before + time.time() - began
        if progress["step"] % 200 == 0:
            found = dict(zip(SIZES, np.mean(recent, 0).round(3).tolist(), strict=True))
            progress["log"].append([progress["step"], round(progress["seconds"] / 60, 1), found])
            say(f"text {progress['seconds'] / 60:.1f} of {args.minutes} min, step {progress['step']}: {found}")
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(folder, model, optimizer, progress)
    save_training_state(folder, model, optimizer, progress)
    return progress


@torch.no_grad()
def evaluate(model: TextWithFacts, texts: list[str], tokenizer: PreTrainedTokenizerFast, facts: Tensor) -> dict:
    """Share of texts from whose mean state each fact is told; what a text does not name counts too."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    states = model.projection(model.encoder(batch["input_ids"], attention_mask=mask).last_hidden_state)
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    told = model.head(mean).split(list(SIZES.values()), dim=-1)
    return {
        n: round(float((t.argmax(1) == facts[:, i]).float().mean()), 3)
        for i, (n, t) in enumerate(zip(SIZES, told, strict=True))
    }


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0], minutes=8).parse_args()
    start(args)
    finished = args.work / "text_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    rows = read_json(args.work / "rows_train.json")
    tokenizer = load_or_train_tokenizer(args.work / "tokenizer", rows, with_bos=False)
    model = TextWithFacts()
    progress = train(args, model, Captions(rows, tokenizer), fact_classes(rows))
    results = {"step": progress["step"], "minutes": round(progress["seconds"] / 60, 1), "log": progress["log"]}
    held_out = read_json(args.work / "rows_test.json")
    words = random.Random("complete test")
    kinds = {
        "complete": [complete(row, words) for row in held_out],
        "caption": [row["captions"][1] for row in held_out],
        "paraphrase": [row["paraphrase"] for row in held_out],
    }
    facts = fact_classes(held_out)
    results["test"] = {kind: evaluate(model, texts, tokenizer, facts) for kind, texts in kinds.items()}
    say(str(results["test"]))
    record(args, "text_encoder", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
