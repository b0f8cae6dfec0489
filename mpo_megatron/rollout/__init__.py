"""On-policy rounds: generate, score, select, train, repeat. Each stage reads and writes group lines."""
