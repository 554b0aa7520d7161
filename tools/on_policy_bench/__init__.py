"""The parts of `bench_on_policy.py`."""
