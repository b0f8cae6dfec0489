"""The policy on Megatron-Core. Importing this package prepares Megatron-Core for this machine's device."""

from mpo_megatron.mcore.preparation import prepare

prepare()
