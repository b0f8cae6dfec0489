"""Uses of Megatron-Core's private parts: review these modules with every new version of it.

    gathering, optimizer_states   ranges and states of its distributed optimizer; what its loading gets wrong
    weights                       weights that are gathered, or copied, outside a step
    writer                        the requests and queues of its checkpoint writer

Besides these, `device.py` replaces its CUDA calls on CPUs, model/parallel.py alone touches its parallel state, and
model/routing.py overrides a private method of its layer.
Importing this package makes Megatron-Core ready for this machine's device.
"""

from mpo_megatron import device

device.prepare()
