"""Parts of tools/bench_loss.py."""
