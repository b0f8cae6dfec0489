"""Uses of Megatron-Core's private parts: review these modules with every new Megatron-Core version.

    preparation, cpu              import on this machine; stand-ins for CUDA on CPUs
    gathering, optimizer_states   shards and states of its distributed optimizer; fixes to its loading
    weights                       weights that are gathered, or copied, outside a step
    writer                        requests and queues of its checkpoint writer

In addition, model/parallel.py accesses its parallel state, and model/routing.py overrides a private method of its layer.
Importing this package prepares Megatron-Core for this machine's device.
"""

from mpo_megatron.mcore.preparation import prepare

prepare()
