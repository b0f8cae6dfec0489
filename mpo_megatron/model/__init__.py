"""The policy on Megatron-Core. Importing this package makes Megatron-Core ready for this machine's device."""

from mpo_megatron import device

device.prepare()
