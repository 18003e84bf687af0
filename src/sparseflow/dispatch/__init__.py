"""Dispatch: crossovers measured on this machine, their cache, and the per-call choice between dense and sparse."""
