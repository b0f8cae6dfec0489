"""A training step with cached reference log-probs compared with one that runs a resident reference model.

    python -m benchmarks.reference_modes
    python -m benchmarks.reference_modes --size 1.5b

Both sides do the same step (same rows, loss, optimizer). `cached` reads the reference from the cache, as after `mpo reference`;
`resident` holds a second model and runs it forward in every step. The cache costs one such forward pass over the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import timing
from benchmarks.setup import SHAPES, TrainStep, bench, make_batch, make_groups
from mpo_megatron.train.step import forward_step

DATA = {"tiny": (2, 32, 8, 4), "small": (2, 256, 64, 8)}
GPU_DATA = (16, 1024, 256, 8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both modes in turn."""
    options = timing.parse(timing.build_parser(__doc__, list(SHAPES)), arguments)
    num_groups, prompt, response, responses = DATA.get(options.size, GPU_DATA)
    with bench(options.size) as own:
        step, reference_model = TrainStep(own), own.build_model()
        vocab_size = own.config.vocab_size
        groups = make_groups(num_groups, prompt=prompt, response=response, responses=responses, vocab_size=vocab_size, spread=0.5)
        batch = make_batch(groups, step.objective, own.shape(8192))
        with torch.no_grad():
            cache = forward_step(reference_model, batch, step.objective, own.ranks)
        seconds = timing.interleave(
            {
                "cached": lambda: step(batch, cache),
                "resident": lambda: step(batch, forward_step(reference_model, batch, step.objective, own.ranks)),
            },
            options.repeat,
        )
        parameters = sum(parameter.numel() * parameter.element_size() for parameter in reference_model[0].parameters())
    ratio = timing.compare(seconds["resident"], seconds["cached"])
    row = {
        **{name: timing.summarize(values) for name, values in seconds.items()},
        "resident_over_cached": ratio,
        "reference_mib": parameters / 2**20,
    }
    table = [
        {
            "cached, s/step": timing.shown(row["cached"]),
            "resident, s/step": timing.shown(row["resident"]),
            "resident / cached": timing.shown(ratio),
            "resident model, MiB": f"{row['reference_mib']:,.0f}",
        }
    ]
    settings = {"groups": num_groups, "prompt": prompt, "response": response, "responses": responses, **SHAPES[options.size]}
    note = (
        "By operations, the ratio is 4/3: one more forward pass beside a forward and a backward pass, which costs "
        "two forward passes."
    )
    timing.report("reference_modes", options, settings, [row], table, note)


if __name__ == "__main__":
    main()
