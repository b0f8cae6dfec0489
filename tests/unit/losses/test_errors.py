"""Refusals, and their messages: value; violated rule; fix."""

import dataclasses

import pytest
import torch

from mpo_megatron.losses import build_params, get_loss, group_loss, list_losses

POLICY = torch.tensor([[-10.0, -12.0, -9.0], [-30.0, -31.0, -29.0]])
REFERENCE = POLICY - 0.5
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.1, 0.3]])
LABELS = torch.tensor([[1, 0, -1], [0, 1, 0]], dtype=torch.int8)
LENGTHS = torch.full((2, 3), 4)
TOKENS = torch.full((2, 3, 4), -1.0)


def put(tensor, value, group=1, response=2):
    tensor = tensor.clone()
    tensor[group, response] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mpoo", "mpo"), ("infonce", "infonca"), ("placket_luce", "plackett_luce"), ("mc-po", "mcpo")],
)
def test_unknown_name(name, nearest):
    with pytest.raises(ValueError, match=f"loss = '{name}'; there is no such method; did you mean .*{nearest}"):
        get_loss(name)


def test_unknown_name_far_from_all():
    with pytest.raises(ValueError, match=r"choose one of apo_zero, bco, .*wmpo"):
        get_loss("zzz")


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        (
            "mpo",
            {"betta": 0.1},
            "mpo.betta; mpo has no such hyper-parameter; it has partition, num_top, num_bottom, beta",
        ),
        ("mpo", {"beta": -0.1}, "mpo.beta = -0.1; it must be positive; try 0.01"),
        ("mpo", {"beta": 0}, "mpo.beta = 0; it must be positive"),
        ("mpo", {"beta": "0.1"}, "mpo.beta = '0.1'; it must be a finite number"),
        ("mpo", {"beta": True}, "mpo.beta = True; it must be a finite number"),
        ("mpo", {"beta": float("nan")}, "mpo.beta = nan; it must be a finite number"),
        (
            "mpo",
            {"partition": "mode"},
            "mpo.partition = 'mode'; it must be one of mean, median, trimmed_mean, top_bottom",
        ),
        ("mpo", {"num_top": 3}, "num_top = 3; it has an effect only with partition = top_bottom"),
        ("mpo", {"partition": "top_bottom", "num_top": 0}, "num_top = 0; it must be positive"),
        ("mpo", {"partition": "top_bottom", "num_top": 1.5}, "num_top = 1.5; it must be of type int"),
        ("wmpo", {"alpha": -1.0}, "alpha = -1.0; it must not be negative"),
        ("swepo", {"p": 3}, "p = 3; it must be one of 0, 1, 2"),
        (
            "swepo",
            {"weighting": "power", "alpha": 2.0},
            "alpha = 2.0; it has an effect only with weighting = exp or listing",
        ),
        ("infonca", {"alpha": 0.0}, "alpha = 0.0; it must be positive"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing = 0.5; it must be in .0, 0.5."),
        ("dpo", {"sft_normalization": "sequence"}, "it has an effect only with sft_weight > 0"),
        (
            "dpo",
            {"partition": "median"},
            "partition = median; it has an effect only with pairing = cross_pairs",
        ),
        ("exo", {"label_smoothing": 0.0}, "label_smoothing = 0.0; it must be positive"),
        (
            "slic",
            {"label_smoothing": 0.1},
            "label_smoothing = 0.1; it has an effect only with a logistic loss",
        ),
        ("spo", {"eta": 0.5}, "eta = 0.5; it has an effect only with form = ranked"),
        ("spo", {"form": "ranked", "pairing": "all_pairs"}, "it has an effect only with form = pairs"),
        ("spo", {"regularizer_weight": 1.0}, "it has an effect only with regularizer"),
        ("mcpo", {"num_negatives": 0}, "num_negatives = 0; it must be positive"),
        (
            "mcpo",
            {"sampling": "max", "chain_steps": 2},
            "chain_steps = 2; it has an effect only with sampling = kernel",
        ),
        ("mcpo", {"include_current": 1}, "include_current = 1; it must be of type bool"),
        ("grpo_offline", {"epsilon": 1.0}, "epsilon = 1.0; it must be below 1"),
        ("sft", {"normalization": "word"}, "normalization = 'word'; it must be one of token, sequence"),
    ],
)
def test_hyperparameters(name, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        build_params(name, hyperparameters)
    with pytest.raises(ValueError, match=message):
        group_loss(name, POLICY, REFERENCE, REWARDS, **hyperparameters)


@pytest.mark.parametrize("loss", list_losses(), ids=lambda loss: loss.name)
def test_every_number_has_a_least_value(loss):
    """A subclass that redeclares a field with another default would lose the rule in its annotation."""
    for field in dataclasses.fields(loss.params):
        if type(field.default) in (int, float):
            with pytest.raises(ValueError, match=rf"{field.name} = -1; it must"):
                build_params(loss.name, {field.name: -1})


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("mpo", {"reference_logps": None}, "reference_logps = None; mpo compares with the reference policy"),
        ("mpo", {"rewards": None}, "rewards = None; mpo reads rewards; pass rewards"),
        (
            "mpo",
            {"rewards": None, "labels": LABELS},
            "rewards = None; mpo reads rewards, and labels .*partition = labels",
        ),
        ("infonca", {"rewards": None, "labels": LABELS}, "rewards = None; infonca reads rewards, and labels"),
        ("mpo", {"partition": "labels"}, "labels = None; mpo reads which responses were chosen"),
        (
            "wmpo",
            {"partition": "labels", "labels": LABELS, "rewards": None},
            "rewards = None; wmpo reads rewards",
        ),
        ("dpo", {"rewards": None}, "rewards = None; dpo orders the responses; pass rewards or labels"),
        ("simpo", {}, "lengths = None; simpo uses the number of scored tokens; pass lengths"),
        ("grpo_offline", {"lengths": LENGTHS}, "token_logps = None; grpo_offline works token by token"),
        (
            "grpo_offline",
            {"lengths": LENGTHS, "token_logps": TOKENS},
            "reference_token_logps = None; grpo_offline works token by token",
        ),
        ("mcpo", {}, "generator = None; mcpo draws at random; pass a seeded torch.Generator"),
    ],
)
def test_missing_inputs(name, inputs, message):
    arguments = {"reference_logps": REFERENCE, "rewards": REWARDS} | inputs
    with pytest.raises(ValueError, match=message):
        group_loss(name, POLICY, arguments.pop("reference_logps"), arguments.pop("rewards"), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["policy_logps", "reference_logps", "rewards"])
def test_not_finite(field, value):
    inputs = {"policy_logps": POLICY, "reference_logps": REFERENCE, "rewards": REWARDS}
    inputs[field] = put(inputs[field], value)
    with pytest.raises(ValueError, match=rf"{field}\[group 1, response 2\] = {value:g}; it must be finite"):
        group_loss("mpo", **inputs)
    valid = put(torch.ones(2, 3, dtype=torch.bool), False)
    assert group_loss("mpo", **inputs, valid=valid).isfinite().all()  # the same values in padding do not matter


def test_a_huge_reward():
    """Sums of 1e308 are infinite, and every response would be below the mean."""
    with pytest.raises(ValueError, match=r"rewards\[group 1, response 2\] = 1e\+308; it must be within ±3\.4e\+38"):
        group_loss("mpo", POLICY, REFERENCE, put(REWARDS.double(), 1e308))


def test_token_values():
    arguments = {"lengths": LENGTHS, "reference_token_logps": TOKENS}
    bad = TOKENS.clone()
    bad[0, 1, 3] = float("nan")
    with pytest.raises(ValueError, match=r"token_logps\[group 0, response 1\]; it must be finite"):
        group_loss("grpo_offline", POLICY, None, REWARDS, token_logps=bad, **arguments)
    short = arguments | {"lengths": put(LENGTHS, 3, 0, 1)}
    assert group_loss("grpo_offline", POLICY, None, REWARDS, token_logps=bad, **short).isfinite().all()
    long = arguments | {"lengths": put(LENGTHS, 5)}
    with pytest.raises(ValueError, match=r"token_logps.shape .* lengths go beyond its last dimension"):
        group_loss("grpo_offline", POLICY, None, REWARDS, token_logps=TOKENS, **long)


def test_lengths_below_one():
    with pytest.raises(ValueError, match=r"lengths\[group 1, response 2\] = 0; a response must have tokens"):
        group_loss("simpo", POLICY, None, REWARDS, lengths=put(LENGTHS, 0))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"policy_logps": POLICY[0]}, r"policy_logps.shape = \(3,\); it must be \[groups, responses\]"),
        (
            {"policy_logps": POLICY.long()},
            "policy_logps.dtype = torch.int64; log-probs are floating-point",
        ),
        (
            {"reference_logps": REFERENCE[:, :2]},
            r"reference_logps.shape = \(2, 2\); it must equal .* \(2, 3\)",
        ),
        ({"rewards": REWARDS[:1]}, r"rewards.shape = \(1, 3\); it must equal"),
        ({"valid": torch.ones(2, 2, dtype=torch.bool)}, r"valid.shape = \(2, 2\); it must equal"),
        ({"valid": torch.ones(2, 3)}, "valid.dtype = torch.float32; it is a mask"),
        ({"token_logps": TOKENS[0]}, r"token_logps.shape = \(3, 4\); it must be"),
        (
            {"token_logps": TOKENS, "reference_token_logps": TOKENS[..., :3]},
            r"reference_token_logps.shape = \(2, 3, 3\); it must equal token_logps.shape = \(2, 3, 4\)",
        ),
    ],
)
def test_shapes(inputs, message):
    arguments = {"policy_logps": POLICY, "reference_logps": REFERENCE, "rewards": REWARDS} | inputs
    with pytest.raises(ValueError, match=message):
        group_loss("mpo", **arguments)


@pytest.mark.parametrize("name", ["mpo", "infonca", "dpo", "sdpo", "spo"])
def test_one_response(name):
    with pytest.raises(ValueError, match=rf"shape = \(2, 1\); {name} compares responses, and no group has two"):
        group_loss(name, POLICY[:, :1], REFERENCE[:, :1], REWARDS[:, :1])
    valid = torch.tensor([[True, False, False], [False, True, False]])
    with pytest.raises(ValueError, match="no group has two valid ones"):
        group_loss(name, POLICY, REFERENCE, REWARDS, valid=valid)


def test_one_response_is_enough_for_supervised():
    values = group_loss("sft", POLICY[:, :1], lengths=LENGTHS[:, :1])
    assert torch.allclose(values, -POLICY[:, 0] / 4)


@pytest.mark.parametrize("name", ["mpo", "dpo", "plackett_luce", "grpo_offline"])
def test_no_contrast(name):
    tokens = {"lengths": LENGTHS, "token_logps": TOKENS, "reference_token_logps": TOKENS}
    with pytest.raises(ValueError, match=f"groups with contrast = 0 of 2; {name} learns from differences"):
        group_loss(name, POLICY, REFERENCE, torch.ones(2, 3), **tokens)


def test_labels_without_rewards_work_where_an_order_is_enough():
    values = group_loss("dpo", POLICY, REFERENCE - POLICY * 0.1, labels=LABELS, beta=0.1)
    margin = 0.1 * 0.1 * (POLICY[0, 0] - POLICY[0, 1])  # s = 0.1 log π + 0.5; the label −1 is ignored
    assert torch.allclose(values[0], -torch.nn.functional.logsigmoid(margin))
    assert group_loss("mpo", POLICY, REFERENCE, labels=LABELS, partition="labels").isfinite().all()


def test_supervised_target_is_never_a_rejected_response() -> None:
    """With labels only, a group without a chosen response has no target."""
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    labels = torch.tensor([[0, 0], [0, 1]], dtype=torch.int8)
    losses = group_loss("sft", logps, labels=labels, normalization="sequence")
    assert losses.tolist() == [0.0, 4.0]


@pytest.mark.parametrize(
    ("logps", "message"),
    [
        (None, "policy_logps is of type NoneType; it must be a tensor"),
        ([[-1.0, -2.0]], "policy_logps is of type list; it must be a tensor"),
        (POLICY.numpy(), "policy_logps is of type ndarray; it must be a tensor"),
        (torch.zeros(0, 3), r"policy_logps.shape = \(0, 3\); there are no groups"),
        (torch.zeros(2, 0), r"policy_logps.shape = \(2, 0\); there are no groups, or no responses"),
        (torch.zeros(3), r"policy_logps.shape = \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.long), "policy_logps.dtype = torch.int64"),
    ],
)
def test_log_probs_that_are_none(logps, message):
    for loss in list_losses():
        with pytest.raises(ValueError, match=message):
            group_loss(loss.name, logps, logps, logps)


@pytest.mark.parametrize("name", ["reference_logps", "rewards", "valid", "labels", "lengths", "token_logps", "token_kl"])
def test_other_inputs_that_are_no_tensors(name):
    given = {"reference_logps": REFERENCE, "rewards": REWARDS} | {name: [[1.0, 2.0, 3.0]] * 2}
    with pytest.raises(ValueError, match=f"{name} is of type list; it must be a tensor"):
        group_loss("mpo", POLICY, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", list_losses(), ids=lambda loss: loss.name)
def test_the_ends_of_a_dtype_give_finite_losses_and_gradients(loss, dtype):
    ends = torch.tensor([[-3e38, 0.0, -1e4], [0.0, -3e38, -3e38], [-1.0, -3e38, 0.0], [-3e38, -1e4, -3e38]])
    for reference in (ends.flip(0), ends.roll(1, 1), torch.zeros_like(ends)):
        policy = ends.to(dtype).clone().requires_grad_()
        tokens = (ends / 4).to(dtype).unsqueeze(-1).repeat(1, 1, 4).requires_grad_()
        losses = group_loss(
            loss.name,
            policy,
            reference.to(dtype),
            torch.tensor([[1.0, 0.0, 2.0]] * 3 + [[0.0, 1e38, 2e38]]),
            lengths=torch.full((4, 3), 4),
            labels=torch.tensor([[1, 0, 0]] * 4, dtype=torch.int8),
            token_logps=tokens,
            reference_token_logps=(reference / 4).to(dtype).unsqueeze(-1).repeat(1, 1, 4),
            token_kl=-reference.to(dtype),
            generator=torch.Generator().manual_seed(0),
        )
        losses.sum().backward()
        assert losses.isfinite().all()
        assert all(values.grad is None or values.grad.isfinite().all() for values in (policy, tokens))
