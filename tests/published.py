"""Little copies of published data sets: tones as clips, tables in the columns that their authors gave them."""

import csv
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Audio, Features, Value

from musicrl_hf.audio import audio_bytes, read_audio, write_audio
from musicrl_hf.preferences.schema import load_preferences

RATE = 8000  # Hz


def tone(hz: float, seconds: float = 1.0) -> torch.Tensor:
    """A sine, [1, T]."""
    return 0.3 * torch.sin(2 * math.pi * hz * torch.arange(int(seconds * RATE)) / RATE)[None]


def tone_bytes(hz: float, seconds: float = 1.0, suffix: str = "flac") -> bytes:
    return audio_bytes(tone(hz, seconds), RATE, suffix)


def write_tones(folder: Path, tones: dict[str, float]) -> None:
    """A clip a name, of one second, by its frequency in Hz."""
    for name, hz in tones.items():
        write_audio(folder / name, tone(hz), RATE)


def write_table(path: Path, rows: list[dict]) -> Path:
    """As .csv, .jsonl, or .json (one row)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        assert len(rows) == 1
        path.write_text(json.dumps(rows[0]))
    return path


def write_parquet(path: Path, rows: list[dict], audio: tuple[str, ...] = (), marked: bool = True) -> Path:
    """Columns of `audio` hold {"bytes", "path"}; `marked` as `datasets` writes them, with an Audio type in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {str: "string", int: "int64", float: "float64"}
    features = Features(
        {name: Audio() if name in audio else Value(kinds[type(value)]) for name, value in rows[0].items()}
    )
    schema = features.arrow_schema if marked else pa.schema(features.type)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def pitch(clip: dict) -> int:
    """Frequency in Hz of the tone in an audio cell, by the peak of its spectrum."""
    audio, rate = read_audio(clip["bytes"])
    spectrum = torch.fft.rfft(audio[0]).abs()
    return round(spectrum.argmax().item() * rate / audio.shape[-1])


def imported(out: Path, split: str = "train") -> list[dict]:
    """The rows of an import; pitches stand in the place of the clips."""
    return [row | {side: pitch(row[side]) for side in ("chosen", "rejected")} for row in load_preferences(out, split)]


def record_of(out: Path) -> dict:
    """What `import.json` says."""
    return json.loads((out / "import.json").read_text())
