import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_annotations


def test_a_sample_of_the_fuzz():
    tally = fuzz_annotations.run(120)
    assert tally["refused"] > 20 and tally["taken"] + tally["taken, with a word"] > 10
