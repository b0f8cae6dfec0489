"""The policy on Megatron-Core. Importing this package prepares Megatron-Core for this machine's device."""

from mpo_megatron import device

device.prepare()
