"""The votes of several rounds as one set of preferences.

python recipes/paper/join_votes.py votes_a votes_b --out votes
"""

import argparse
from pathlib import Path

from datasets import concatenate_datasets

from musicrl_hf.preferences.schema import load_preferences, save_preferences


def main() -> None:
    parser = argparse.ArgumentParser(description="Join preferences.")
    parser.add_argument("preferences", type=Path, nargs="+", help="folders of preferences")
    parser.add_argument("--out", type=Path, required=True, help="folder for all of them")
    arguments = parser.parse_args()
    rounds = [load_preferences(folder) for folder in arguments.preferences]
    save_preferences(concatenate_datasets(rounds), arguments.out)


if __name__ == "__main__":
    main()
