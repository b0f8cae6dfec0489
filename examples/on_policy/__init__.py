"""On-policy rounds on a CPU, MPO compared with DPO: see run.py."""
