"""Prints the coverage of each room of sge_det: rooms.py COVERAGE.json, which ``coverage json`` writes."""

import json
import sys
from collections import Counter
from pathlib import Path


def by_room(files: dict[str, dict]) -> dict[str, tuple[float, int]]:
    """Percent of lines and branches that were taken, and how many there are, for each room and for all."""
    taken, there = Counter(), Counter()
    for name, found in files.items():
        parts = name.split("/")
        parts = parts[parts.index("sge_det") + 1 :]
        for room in (parts[0] if len(parts) > 1 else "(the ground floor's files)", "all"):
            summary = found["summary"]
            taken[room] += summary["covered_lines"] + summary["covered_branches"]
            there[room] += summary["num_statements"] + summary["num_branches"]
    return {room: (100 * taken[room] / there[room], there[room]) for room in sorted(there) if there[room]}


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    for room, (percent, count) in by_room(content["files"]).items():
        print(f"{room:28} {percent:6.1f}% of {count}")
