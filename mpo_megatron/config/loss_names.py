"""Names of the losses and their hyper-parameters, to refuse a wrong name before torch is imported.

`mpo_megatron/losses` defines them; a test compares both.
"""

from __future__ import annotations

import difflib

from mpo_megatron.config.checks import require
from mpo_megatron.config.train import LossConfig

HYPERPARAMETERS = {
    "apo_zero": "partition num_top num_bottom pairing reduction beta",
    "bco": "partition num_top num_bottom beta shift",
    "cpo": "partition num_top num_bottom pairing reduction sft_weight sft_normalization label_smoothing beta",
    "dpo": "partition num_top num_bottom pairing reduction sft_weight sft_normalization label_smoothing beta",
    "dpo_positive": "partition num_top num_bottom pairing reduction beta penalty",
    "exo": "partition num_top num_bottom pairing reduction beta label_smoothing",
    "grpo_offline": "epsilon beta",
    "infonca": "alpha beta",
    "ipo": "partition num_top num_bottom pairing reduction beta reading",
    "kto": "partition num_top num_bottom beta desirable_weight undesirable_weight",
    "mcpo": "beta num_negatives sampling chain_steps include_current",
    "mpo": "partition num_top num_bottom beta",
    "mpo_bins": "beta num_bins",
    "mpo_reference_free": "partition num_top num_bottom beta gamma",
    "nca": "alpha beta",
    "nca_pair": "partition num_top num_bottom pairing reduction beta",
    "nca_reference_free": "alpha beta sft_weight sft_normalization",
    "orpo": "partition num_top num_bottom pairing reduction beta",
    "plackett_luce": "beta",
    "rdpo": "partition num_top num_bottom pairing reduction beta alpha label_smoothing",
    "rnce": "beta num_negatives",
    "rpo": "partition num_top num_bottom pairing reduction sft_weight sft_normalization label_smoothing beta",
    "sdpo": "beta form",
    "sft": "partition num_top num_bottom targets normalization",
    "simpo": "partition num_top num_bottom pairing reduction sft_weight sft_normalization label_smoothing beta gamma",
    "slic": "partition num_top num_bottom pairing reduction sft_weight sft_normalization label_smoothing beta margin normalized",
    "spo": "partition num_top num_bottom pairing reduction form alpha gamma eta regularizer regularizer_weight",
    "sppo": "partition num_top num_bottom pairing reduction beta",
    "swepo": "partition num_top num_bottom beta alpha p weighting",
    "wmpo": "partition num_top num_bottom beta alpha deviation",
}


def check_loss_names(loss: LossConfig) -> None:
    """Refuse an unknown loss or hyper-parameter; those of a user's loss are checked at its import.

    Raises:
        ConfigError: names it, and the nearest name.
    """
    if loss.function is not None:
        return
    near = difflib.get_close_matches(loss.name, HYPERPARAMETERS, n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(HYPERPARAMETERS)}."
    require(loss.name in HYPERPARAMETERS, f"loss.name = {loss.name!r}; there is no such method; {fix}")
    names = HYPERPARAMETERS[loss.name].split()
    choices = f"it has {', '.join(names)}" if names else "it has none"
    for name in loss.params:
        require(name in names, f"loss.params.{name}; {loss.name} has no such hyper-parameter; {choices}.")
