"""Gather what a run is worth keeping for into FOLDER/ship: the model's six files, and records."""

import json
import random
import shutil
from pathlib import Path

SAMPLED = 200  # stories, of those written
RECORDS = ("training.json", "record.json")


def ship(folder: Path) -> None:
    """Copy the model's files and one file of records: both records and a sample of the stories."""
    target = folder / "ship"
    target.mkdir(exist_ok=True)
    for file in sorted((folder / "model").iterdir()):
        shutil.copyfile(file, target / file.name)
    records = {
        name: json.loads((folder / name).read_text())
        for name in RECORDS
        if (folder / name).exists()
    }
    records["stories"] = sample_stories(folder, SAMPLED)
    text = json.dumps(records, indent=1, ensure_ascii=False)
    (target / "records.json").write_text(text + "\n", encoding="utf-8")


def sample_stories(folder: Path, count: int) -> list[dict]:
    """Some stories from all shards, always the same ones for the same shards."""
    rng = random.Random(0)
    files = sorted((folder / "stories").glob("*.jsonl"))
    lines = []
    for file in rng.sample(files, min(len(files), count)):
        told = file.read_text("utf-8").splitlines()
        lines += rng.sample(told, min(len(told), count))
    return [json.loads(line) for line in rng.sample(lines, min(len(lines), count))]
