import re
import subprocess
import sys
from pathlib import Path


def test_a_sample_of_damaged_and_hostile_files_is_read_or_refused():
    """`make fuzz` does it with 3,000 files."""
    script = Path(__file__).with_name("fuzz_weights.py")
    run = subprocess.run(
        [sys.executable, str(script), "--mutated", "90", "--crafted", "60", "--odd", "60"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout.endswith("210 files, 0 failures\n"), run.stdout + run.stderr
    assert run.returncode == 0
    counts = {name: int(count) for count, name in re.findall(r"^ *(\d+) (.*)$", run.stdout, re.M)}
    # neither all refused nor all converted: what is tried is near what is right
    assert counts["mutated: converted"] > 6
    assert counts["mutated: refused"] > 45
    assert counts["crafted: refused"] > 45
    assert counts["odd: read"] > 30
