"""What the tools leave unsaid is what torch says of torch.jit.script, whatever the Python, and nothing else."""

import inspect
import re
import runpy
import warnings

import torch
from conftest import ROOT


def test_what_torch_says_of_torch_jit_script_is_silenced_and_nothing_else():
    said = re.findall(r'"(`torch\.jit\.script` is [^"]+)"', inspect.getsource(torch.jit._script))
    assert len(said) == 2, "one to 3.13, one from 3.14 on"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runpy.run_path(str(ROOT / "tools/quiet.py"))
        for text in (*said, "`torch.jit.fork` is deprecated."):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["`torch.jit.fork` is deprecated."]
