"""Model and data-set cards: written from what lies in the folder, and checked before anything is published.

Nothing on a card is invented. The architecture is read from `config.json` and the headers of the weights, the rest from
`result.json`, which whoever trained leaves beside the weights (see `musicrl_hf.records.Record`). Where nothing was recorded the card says so.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pyarrow import parquet
from safetensors import safe_open

from .bundled import BUNDLED, name_of
from .licences import (
    LICENCES,
    SOURCE_ADDRESSES,
    choose_licence,
    is_non_commercial,
    licence_of,
    licence_of_sources,
    published_source,
    sources_without_licence,
)
from .records import Record, base_of, read_collection, read_import, read_record

PAPER = "arxiv:2402.04229"
KINDS = {  # model_type in config.json -> what the card calls it
    "musicgen": "generator",
    "clap": "adherence",
    "musicrl_quality": "quality",
    "musicrl_preference": "preference",
}
SECTIONS = ("How to use", "Training data", "Limits", "Licence", "Citation")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**9, "1M<n<1B"))
STUBS = ("[More Information Needed]", "licence: license", "license: license", "has been trained using [TRL]")


def kind_of(folder: str | Path) -> str:
    """adapter, generator, adherence, quality, preference, or preferences (a data set).

    Raises:
        ValueError: the folder holds nothing that this package publishes.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if model_type in KINDS:
            return KINDS[model_type]
        raise ValueError(
            f"{folder}/config.json has model_type={model_type!r}: this package publishes {', '.join(KINDS)}."
        )
    if any(folder.glob("data/*.parquet")):
        return "preferences"
    raise ValueError(
        f"{folder} holds no config.json, adapter_config.json or data/*.parquet: give the folder of a saved model, adapter "
        "or preference data set."
    )


def model_card(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Iterable[str] = (),
) -> str:
    """Write the card of the model or adapter in a folder.

    Args:
        folder: as `save_pretrained` leaves it, with or without a `result.json`.
        repo_id: the name that the card's code loads it by: a Hub id, or a bundled name.
        base_model: Hub id or bundled name of what it was made from, where `result.json` does not say.
        license: as the Hub spells it, where neither `result.json` nor the base model gives it.
        datasets: Hub ids of the preferences, beside those in `result.json`.

    Raises:
        ValueError: no model of this package in the folder, no licence known, or one that the base does not permit.
    """
    folder = Path(folder)
    kind, record = kind_of(folder), read_record(folder)
    if kind == "preferences":
        raise ValueError(f"{folder} holds preferences, not a model: use preference_card.")
    base = base_model or base_of(folder)
    record.datasets = sorted({*record.datasets, *datasets})
    licence = choose_licence(license or record.license, licence_of(base), f"the model in {folder}")
    base_is_hub_id = base is not None and base not in BUNDLED
    card_data = ModelCardData(
        language="en",
        license=licence,
        library_name={"generator": "transformers", "adherence": "transformers", "adapter": "peft"}.get(
            kind, "musicrl_hf"
        ),
        pipeline_tag={"generator": "text-to-audio", "adapter": "text-to-audio"}.get(kind, "audio-classification"),
        base_model=base if base_is_hub_id else None,
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if base_is_hub_id else None,
        datasets=record.datasets or None,
        tags=["musicrl", "music", "text-to-music", PAPER, *_tags(kind, record)],
    )
    template = {"generator": "generator.md", "adapter": "adapter.md"}.get(kind, "reward.md")
    return _render(
        template,
        card_data=card_data,
        name=repo_id,
        title=repo_id.split("/")[-1],
        kind=kind,
        bundled=repo_id in BUNDLED,
        base=base,
        base_is_bundled=base in BUNDLED,
        architecture=_architecture(folder, kind),
        frame_rate=_frame_rate(folder) if kind == "generator" else None,
        record=record,
        licence=licence,
        licence_title=LICENCES[licence],
        inherits_non_commercial=is_non_commercial(licence_of(base)),
    )


def preference_card(folder: str | Path, repo_id: str, *, license: str | None = None) -> str:
    """Write the card of a folder of preferences: what is in it, counted row by row.

    Args:
        folder: as `save_preferences` leaves it, with or without the `import.json` of an import or the `collection.json`
            of an export.
        repo_id: Hub id that the card's code loads it by.
        license: of the data; where every row comes from one published set with a known licence, or from listeners who
            agreed to one, it may be left out.

    Raises:
        ValueError: no preferences in the folder, no licence known (or none given by the authors of a source), or one
            that a source does not permit or the listeners did not agree to.
    """
    folder = Path(folder)
    files = sorted(folder.glob("data/*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no data/*.parquet: give the folder of a saved preference data set.")
    columns = ["prompt", "preference", "chosen_model", "rejected_model", "listener", "source"]
    rows = [row for path in files for row in parquet.read_table(path, columns=columns).to_pylist()]
    sources = Counter(row["source"] for row in rows)
    models = Counter(row[name] for row in rows for name in ("chosen_model", "rejected_model"))
    labels = Counter(row["preference"] for row in rows)
    listeners = Counter(row["listener"] for row in rows)
    simulated, by_rewards = (
        {name: count for name, count in listeners.items() if name.startswith(prefix)}
        for prefix in ("simulated", "reward:")
    )
    unlicensed = sources_without_licence(sources)
    if unlicensed and license is None:
        raise ValueError(
            f"license is not known for the preferences in {folder}: the authors of {', '.join(unlicensed)} gave none; ask "
            f"them, and give the one they name, one of {', '.join(LICENCES)}."
        )
    imported, collected = read_import(folder), read_collection(folder)
    if collected is not None and license not in (None, collected.license):
        raise ValueError(
            f"license={license!r}, but the listeners whose votes are in {folder} agreed to {collected.license!r}: leave it out."
        )
    inherited = licence_of_sources(sources) if collected is None else collected.license
    licence = choose_licence(license, inherited, f"the preferences in {folder}")
    splits = sorted({_split_of(path) for path in files}, key=lambda name: (name != "train", name))
    card_data = DatasetCardData(
        language="en",
        license=licence,
        pretty_name=repo_id.split("/")[-1],
        task_categories=["text-to-audio"],
        size_categories=[next(name for limit, name in SIZES if len(rows) < limit)],
        tags=[
            *("musicrl", "music", "preference"),
            *(["human-feedback"] if len(simulated) + len(by_rewards) < len(listeners) else []),
            *("audio", PAPER),
        ],
        configs=[
            {
                "config_name": "default",
                # Whole names, which hold a hash of the content: by a pattern, `datasets` would take a folder that was
                # written again for the one that it read before.
                "data_files": [
                    {"split": split, "path": [f"data/{path.name}" for path in files if _split_of(path) == split]}
                    for split in splits
                ],
            }
        ],
    )
    counts = {
        "rows": len(rows),
        "with a winner": labels["a"] + labels["b"],
        "ties": labels["tie"],
        "both bad": labels["both_bad"],
        "prompts": len({row["prompt"] for row in rows}),
        "listeners": len(listeners),
        **({"listeners who are simulated": len(simulated)} if simulated else {}),
        **({"listeners who are rewards": len(by_rewards)} if by_rewards else {}),
        "splits": ", ".join(splits),
    }
    return _render(
        "preferences.md",
        card_data=card_data,
        name=repo_id,
        title=repo_id.split("/")[-1],
        splits=splits,
        counts=counts,
        sources={_linked(source): count for source, count in sources.most_common()},
        left_out=imported.left_out if imported is not None else {},
        collected=collected,
        models={_cell(name_of(name)): count for name, count in models.most_common()},
        simulated=sum(simulated.values()),
        by_rewards=sum(by_rewards.values()),
        licence=licence,
        licence_title=LICENCES[licence],
        base="the models or votes",
        inherits_non_commercial=False,
    )


def check_card(text: str, repo_type: str = "model") -> dict[str, Any]:
    """Refuse a card that is not fit to be published.

    Args:
        text: a README.md.
        repo_type: "model" or "dataset".

    Returns:
        its metadata.

    Raises:
        ValueError: names everything that is missing or wrong: metadata, sections, an open placeholder, code that does
            not parse, a licence that the base model does not permit.
    """
    try:
        data = ModelCard(text).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the card's metadata is not valid YAML: {error}") from error
    wanted = ["license", "language", "tags"]
    wanted += ["library_name", "pipeline_tag"] if repo_type == "model" else ["pretty_name", "configs"]
    problems = [f"metadata `{name}` is missing" for name in wanted if not data.get(name)]
    licence = data.get("license")
    if licence and licence not in LICENCES:
        problems.append(f"license {licence!r} is none of {', '.join(LICENCES)}")
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        inherited = licence_of(base)
        if licence and is_non_commercial(inherited) and not is_non_commercial(licence):
            problems.append(f"license {licence!r}, but the weights of {base} are {inherited}")
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    problems += [f"section `## {name}` is missing" for name in SECTIONS if name not in headings]
    problems += [f"{stub!r} was left in it" for stub in STUBS if stub in text]
    for number, code in enumerate(python_blocks(text), 1):
        try:
            ast.parse(code)
        except SyntaxError as error:
            problems.append(f"Python block {number} does not parse ({error})")
    if problems:
        raise ValueError("the card is not fit to be published: " + "; ".join(problems) + ".")
    return data


def is_stub(text: str) -> bool:
    """Whether a README is one that a trainer or `peft` writes by itself, which nobody would miss."""
    return any(stub in text for stub in STUBS)


def is_unchanged(text: str, folder: Path, license: str | None = None) -> bool:
    """Whether a README is what `preference_card` writes of the folder, under whatever name: an export's, which nobody edited."""
    name = re.search(r'load_preferences\("([^"]+)"\)', text)
    return name is not None and text == preference_card(folder, name[1], license=license)


def python_blocks(text: str) -> list[str]:
    """The Python code on a card."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _split_of(path: Path) -> str:
    return path.name.split("-")[0]


def _linked(source: str) -> str:
    address = SOURCE_ADDRESSES.get(published_source(source) or "")
    return f"[{source}]({address})" if address else _cell(source)


def _cell(text: str) -> str:
    """Anybody's text as it is read in a cell of a table, and nothing else: no end of the cell, heading, tag, link or code."""
    plain = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", plain)


def _tags(kind: str, record: Record) -> list[str]:
    tags = ["musicgen"] if kind in ("generator", "adapter") else ["reward-model", kind]
    return tags + ([record.method.lower()] if record.method and " " not in record.method else [])


def _architecture(folder: Path, kind: str) -> dict[str, str]:
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 (safe_open cannot be iterated over)
                count = 1
                for length in weights.get_slice(name).get_shape():
                    count *= length
                part = name.split(".")[0]
                sizes[part] = sizes.get(part, 0) + count
    facts = {"parameters and buffers": f"{sum(sizes.values()):,}"}
    if len(sizes) > 1:
        facts["of these"] = ", ".join(f"{part} {count:,}" for part, count in sorted(sizes.items()))
    if kind == "adapter":
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        facts |= {
            "type": adapter["peft_type"],
            "rank": str(adapter.get("r", "-")),
            "alpha": str(adapter.get("lora_alpha", "-")),
        }
    if kind == "generator":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        decoder, codec = config["decoder"], config["audio_encoder"]
        facts |= {
            "decoder": f"{decoder['num_hidden_layers']} layers of {decoder['hidden_size']}",
            "codes": f"{decoder['num_codebooks']} codebooks of {decoder['vocab_size']}, {_frame_rate(folder)} frames a second",
            "sound": f"{codec['sampling_rate']} Hz, {'stereo' if decoder.get('audio_channels', 1) == 2 else 'mono'}",
        }
    return facts


def _frame_rate(folder: Path) -> int:
    codec = json.loads((folder / "config.json").read_text(encoding="utf-8"))["audio_encoder"]
    hop = 1
    for ratio in codec["upsampling_ratios"]:
        hop *= ratio
    return round(codec["sampling_rate"] / hop)


def _render(template: str, *, card_data: ModelCardData | DatasetCardData, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(card_data=card_data, **values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
