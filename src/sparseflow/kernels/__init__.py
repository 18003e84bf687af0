"""Kernels: the two-stage operations on tensors. Nothing here knows what an ``nn.Module`` is."""
