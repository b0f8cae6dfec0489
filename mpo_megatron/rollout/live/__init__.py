"""Samples of the policy while it trains (`online` in the configuration of `mpo train`): SPO's regulariser.

policy.py          the weights of training's shards → an engine → samples, the same on every rank
vllm.py            the engine, where it is a vLLM that the run starts, on the ranks' GPUs or on others
served.py          the engine, where it is a served vLLM
transfer.py        how weights reach vLLM: CUDA IPC, NCCL
regularizer.py     when samples are drawn, where they are kept, what a resumed run finds
sample_kl.py       β · KL(π ‖ π_ref) on them, as rows beside those of the loss
"""
