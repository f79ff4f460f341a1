"""Publish a model to the Hub: look at what would be sent, read the card, then send it.

    python examples/08_push.py --tiny
    python examples/08_push.py out/dpo me/my-tuned-generator

The second needs an account: `hf auth login` with a token that may write. A push is one commit, with weights as
safetensors and a card made from what the run recorded. `--tiny` writes the card of a bundled model to `out/push` and lists
the files, and sends nothing.
"""

import argparse
from pathlib import Path

from musicrl_hf.audio import atomic_path
from musicrl_hf.hub import prepare_model, send


def main() -> None:
    parser = argparse.ArgumentParser(description="Publish a model to the Hub.")
    parser.add_argument(
        "path", nargs="?", default="musicrl-tiny", help="folder of a model or adapter, or a bundled name"
    )
    parser.add_argument("repo_id", nargs="?", default="me/musicrl-tiny", help="organisation/name")
    parser.add_argument("--license", help="where neither the run's record nor the base model gives one")
    parser.add_argument("--private", action="store_true", help="visible to you alone")
    parser.add_argument("--out", type=Path, default=Path("out/push"), help="folder for a copy of the card")
    parser.add_argument("--tiny", action="store_true", help="only look: write the card, list the files, send nothing")
    arguments = parser.parse_args()

    upload = prepare_model(arguments.path, arguments.repo_id, license=arguments.license)
    with atomic_path(arguments.out / "README.md") as card:
        card.write_text(upload.card, encoding="utf-8")
    print(f"{arguments.out / 'README.md'} is the card of {upload.repo_id}; with it go")
    for name, content in sorted(upload.files.items()):
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        print(f"  {name}  {size:,} bytes")
    if upload.left_out:
        print(f"and these stay here: {', '.join(upload.left_out)}")
    if not arguments.tiny:
        print(f"Pushed to {send(upload, private=arguments.private or None)}")


if __name__ == "__main__":
    main()
