"""Imported by each tool before Detectron2, of whose import torch says twice that torch.jit.script is deprecated."""

import warnings

# the second is what torch says from Python 3.14 on
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is (deprecated|not supported in Python 3\.14)", FutureWarning)
