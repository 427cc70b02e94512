"""The stages of ``benchmarks/gpu_check.py``: code that runs and records them, and the programs of some stages."""
