import re
import subprocess
import sys
from pathlib import Path


def test_a_sample_of_damaged_and_hostile_files_is_read_or_refused():
    """`make fuzz` does it with 3,000 files."""
    script = Path(__file__).with_name("fuzz_weights.py")
    run = subprocess.run(
        [sys.executable, str(script), "--mutated", "150", "--crafted", "100", "--odd", "100"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout.endswith("350 files, 0 failures\n"), run.stdout + run.stderr
    assert run.returncode == 0
    counts = {name: int(count) for count, name in re.findall(r"^ *(\d+) (.*)$", run.stdout, re.M)}
    # neither all refused nor all converted: what is tried is near what is right
    assert counts["mutated: converted"] > 10
    assert counts["mutated: refused"] > 75
    assert counts["crafted: refused"] > 75
    assert counts["odd: read"] > 50
