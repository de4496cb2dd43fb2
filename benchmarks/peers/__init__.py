"""What a user might train with instead, each behind the same call; used by benchmarks/throughput.py."""
