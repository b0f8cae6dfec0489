"""On-policy rounds on a CPU, MPO beside DPO: see run.py."""
