"""The pairwise methods against TRL's own trainers, with a stand-in model that returns given log-probs."""

import collections
from types import SimpleNamespace

import pytest
import torch

from mpo_megatron.losses import group_loss

trl = pytest.importorskip("trl", minversion="1.16")

PAIRS, TOKENS = 6, 7
# 1e-12: both sides compute the same formula in float64.
exact = {"rtol": 1e-12, "atol": 1e-14}


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def reduce(self, values, reduction):
        return values


class Model:
    """A stand-in that returns given per-token log-probs."""

    training = True

    def __init__(self, token_logps):
        filler = torch.zeros_like(token_logps)
        self.outputs = SimpleNamespace(
            log_probs=token_logps, entropy=filler, mean_logits=filler, is_top1=filler.bool(), aux_loss=None
        )

    def __call__(self, **_):
        return self.outputs


def make_tokens(seed=0):
    """Token log-probs of policy and reference [2, pairs, tokens] (chosen, rejected), zero beyond their lengths."""
    generator = torch.Generator().manual_seed(seed)
    policy = -3 * torch.rand(2, PAIRS, TOKENS, generator=generator, dtype=torch.float64)
    reference = -3 * torch.rand(2, PAIRS, TOKENS, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, TOKENS + 1, (2, PAIRS), generator=generator)
    mask = torch.arange(TOKENS) < lengths.unsqueeze(-1)
    return policy * mask, reference * mask, lengths, mask


def ours(name, seed=0, **hyperparameters):
    """Mean of our loss over the pairs as groups of two, the chosen one first."""
    policy, reference, lengths, _ = make_tokens(seed)
    rewards = torch.tensor([1.0, 0.0]).repeat(PAIRS, 1)
    return group_loss(name, policy.sum(-1).T, reference.sum(-1).T, rewards, lengths=lengths.T, **hyperparameters).mean()


def build_trainer(kind, **attributes):
    """A trainer without its constructor, which requires a model, a tokenizer and data."""
    trainer = object.__new__(kind)
    trainer.accelerator = Accelerator()
    trainer.aux_loss_enabled = False
    trainer._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def run_dpo_trainer(loss_type, beta, label_smoothing=0.0):
    policy, reference, _, mask = make_tokens()
    model = Model(policy.flatten(0, 1))
    trainer = build_trainer(
        trl.DPOTrainer,
        model=model,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
    )
    # The trainer drops the first column: the token before the first that is predicted.
    completion_mask = torch.nn.functional.pad(mask.flatten(0, 1).long(), (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": reference[0].sum(-1),
        "ref_rejected_logps": reference[1].sum(-1),
    }
    return trainer._compute_loss(model, inputs, return_outputs=False)


@pytest.mark.parametrize(
    ("loss_type", "name", "hyperparameters"),
    [
        ("sigmoid", "dpo", {"beta": 0.3}),
        ("hinge", "slic", {"beta": 0.3, "normalized": True}),
        ("ipo", "ipo", {"beta": 0.3}),
        ("exo_pair", "exo", {"beta": 0.3, "label_smoothing": 0.05}),
        ("nca_pair", "nca_pair", {"beta": 0.3}),
        ("bco_pair", "bco", {"beta": 0.3, "shift": "none"}),
        ("sppo_hard", "sppo", {"beta": 0.3}),
        ("apo_zero", "apo_zero", {"beta": 0.3}),
    ],
)
def test_dpo_trainer(loss_type, name, hyperparameters):
    smoothing = hyperparameters.get("label_smoothing", 0.0)
    theirs = run_dpo_trainer(loss_type, hyperparameters["beta"], smoothing)
    # TRL computes log ε of EXO in float32: 6e-8 of relative rounding.
    tolerance = {"rtol": 1e-7, "atol": 0} if name == "exo" else exact
    torch.testing.assert_close(ours(name, **hyperparameters), theirs, **tolerance)


def test_supervised_term():
    """TRL's `sft` averages over all tokens of the batch, ours over each response first: equal for one pair."""
    policy, reference, lengths, mask = make_tokens()
    theirs = -policy[0, :1][mask[0, :1]].mean()
    rewards = torch.tensor([[1.0, 0.0]])
    arguments = (policy.sum(-1).T[:1], reference.sum(-1).T[:1], rewards)
    plain = group_loss("dpo", *arguments, lengths=lengths.T[:1])
    mixed = group_loss("dpo", *arguments, lengths=lengths.T[:1], sft_weight=0.5)
    torch.testing.assert_close(mixed - plain, 0.5 * theirs.reshape(1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("loss_type", "name", "hyperparameters"),
    [
        ("sigmoid", "cpo", {"beta": 0.3, "sft_weight": 0.0}),
        ("sigmoid", "cpo", {"beta": 0.3, "sft_weight": 0.0, "label_smoothing": 0.1}),
        ("simpo", "simpo", {"beta": 2.0, "gamma": 0.7}),
        ("simpo", "simpo", {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1}),
        ("hinge", "slic", {"beta": 0.3}),
    ],
)
def test_cpo_trainer(loss_type, name, hyperparameters):
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = build_trainer(
        cpo.CPOTrainer,
        alpha=0.0,
        beta=hyperparameters["beta"],
        label_smoothing=hyperparameters.get("label_smoothing", 0.0),
        loss_type=loss_type,
        simpo_gamma=hyperparameters.get("gamma"),
    )
    policy, _, lengths, _ = make_tokens()
    logps = policy.sum(-1) / lengths if loss_type == "simpo" else policy.sum(-1)
    theirs = trainer.cpo_loss(logps[0], logps[1])[0].mean()
    torch.testing.assert_close(ours(name, **hyperparameters), theirs, **exact)


def test_orpo_trainer():
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = build_trainer(orpo.ORPOTrainer, beta=0.3)
    policy, _, lengths, _ = make_tokens()
    logps = policy.sum(-1) / lengths
    odds_term = trainer.odds_ratio_loss(logps[0], logps[1])[0]
    # TRL casts to float32 inside, and adds the supervised term outside: loss = NLL − odds term.
    theirs = (-logps[0] - odds_term).mean()
    torch.testing.assert_close(ours("orpo", beta=0.3), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kto_trainer(seed):
    """With TRL's mismatched-pair estimate of the KL replaced by the batch's own responses, our documented deviation."""
    policy, reference, _, mask = make_tokens(seed)
    model = Model(policy.flatten(0, 1))
    ratios = (policy - reference).flatten(0, 1).sum(-1)
    trainer = build_trainer(
        trl.KTOTrainer,
        model=model,
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda model, batch: ratios,
    )
    completion_mask = torch.nn.functional.pad(mask.flatten(0, 1).long(), (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "label": torch.tensor([True] * PAIRS + [False] * PAIRS),
        "ref_logps": reference.flatten(0, 1).sum(-1),
        "ref_KL_logps": torch.zeros_like(ratios),
    }
    theirs = trainer._compute_loss(model, inputs, return_outputs=False)
    value = ours("kto", seed, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    # TRL: mean over single responses; ours: mean over Y+ plus mean over Y−.
    torch.testing.assert_close(value, 2 * theirs, **exact)


def test_grpo_trainer():
    """One group of four responses; the reference is the behaviour policy."""
    policy, reference, lengths, mask = (values.reshape(12, *values.shape[2:])[:4] for values in make_tokens())
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    trainer = build_trainer(
        trl.GRPOTrainer,
        model=Model(policy),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        beta=0.04,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type="grpo",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (policy, torch.zeros_like(policy), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(4, TOKENS, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": (rewards - rewards.mean()) / rewards.std(),
        "old_per_token_logps": reference,
        "ref_per_token_logps": reference,
    }
    theirs = trainer._compute_loss(None, inputs)
    value = group_loss(
        "grpo_offline",
        policy.sum(-1)[None],
        None,
        rewards[None],
        lengths=lengths[None],
        token_logps=policy[None],
        reference_token_logps=reference[None],
    )
    torch.testing.assert_close(value.mean(), theirs, **exact)
