"""Bach's four-part chorales from MusicXML: the soprano is the tune, the lower voices are an accompaniment that he wrote."""

import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

STEP = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
MIN_NOTES = 24
Voice = list[list[float]]  # [start, duration] in quarters and MIDI pitch


def number(element: ElementTree.Element, name: str, default: int = 0) -> int:
    return int(element.findtext(name) or default)


def read_part(part: ElementTree.Element) -> tuple[Voice, float] | None:
    """One part's notes, ties joined, and the length of its first measure; None where it is not a single voice."""
    notes: Voice = []
    now, divisions, first_measure = 0.0, 1, 0.0
    for index, measure in enumerate(part.findall("measure")):
        for item in measure:
            if item.tag == "backup":
                return None
            if item.tag == "attributes" and item.find("divisions") is not None:
                divisions = number(item, "divisions")
            if item.tag == "forward":
                now += number(item, "duration") / divisions
            if item.tag != "note" or item.find("grace") is not None:
                continue
            if item.find("chord") is not None:
                return None
            length = number(item, "duration") / divisions
            pitch = item.find("pitch")
            if pitch is not None:
                midi = 12 * (number(pitch, "octave") + 1) + STEP[pitch.findtext("step", "C")] + number(pitch, "alter")
                is_tied = any(tie.get("type") == "stop" for tie in item.findall("tie"))
                if is_tied and notes and notes[-1][2] == midi and abs(notes[-1][0] + notes[-1][1] - now) < 1e-6:
                    notes[-1][1] += length
                else:
                    notes.append([now, length, midi])
            now += length
        if index == 0:
            first_measure = now
    return notes, first_measure


def mode_over(tonic: int, voices: list[Voice]) -> str:
    """Minor where the minor third over the tonic sounds longer than the major one.

    The signature does not say: a chorale in dorian writes one flat less, and one in minor often ends on a major chord.
    """
    sounding = [0.0] * 12
    for voice in voices:
        for _, length, pitch in voice:
            sounding[int(pitch - tonic) % 12] += length
    return "minor" if sounding[3] > sounding[4] else "major"


def read_chorale(xml: str | bytes, name: str) -> dict | None:
    """One chorale as a tune with "voices"; None where it has no four voices or no time signature."""
    score = ElementTree.fromstring(xml)
    parts = [read_part(part) for part in score.findall("part")]
    time = score.find(".//time")
    if len(parts) != 4 or None in parts or time is None:
        return None
    voices = [part[0] for part in parts if part is not None]
    if min(len(voice) for voice in voices) < MIN_NOTES:
        return None
    start = voices[0][0][0]
    voices = [
        [[round(at - start, 4), round(length, 4), int(pitch)] for at, length, pitch in voice if at >= start]
        for voice in voices
    ]
    metre = [number(time, "beats", 4), number(time, "beat-type", 4)]
    first_measure = parts[0][1] - start if parts[0] else 0.0
    bar = metre[0] * 4 / metre[1]
    tonic = int(voices[3][-1][2]) % 12  # the bass ends on it, with hardly an exception
    return {
        "title": name,
        "book": "bach chorales",
        "file": f"{name}.mxl",
        "tonic": tonic,
        "mode": mode_over(tonic, voices),
        "metre": metre,
        "kind": "chorale",
        "printed_mood": "",
        "pickup": round(first_measure, 4) if 0 < first_measure < bar - 0.01 else 0.0,
        "notes": voices[0],
        "voices": voices[1:],
    }


def read_chorales(corpus: Path) -> list[dict]:
    """Every chorale in the corpus folder that is in four plain voices."""
    found = []
    for path in sorted((corpus / "bach").glob("*.mxl")):
        with zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(("xml", ".mxl")) and "META" not in name)
            xml = archive.read(inside)
        tune = read_chorale(xml, path.stem)
        if tune:
            found.append(tune)
    return found
