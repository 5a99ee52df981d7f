"""The study: benches S, M, L and H, run by bench.py and trl_peers.py, shown by report.py (benchmarks/README.md)."""
