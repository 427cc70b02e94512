"""The stages of ``benchmarks/gpu_check.py``: how they are run and recorded, and the programs that some of them are."""
