"""Adapters to other people's loops, one file for each framework; importing one needs its framework."""

__all__: list[str] = []
