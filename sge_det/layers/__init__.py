"""The layer: its formula, its gradient and the fused tail of a residual block. Torch alone."""
