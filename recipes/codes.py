"""Stage 5: all clips as codes [N, K, F], int16, in codes_SPLIT.safetensors.

    python recipes/codes.py --work build/tiny

The file grows as it goes, so stage 8 can begin beside it, and a second start goes on where the first one stopped.
"""

import os

import torch
from common import load_clips, say, stage_arguments, start, to_float
from elu import use_fast_elu
from safetensors.torch import load_file, save_file
from transformers import EncodecModel

SAVE_EVERY = 200  # clips


@torch.no_grad()
def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0])
    parser.add_argument("--splits", nargs="+", default=["train", "validation", "test"])
    args = parser.parse_args()
    start(args)
    model = use_fast_elu(EncodecModel.from_pretrained(args.work / "codec").eval())
    for split in args.splits:
        out = args.work / f"codes_{split}.safetensors"
        clips, _ = load_clips(args.work, split)
        done = load_file(out)["codes"] if out.exists() and not args.force else torch.zeros(0, 4, 500, dtype=torch.int16)
        for first in range(len(done), len(clips), SAVE_EVERY):
            some = clips[first : first + SAVE_EVERY]
            codes = [model.encode(to_float(clip)[None, None]).audio_codes[0].to(torch.int16) for clip in some]
            done = torch.cat([done, *codes])
            aside = out.with_name(out.name + ".part")
            save_file({"codes": done}, aside)
            os.replace(aside, out)
            say(f"{split}: {len(done)} of {len(clips)} clips encoded")


if __name__ == "__main__":
    main()
