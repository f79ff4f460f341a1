"""Text to clips: load a generator by name, sample, write WAV files.

    python examples/01_generate.py --tiny
    python examples/01_generate.py --model facebook/musicgen-small --prompt "lofi hip hop" --duration_s 10

`--model` takes a bundled name, a folder or a Hub id; so does everything else in this package. The same seed gives the same
clips again. `--tiny` plays one second of each prompt.
"""

import argparse
from pathlib import Path

from musicrl_hf import load_generator
from musicrl_hf.audio import write_audio
from musicrl_hf.devices import find_device

PROMPTS = [
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Text to clips.")
    parser.add_argument("--model", default="musicrl-tiny", help="bundled name, folder or Hub id")
    parser.add_argument("--prompt", action="append", help="what to play; give it several times for several clips")
    parser.add_argument("--duration_s", type=float, default=5.0, help="seconds, at most 30")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/generate"), help="folder for the WAV files")
    parser.add_argument("--tiny", action="store_true", help="one second a clip")
    arguments = parser.parse_args()

    generator = load_generator(arguments.model, device=find_device())
    prompts = arguments.prompt or PROMPTS
    clips = generator.sample(prompts, duration_s=1.0 if arguments.tiny else arguments.duration_s, seed=arguments.seed)
    for number, (prompt, audio) in enumerate(zip(prompts, clips.audio, strict=True)):
        path = arguments.out / f"{number}.wav"
        write_audio(path, audio, clips.sampling_rate)
        print(f"{path}  {audio.shape[-1] / clips.sampling_rate:.1f} s  {prompt}")


if __name__ == "__main__":
    main()
