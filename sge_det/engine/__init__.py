"""Runs: their set-up, their trainer, and the doctor that looks at them beforehand."""
