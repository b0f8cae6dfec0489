"""Jobs for clusters: from a run's configuration to what Slurm, Kubernetes, SkyPilot or a shell starts."""
