"""Samples of the policy while it trains (`online` in the configuration of `mpo train`): SPO's regulariser.

policy.py          the weights of training's shards → an engine → samples, the same on every rank
vllm.py            the engine, where it is vLLM beside the training on one GPU
regularizer.py     when samples are drawn, where they are kept, what a resumed run finds
sample_kl.py       β · KL(π ‖ π_ref) on them, as rows beside those of the loss
"""
