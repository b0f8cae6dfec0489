"""Samples from the policy while it trains (`online` in the configuration of `mpo train`), for SPO's regulariser.

policy.py          weights gathered from training's shards → an engine → samples, the same on every rank
vllm.py            the engine as a vLLM that the run starts, on the ranks' GPUs or on others
served.py          the engine as a served vLLM
transfer.py        weight transfer to vLLM: CUDA IPC, NCCL
regularizer.py     when samples are drawn, where they are cached, what a resumed run reuses
sample_kl.py       β · KL(π ‖ π_ref) on the samples, as rows beside those of the loss
"""
