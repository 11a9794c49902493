"""Each task's distribution is what its docstring says."""

import math

import pytest
import torch

from routerzoo import RoutingContext
from routerzoo.bench.choices import RouterChoice
from routerzoo.bench.registry import list_tasks, task_class
from routerzoo.bench.run import Run, build
from routerzoo.bench.task import check_task
from routerzoo.bench.tasks.clusters import Clusters
from routerzoo.bench.tasks.context import Context
from routerzoo.bench.tasks.drift import Drift
from routerzoo.bench.tasks.hierarchy import Hierarchy
from routerzoo.bench.tasks.ids import Ids
from routerzoo.bench.tasks.markov import Markov
from routerzoo.bench.tasks.need import Need
from routerzoo.bench.tasks.noise import Noise
from routerzoo.bench.tasks.patches import Patches
from routerzoo.bench.tasks.skew import Skew
from routerzoo.bench.tasks.xor import Xor

EXACT = [name for name in list_tasks() if task_class(name).tier == "exact"]
TOKENS = 8192


def drawn(task, tokens=TOKENS, progress=1.0, purpose="test"):
    return task.batch(tokens, task.generator(purpose), progress)


def close(counts, probabilities):
    """Whether counts are within five standard errors of what the probabilities predict."""
    counts, probabilities = torch.as_tensor(counts).double(), torch.as_tensor(probabilities).double()
    error = (counts.sum() * probabilities * (1 - probabilities)).sqrt()
    return bool(((counts - counts.sum() * probabilities).abs() <= 5 * error + 1e-9).all())


def share_of_domains(batch, num_domains=8):
    return torch.bincount(batch.domain_T, minlength=num_domains)


@pytest.mark.parametrize("name", EXACT)
def test_a_task_follows_from_its_seed_alone(name):
    cls = task_class(name)
    check_task(cls)
    first, again, other = (drawn(cls(seed), 256) for seed in (0, 0, 1))
    torch.randn(3)  # the global generator has no part in it
    for field in vars(first):
        value = getattr(first, field)
        assert value is None or torch.equal(value, getattr(again, field))
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.x, drawn(cls(0), 256, purpose="another").x)


@pytest.mark.parametrize("name", EXACT)
def test_ideal_routing_gives_no_two_domains_an_expert(name):
    task = task_class(name)(0)
    batch = drawn(task, 1024)
    experts_TK = task.oracle(batch)
    owners = {}
    for domain, experts in zip(batch.domain_T.tolist(), experts_TK.tolist(), strict=True):
        if domain < 0:
            assert set(experts) == {-1}
        else:
            assert owners.setdefault(experts[0], domain) == domain


def test_clusters_are_equally_frequent_and_skewed_ones_follow_zipf():
    assert close(share_of_domains(drawn(Clusters(0))), torch.full((8,), 1 / 8))
    zipf_C = torch.tensor([1 / math.sqrt(rank) ** 3 for rank in range(1, 9)])
    assert close(share_of_domains(drawn(Skew(0))), zipf_C / zipf_C.sum())
    assert (zipf_C / zipf_C.sum())[[0, -1]].tolist() == pytest.approx([0.52, 0.02], abs=0.005)


def test_a_gate_whose_rows_are_the_centers_of_clusters_is_wrong_for_3_percent_of_the_tokens():
    task = Clusters(0)
    batch = drawn(task, 4 * TOKENS)
    wrong = int(((batch.x @ task.centers_CD.T).argmax(1) != batch.domain_T).sum())
    # P(any of 7 normal numbers exceeds another by 2.5 / 0.7), by integration.
    assert close([wrong, 4 * TOKENS - wrong], [0.0315, 0.9685])


def test_a_token_id_has_one_domain_and_a_domain_eight_ids():
    batch = drawn(Ids(0))
    pairs = set(zip(batch.token_ids_T.tolist(), batch.domain_T.tolist(), strict=True))
    assert len(pairs) == 64
    assert torch.bincount(torch.tensor([domain for _, domain in pairs])).tolist() == [8] * 8


def test_xor_is_balanced_and_no_linear_score_tells_a_domain():
    task = Xor(0)
    batch = drawn(task)
    assert close(share_of_domains(batch), torch.full((8,), 1 / 8))
    signs_TB = (batch.x @ task.directions_BD.T > 0).long()
    seen_T = (signs_TB[:, ::2] ^ signs_TB[:, 1::2]) @ torch.tensor([1, 2, 4])
    assert (seen_T == batch.domain_T).float().mean() > 0.97  # a sign is wrong in 0.2 % of cases
    for domain in range(8):
        x_ND = batch.x[batch.domain_T == domain]
        corner_NB = torch.sign(x_ND @ task.directions_BD.T)
        # Neither a bit's mean nor, across the pairs, the product of two bits depends on the domain.
        assert (corner_NB.mean(0).abs() < 5 / math.sqrt(len(x_ND))).all()
        across = corner_NB[:, 0] * corner_NB[:, 2]
        assert abs(across.mean()) < 5 / math.sqrt(len(x_ND))


def information(bins_N, domain_N, num_bins, num_domains=8):
    """Return the plug-in mutual information in nats."""
    joint = torch.bincount(bins_N * num_domains + domain_N, minlength=num_bins * num_domains).double()
    joint = joint.view(num_bins, num_domains) / len(domain_N)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint / independent.clamp_min(1e-300)).sum())


def test_in_context_a_token_alone_says_nothing_of_its_domain():
    task = Context(0)
    batch = drawn(task, 4 * TOKENS)
    directions_DD = torch.linalg.qr(torch.cat([task.centers_CD, task.topics_RD, torch.eye(32)]).T)[0].T

    def statistic(place):
        """Return 2 N I of domain and quartile, the mean over 32 directions, and its standard error without relation."""
        x_GD, domain_G = batch.x[place :: task.sequence_length], batch.domain_T[place :: task.sequence_length]
        found = []
        for value_G in (directions_DD @ x_GD.T).unbind(0):
            quartile_G = torch.bucketize(value_G, value_G.quantile(torch.tensor([0.25, 0.5, 0.75])))
            found.append(2 * len(domain_G) * information(quartile_G, domain_G, 4))
        freedom = (4 - 1) * (8 - 1)  # chi-squared, where they are independent
        return sum(found) / len(found), freedom, math.sqrt(2 * freedom / len(found))

    for place in range(1, task.sequence_length):
        value, mean, error = statistic(place)
        assert value < mean + 5 * error
    value, mean, error = statistic(0)
    assert value > mean + 100 * error  # the cue does
    assert task.token_losses(batch.target + 1, batch).view(-1, 8)[0].tolist() == [0] + [1] * 7


def test_need_is_one_two_or_three_components_and_the_target_their_mean():
    task = Need(0)
    batch = drawn(task)
    assert close(torch.bincount(batch.need_T)[1:], torch.full((3,), 1 / 3))
    experts_TK = task.oracle(batch)
    assert torch.equal((experts_TK >= 0).sum(1), batch.need_T)
    assert close(torch.bincount(experts_TK[experts_TK >= 0]), torch.full((16,), 1 / 16))
    for token in range(6):
        maps = [task.maps_CDD[expert] for expert in experts_TK[token].tolist() if expert >= 0]
        expected_D = sum(one @ batch.x[token] for one in maps) / len(maps)
        torch.testing.assert_close(batch.target[token], expected_D)
    received_GS = task.attention(batch).view(-1, 32, 32)[:, 5]
    torch.testing.assert_close(received_GS.sum(1), torch.ones(len(received_GS)))
    ratio_GS = received_GS / batch.need_T.view(-1, 32)
    torch.testing.assert_close(ratio_GS, ratio_GS[:, :1].expand(-1, 32))


@pytest.mark.full
def test_ideal_routing_to_two_of_the_components_leaves_a_fifth_of_the_regret():
    class Two(Need):
        def oracle(self, batch):
            return super().oracle(batch)[:, :2]

    oracle, blind, two = (
        Run(cls(0), RouterChoice(control), 0.03).outcome().loss
        for cls, control in ((Need, "oracle"), (Need, "blind"), (Two, "oracle"))
    )
    assert (two - oracle) / (blind - oracle) == pytest.approx(0.2, abs=0.04)


def test_drift_turns_the_frequencies_at_half_time():
    task = Drift(0)
    early_C = torch.tensor([0.245] * 4 + [0.005] * 4)
    assert close(share_of_domains(drawn(task, progress=0.0)), early_C)
    assert close(share_of_domains(drawn(task, progress=0.499)), early_C)
    late = drawn(task, progress=0.5)
    assert close(share_of_domains(late), early_C.flip(0))
    assert close(share_of_domains(drawn(task, progress=1.0)), early_C.flip(0))
    assert torch.equal(task.domain_V[late.token_ids_T], late.domain_T)


def test_sub_domains_are_close_and_differ_little():
    task = Hierarchy(0)
    distance_CC = torch.cdist(task.centers_CD, task.centers_CD)
    torch.testing.assert_close(distance_CC[0, 1], torch.tensor(2.4))
    torch.testing.assert_close(distance_CC[0, 2], torch.tensor(math.sqrt(2 * (2.5**2 + 1.2**2))))
    unlike_CC = (task.maps_CDD.unsqueeze(0) - task.maps_CDD.unsqueeze(1)).flatten(2).norm(dim=2)
    assert (unlike_CC[::2, 1::2].diagonal() < 0.6 * unlike_CC[0, 2]).all()
    batch = drawn(task)
    nearest_T = torch.cdist(batch.x, task.centers_CD).argmin(1)
    same_super_T = task.super_domain(nearest_T) == task.super_domain(batch.domain_T)
    wrong = int((same_super_T & (nearest_T != batch.domain_T)).sum())
    beyond = 0.5 * math.erfc(1.2 / 0.7 / math.sqrt(2))
    assert close([wrong, int(same_super_T.sum()) - wrong], [beyond, 1 - beyond])


def test_half_of_the_tokens_are_noise_as_long_as_the_others_with_target_zero():
    batch = drawn(Noise(0))
    noise_T = batch.domain_T < 0
    assert close([int(noise_T.sum()), int((~noise_T).sum())], [0.5, 0.5])
    assert not batch.target[noise_T].any()
    length_T = batch.x.square().sum(1)
    expected = 0.7**2 * 32 + 2.5**2
    assert abs(length_T[noise_T].mean() - expected) < 0.5
    assert abs(length_T[~noise_T].mean() - expected) < 0.5


def test_the_entropy_rate_of_markov_languages_is_that_of_the_stream():
    task = Markov(0)
    stationary_CV, transitions_CVW = task.stationary_CV, task.transitions_CVW
    torch.testing.assert_close(torch.einsum("cv,cvw->cw", stationary_CV, transitions_CVW), stationary_CV)
    torch.testing.assert_close(stationary_CV.sum(1), torch.ones(8).double())
    batch = drawn(task, 2 * TOKENS)
    bits_T = -task.log2_CVW[batch.domain_T, batch.x, batch.target]
    # Sequences are independent, tokens of one sequence are not.
    of_sequences_G = bits_T.view(-1, task.sequence_length).mean(1)
    error = of_sequences_G.std() / math.sqrt(len(of_sequences_G))
    assert abs(of_sequences_G.mean() - task.entropy_rate) < 4 * error
    assert task.entropy_rate == pytest.approx(2, abs=0.2)
    assert error < 0.03
    chain_GS, next_GS = batch.x.view(-1, 32), batch.target.view(-1, 32)
    assert torch.equal(chain_GS[:, 1:], next_GS[:, :-1])
    assert torch.equal(batch.token_ids_T, batch.x)
    of_language_0 = batch.x[batch.domain_T == 0]
    heavy_V = stationary_CV[0] > 0.02
    counts_V = torch.bincount(of_language_0, minlength=32)[heavy_V] / len(of_language_0)
    assert (counts_V - stationary_CV[0][heavy_V]).abs().max() < 0.05


def test_the_loss_of_markov_languages_is_the_excess_over_a_predictor_that_knows_the_language():
    task = Markov(0)
    batch = drawn(task, TOKENS)
    natural_CVW = task.transitions_CVW.log().float()
    known_T = task.token_losses(natural_CVW[batch.domain_T, batch.x], batch)
    assert known_T.abs().max() < 1e-4
    # A predictor that knows all languages and infers which one it reads.
    rows_GSC = task.transitions_CVW[:, batch.x, batch.target].T.view(-1, 32, 8)
    start_GC = task.stationary_CV[:, batch.x.view(-1, 32)[:, 0]].T.unsqueeze(1)
    seen_GSC = torch.cat([start_GC, rows_GSC], 1).log().cumsum(1).softmax(-1)[:, :-1]
    mixed_TV = torch.einsum("tc,ctw->tw", seen_GSC.flatten(0, 1), task.transitions_CVW[:, batch.x])
    excess = task.token_losses(mixed_TV.log().float(), batch).mean()
    assert 0 < excess < math.log2(8) / 32


def test_the_decoder_of_markov_languages_is_causal():
    task = Markov(0)
    model = build(task, RouterChoice("LinearRouter")).eval()
    ids_T = drawn(task, 64).x
    changed_T = ids_T.clone()
    changed_T[20] = (changed_T[20] + 1) % task.vocab_size
    before, after = model(ids_T, RoutingContext()), model(changed_T, RoutingContext())
    assert torch.equal(before[:20], after[:20])
    assert not torch.equal(before[20:32], after[20:32])
    assert torch.equal(before[32:], after[32:])


def test_a_quarter_of_an_image_shows_one_object():
    task = Patches(0)
    batch = drawn(task)
    quarters = batch.domain_T.view(-1, 2, 2, 2, 2).transpose(2, 3).flatten(3)
    assert (quarters == quarters[..., :1]).all()
    assert close(share_of_domains(batch), torch.full((8,), 1 / 8))
    x = batch.x.view(-1, 2, 2, 2, 2, 32).transpose(2, 3).flatten(3, 4)
    assert abs(x.var(dim=3).mean() - 0.7**2) < 0.01
    target = batch.target.view(-1, 2, 2, 2, 2, 32).transpose(2, 3).flatten(3, 4)
    assert torch.equal(target, target[..., :1, :].expand_as(target))


@pytest.mark.full
@pytest.mark.parametrize("name", EXACT)
def test_the_oracle_is_far_better_than_blind_and_a_learned_router_between(name):
    cls = task_class(name)
    losses = {
        router: Run(cls(0), RouterChoice(router), 0.01).outcome().loss
        for router in ("oracle", "blind", "SimilarityRouter" if name == "context" else "LinearRouter")
    }
    oracle, blind, between = losses.values()
    assert 3 * oracle < blind or (name == "patches" and 1.5 * oracle < blind)
    assert oracle < between < oracle + 0.9 * (blind - oracle)
