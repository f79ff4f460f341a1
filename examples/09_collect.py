"""Votes of people: a listening page for a generator, and the data set that its votes become.

    python examples/09_collect.py --tiny
    python examples/09_collect.py --model musicrl-tiny --against tuned=runs/dpo --prompts prompts.txt
    python examples/09_collect.py --study --model musicrl-tiny --against tuned=runs/dpo --prompts prompts.txt

Opens a page on this computer until Ctrl+C: listeners agree to how their votes are used, hear two clips blind, and choose. With
`--study` the pairs are fixed and each clip is rated from 1 to 5, as in the paper's evaluation. Then the votes are written as
preferences, which `musicrl reward --preferences` learns from and `musicrl evaluate --votes` counts. `--tiny` opens no page: it
rehearses with two simulated listeners, who are rules on the waveform and not people.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from musicrl_hf.collect.job import CollectJob, ExportJob, run_collect, run_export

PROMPTS = ["a slow air played by a flute, alone", "a lively reel played by a fiddle with drums"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect votes.")
    parser.add_argument("--model", default="musicrl-tiny", help="bundled name, folder or Hub id; or label=name")
    parser.add_argument("--against", nargs="*", default=[], help="further generators")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line; without one, the bundled prompts")
    parser.add_argument("--store", type=Path, default=Path("out/collected"), help="folder of votes and clips")
    parser.add_argument("--study", action="store_true", help="fixed pairs, and a rating of each clip")
    parser.add_argument("--out", type=Path, default=Path("out/votes"), help="folder for the preferences")
    parser.add_argument("--tiny", action="store_true", help="two simulated listeners, two pairs of one second")
    arguments = parser.parse_args()

    options = {"model": arguments.model, "against": arguments.against, "store": str(arguments.store)}
    if arguments.tiny:
        with TemporaryDirectory() as scratch:
            prompts = Path(scratch) / "prompts.txt"
            prompts.write_text("\n".join(PROMPTS))
            print(run_collect(CollectJob(**options, prompts=str(prompts), simulate=2, duration_s=1.0)))
    else:
        chosen = None if arguments.prompts is None else str(arguments.prompts)
        print(run_collect(CollectJob(**options, prompts=chosen, study=arguments.study)))
    print(run_export(ExportJob(store=str(arguments.store), out=str(arguments.out))))


if __name__ == "__main__":
    main()
