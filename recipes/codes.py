"""Stage 4: all clips as codes [N, K, F], int16, in codes_SPLIT.safetensors.

python recipes/codes.py --work build/tiny
"""

import os

import torch
from common import load_clips, say, stage_arguments, start, to_float
from safetensors.torch import save_file
from transformers import EncodecModel

BATCH = 10  # clips


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0]).parse_args()
    start(args)
    model = EncodecModel.from_pretrained(args.work / "codec").eval()
    for split in ("validation", "test", "train"):
        out = args.work / f"codes_{split}.safetensors"
        if out.exists() and not args.force:
            say(f"{out} is there")
            continue
        clips, _ = load_clips(args.work, split)
        parts = []
        for first in range(0, len(clips), BATCH):
            with torch.no_grad():
                codes = model.encode(to_float(clips[first : first + BATCH])[:, None]).audio_codes[0]
            parts.append(codes.to(torch.int16))
            if first % 500 == 0:
                say(f"{split}: {first + len(codes)} of {len(clips)} clips encoded")
        aside = out.with_name(out.name + ".part")
        save_file({"codes": torch.cat(parts)}, aside)
        os.replace(aside, out)


if __name__ == "__main__":
    main()
