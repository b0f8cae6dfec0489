"""`torchrun … -m mpo_megatron.train.reference_main --config FILE --key value`: one rank of `mpo reference`."""

from __future__ import annotations

from mpo_megatron.terminal.counts import count_of
from mpo_megatron.train.rank import be_rank, read_setup


def work() -> None:
    """Compute the reference log-probs that `mpo train` will need, and write them beside the groups."""
    setup = read_setup("mpo reference")
    from mpo_megatron.train.session import session

    with session(setup) as place:
        references = place.references(whole=True)
        if place.ranks.is_main:
            for path, logps in references.items():
                groups, responses = count_of(len(logps.groups) - 1, "groups"), count_of(len(logps.response), "responses")
                print(f"{path}: reference log-probs of {groups}, {responses}")


if __name__ == "__main__":
    be_rank("mpo reference", work)
