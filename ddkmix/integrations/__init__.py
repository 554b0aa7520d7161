"""The thinnest adapters to other people's loops; each needs its own library and is imported by name."""
