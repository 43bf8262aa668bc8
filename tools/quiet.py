"""Imported by each tool before Detectron2, of whose import torch says twice that torch.jit.script is deprecated."""

import warnings

warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
