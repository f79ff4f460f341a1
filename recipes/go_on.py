"""Go on from what is published: its codec, its tokenizer and its generator into a work folder, for more training.

    python recipes/corpus.py --work build/more && python recipes/render.py --work build/more && python recipes/judges.py --work build/more
    python recipes/go_on.py --work build/more --recorded recipes/results
    python recipes/codes.py --work build/more
    python recipes/decoder.py --work build/more --force      # where the codec's decoder is to learn more too
    python recipes/generator.py --work build/more --minutes 120

The codec stays as it is, unless decoder.py goes on with its decoder; so does the text encoder, unless text_encoder.py
trained another one in the same folder and `--new_text` asks for it. The generator's optimiser begins anew, with its
warm-up and its whole schedule.
"""

from pathlib import Path

import torch
from common import read_json, save_training_state, say, stage_arguments, start, write_json
from text_encoder import load_text_encoder

from musicrl_hf.generator import MusicRLForConditionalGeneration

TOLD = ("command", "step", "frames", "minutes", "earlier")


def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0])
    parser.add_argument("--generator", default="musicrl-tiny", help="bundled name or folder")
    parser.add_argument("--recorded", type=Path, required=True, help="folder with what its recipe recorded")
    parser.add_argument(
        "--new_text", action="store_true", help="take the text encoder that text_encoder.py left in WORK"
    )
    args = parser.parse_args()
    start(args)
    folder = args.work / "generator_training"
    if folder.exists() and not args.force:
        return say(f"{folder} is there")
    model = MusicRLForConditionalGeneration.from_pretrained(args.generator)
    if args.new_text:
        load_text_encoder(args.work, model.text_encoder, model.enc_to_dec_proj)
    model.audio_encoder.save_pretrained(args.work / "codec")
    model.tokenizer.save_pretrained(args.work / "tokenizer")
    codec, decoder, generator = (
        read_json(args.recorded / f"{stage}.json") for stage in ("codec", "decoder", "generator")
    )
    write_json(args.work / "results" / "codec.json", codec)
    write_json(args.work / "results" / "decoder.json", decoder)
    write_json(args.work / "codec_finished.json", codec)
    write_json(args.work / "decoder_finished.json", decoder)
    earlier = {name: generator[name] for name in TOLD if name in generator}
    progress = {"step": 0, "seconds": 0.0, "frames": 0, "log": [], "earlier": earlier}
    save_training_state(folder, model, torch.optim.AdamW(model.parameters()), progress)
    say(f"the codec and generator of {args.generator} are in {args.work}")


if __name__ == "__main__":
    main()
