"""Data sets and loaders: what people bring, and the sample set that is drawn on the spot."""
