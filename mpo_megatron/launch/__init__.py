"""Jobs for clusters: from a run's configuration to a job for Slurm, Kubernetes, SkyPilot or a shell."""
