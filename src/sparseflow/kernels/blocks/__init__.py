"""Operations of fused spiking blocks: bit-packed spikes in, bit-packed spikes out, neurons over all time steps.

``spikes`` and ``records`` hold what the operations take, ``reference`` says in plain PyTorch what each computes; the
native engine and Triton implement the same protocol (:class:`~sparseflow.kernels.blocks.records.BlockOps`).
"""
