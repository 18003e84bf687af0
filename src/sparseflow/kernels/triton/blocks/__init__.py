"""Fused spiking blocks in Triton; :class:`.ops.TritonBlockOps` is the way in, docs/gpu-fused.md the explanation."""
