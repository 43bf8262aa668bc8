"""Pretraining of (SGE-)ResNets on classified images."""
