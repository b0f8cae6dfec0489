"""Check that Transformer Engine still has every name of its that this package reads.

    python -m tools.transformer_engine_names                  # oldest and newest supported version, downloaded
    python -m tools.transformer_engine_names 2.15.0 FOLDER    # a version to download, or a folder that has `transformer_engine`

The sources are parsed, not imported, so it needs neither a GPU nor Transformer Engine's libraries: a wheel of 1 MB is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tools.package_names import Name, check, missing

VERSIONS = ("2.11.0", "2.20.2")
"""Oldest and newest version that the package supports."""


PYTORCH = "transformer_engine.pytorch"
NAMES = (
    Name(PYTORCH, "is_fp8_available", ("return_reason",)),
    Name(PYTORCH, "is_fp8_block_scaling_available", ("return_reason",)),
    Name(PYTORCH, "is_mxfp8_available", ("return_reason",)),
    Name(PYTORCH, "DotProductAttention", ("num_gqa_groups", "attention_dropout", "qkv_format", "attn_mask_type")),
    Name(PYTORCH, "DotProductAttention.forward", ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")),
    Name(f"{PYTORCH}.utils", "get_cudnn_version"),
    Name("transformer_engine.common.recipe", "Float8CurrentScaling.use_power_2_scales"),
)
"""What is imported or called: model/precision.py, model/attention_varlen.py."""

TEXTS = (
    "_high_precision_init_val",  # model/precision.py: keep_exact_weights
    "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES",  # mcore/preparation.py
    "NVTE_UNFUSED_ATTN",  # model/attention_varlen.py
    'group["step"]',  # mcore/optimizer_states.py: Adam's count of steps
)
"""What is written somewhere in its Python sources: attributes, keys and environment variables."""


def missing_names(root: Path) -> list[str]:
    """What of NAMES and TEXTS the `transformer_engine` in a folder lacks, a line each."""
    wanting = missing(root, NAMES)
    sources = [path.read_text(encoding="utf-8") for path in sorted((root / "transformer_engine").rglob("*.py"))]
    return [*wanting, *(f"{text}: nowhere in the sources" for text in TEXTS if not any(text in source for source in sources))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check each version or folder; the exit code is 1 if a name is missing."""
    chosen = list(sys.argv[1:] if arguments is None else arguments) or list(VERSIONS)
    if {"-h", "--help"} & set(chosen):
        print(__doc__)
        return 0
    return check("transformer-engine", chosen, missing_names, f"has all of {len(NAMES) + len(TEXTS)} names")


if __name__ == "__main__":
    raise SystemExit(main())
