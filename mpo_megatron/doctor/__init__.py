"""`mpo doctor`: what is installed here, whether it works together, and what a run would use."""
