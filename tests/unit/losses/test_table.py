"""`mpo losses`."""

import dataclasses

import pytest

from mpo_megatron.losses import list_losses
from mpo_megatron.losses.table import print_losses, read_field_docs


def test_lists_every_method_with_parameters_source_and_needs(capsys):
    print_losses()
    blocks = {block.split("\n")[0]: block for block in capsys.readouterr().out.split("\n\n")}
    for loss in list_losses():
        block = " ".join(blocks[loss.name].split())
        assert loss.source in block
        assert all(f"{field.name} = " in block for field in dataclasses.fields(loss.params))
    assert "needs reference policy, rewards" in " ".join(blocks["mpo"].split())


@pytest.mark.parametrize("loss", list_losses(), ids=lambda loss: loss.name)
def test_explains_every_hyperparameter(loss, capsys):
    print_losses([loss.name])
    text = " ".join(capsys.readouterr().out.split())
    docs = read_field_docs(loss.params)
    for field in dataclasses.fields(loss.params):
        assert docs[field.name] in text


def test_unknown_name_suggests(capsys):
    with pytest.raises(SystemExit):
        print_losses(["wmpoo"])
    assert "did you mean wmpo" in capsys.readouterr().err
