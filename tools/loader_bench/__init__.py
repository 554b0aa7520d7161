"""The parts of `bench_loader.py`."""
