"""Worlds whose learning curves are known, the best fixed mixture in each, and policies that play in them."""
