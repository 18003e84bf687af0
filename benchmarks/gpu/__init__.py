"""The GPU benchmark: ``python -m benchmarks.gpu --out DIR``; see docs/gpu-benchmarks.md."""
