"""Prompts to ids: a small byte-level BPE trained on the captions. Any text can be written with it, none is unknown."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS = "<pad>", "</s>", "<s>"  # ids 0, 1, 2: pad and eos are T5's
VOCABULARY = 512
MAX_TOKENS = 64


def train_tokenizer(texts: list[str], with_bos: bool) -> PreTrainedTokenizerFast:
    """Learn merges from captions.

    Args:
        texts: captions; case and accents are dropped.
        with_bos: open each text with <s>, where CLAP's text model pools; T5 wants none.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    template = f"{BOS} $A {EOS}" if with_bos else f"$A {EOS}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS if with_bos else None,
        cls_token=BOS if with_bos else None,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_or_train_tokenizer(folder: Path, rows: list[dict], with_bos: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of a work folder, trained on the training captions where there is none yet."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer([text for row in rows for text in row["captions"]], with_bos).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
