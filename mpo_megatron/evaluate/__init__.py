"""Measure a policy: held-out groups, sampled reward, win rates, and files for the judges of public benchmarks."""
