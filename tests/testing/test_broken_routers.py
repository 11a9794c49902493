"""The kit itself: each broken router is caught by the check that should catch it."""

import sys
from functools import partial
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from routerzoo import LinearRouter, Router, Routing
from routerzoo.functional.gate import gate_linear
from routerzoo.functional.losses import balance_loss, masked_mean
from routerzoo.functional.topk import topk_softmax
from routerzoo.testing import CHECKS, RouterCheckError, check_router


class Sound(Router):
    """A linear gate in which nothing is wrong; the broken ones below differ from it in one thing."""

    paper = "none"
    normalized = True
    trains_at_top_1 = False

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model))

    def logits(self, x_TD, context):
        return gate_linear(x_TD, self.weight)

    def chosen(self, logits_TE):
        return topk_softmax(logits_TE, self.top_k)

    def route(self, x_TD, context):
        logits_TE = self.logits(x_TD, context)
        weights_TK, experts_TK = self.chosen(logits_TE)
        return Routing(experts_TK, weights_TK, logits_TE)


class WithoutPaper(Sound):
    """Says nothing of its origin."""

    paper = ""


class PositionalArguments(Sound):
    """Its own argument has no name in configs."""

    def __init__(self, spec, top_k: int = 2):
        super().__init__(spec, top_k=top_k)


class PropertyThatIsNone(Sound):
    """Does not know whether it is causal."""

    causal = None


class WeightOfNoLoss(Sound):
    """Names a coefficient for a loss that it does not have."""

    default_loss_weights = MappingProxyType({"distillation": 0.3})


class Float64Weights(Sound):
    """Answers past the base class, in another dtype."""

    def forward(self, x_TD, context=None):
        routing = super().forward(x_TD, context)
        return Routing(routing.experts_TK, routing.weights_TK.double(), routing.logits_TE)


class FailsWithoutTokens(Sound):
    """Takes a maximum over nothing."""

    def route(self, x_TD, context):
        x_TD.abs().max()
        return super().route(x_TD, context)


class SumsToTwo(Sound):
    """Declares normalized, and doubles its weights."""

    def chosen(self, logits_TE):
        weights_TK, experts_TK = super().chosen(logits_TE)
        return 2 * weights_TK, experts_TK


class NegativeWeights(Sound):
    """Weights of both signs, not declared."""

    normalized = False
    trains_at_top_1 = True

    def chosen(self, logits_TE):
        _, experts_TK = super().chosen(logits_TE)
        return logits_TE.gather(1, experts_TK).tanh(), experts_TK


class WeightOfNoExpert(Sound):
    """Drops a choice, and keeps its weight."""

    def chosen(self, logits_TE):
        weights_TK, experts_TK = super().chosen(logits_TE)
        return weights_TK, torch.where(weights_TK < 0.3, -1, experts_TK)


class PromisesNoPadding(Sound):
    """Drops a choice, and says that it never does."""

    normalized = False

    def route(self, x_TD, context):
        routing = super().route(x_TD, context)
        drop_TK = routing.weights_TK < 0.3
        return Routing(
            routing.experts_TK.masked_fill(drop_TK, -1),
            routing.weights_TK.masked_fill(drop_TK, 0),
            routing.logits_TE,
            may_drop=False,
        )


class ChoosesTwice(Sound):
    """Sends a token to the same expert twice."""

    def chosen(self, logits_TE):
        weights_TK, experts_TK = super().chosen(logits_TE)
        return weights_TK, experts_TK[:, :1].expand_as(experts_TK).contiguous()


class NoisyInEvaluation(Sound):
    """Forgets to ask whether it is training."""

    def logits(self, x_TD, context):
        return super().logits(x_TD, context) + torch.randn(len(x_TD), self.spec.num_experts)


class RemembersCalls(Sound):
    """Writes in `forward` what later calls read."""

    count = 0

    def logits(self, x_TD, context):
        self.count += 1
        return super().logits(x_TD, context).roll(self.count, 1)


class SharedState(Sound):
    """Keeps on the class what belongs to the instance."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        type(self).shared = torch.randn(spec.num_experts)

    def logits(self, x_TD, context):
        return super().logits(x_TD, context) + type(self).shared


class Reseeds(Sound):
    """Makes itself reproducible at everybody's cost."""

    def __init__(self, spec, *, top_k: int = 2):
        torch.manual_seed(42)
        super().__init__(spec, top_k=top_k)


class WritesIntoItsInput(Sound):
    """Normalizes the hidden states in place, for the experts too."""

    def logits(self, x_TD, context):
        return super().logits(x_TD.detach().mul_(0.5), context)


class BatchOrderCapacity(Sound):
    """Lets each expert take a third of the batch's choices, in the order of the batch: causal, and not independent."""

    tokenwise = False

    def route(self, x_TD, context):
        routing = super().route(x_TD, context)
        chosen = F.one_hot(routing.experts_TK, self.spec.num_experts).flatten(0, 1)
        place = (chosen.cumsum(0) * chosen).sum(-1).view_as(routing.experts_TK)
        drop = place > max(len(x_TD) * self.top_k // 3, 1)
        return Routing(routing.experts_TK.masked_fill(drop, -1), routing.weights_TK.masked_fill(drop, 0))

    normalized = False


class LooksAhead(Sound):
    """Mixes in the mean of its sequence."""

    tokenwise = False

    def logits(self, x_TD, context):
        sums_TD = torch.zeros_like(x_TD).index_add(0, context.sequence_ids, x_TD)
        return super().logits(x_TD + sums_TD[context.sequence_ids], context)

    requires = frozenset({"sequence_ids"})


class LooksAheadInTraining(LooksAhead):
    """The same, in training alone, and declares nothing."""

    def logits(self, x_TD, context):
        return super().logits(x_TD, context) if self.training else Sound.logits(self, x_TD, context)


class NeedlesslyNotCausal(Sound):
    """Declares less than it is."""

    causal = False
    tokenwise = False


class BatchStatistics(Sound):
    """Centers its logits over the batch."""

    causal = False
    tokenwise = False

    def logits(self, x_TD, context):
        logits_TE = super().logits(x_TD, context)
        return logits_TE - 2 * logits_TE.sum(0) / max(len(x_TD), 1)


class PlaceInTheBatch(Sound):
    """Hashes the place of a token in the batch (as CustomHashGate of several repositories)."""

    def logits(self, x_TD, context):
        place_T = torch.arange(len(x_TD)) % self.spec.num_experts
        return super().logits(x_TD, context) + 100.0 * F.one_hot(place_T, self.spec.num_experts)


class CountsPadding(Sound):
    """Takes its loss over padded tokens too, and multiplies it with its coefficient, of ReMoE's size."""

    def route(self, x_TD, context):
        routing = super().route(x_TD, context)
        loss = 1e-8 * balance_loss(routing.logits_TE.softmax(-1), routing.experts_TK)
        return Routing(routing.experts_TK, routing.weights_TK, routing.logits_TE, {"balance": loss})


class CountsPaddingInStatistics(Sound):
    """Counts the logits of padded tokens."""

    needs_updates = True

    def statistics(self, routing, context):
        return {"sum_E": routing.logits_TE.sum(0)}


class BalancesEachProcess(Sound):
    """Balances the tokens of each process by themselves."""

    def route(self, x_TD, context):
        routing = super().route(x_TD, context)
        loss = balance_loss(routing.logits_TE.softmax(-1), routing.experts_TK, padding_mask=context.padding_mask)
        return Routing(routing.experts_TK, routing.weights_TK, routing.logits_TE, {"balance": loss})


class BalancesAllProcesses(Sound):
    """Balances the tokens of all processes together: nothing is wrong."""

    def route(self, x_TD, context):
        routing = super().route(x_TD, context)
        probs_TE, group = routing.logits_TE.softmax(-1), context.process_group
        loss = balance_loss(probs_TE, routing.experts_TK, padding_mask=context.padding_mask, process_group=group)
        return Routing(routing.experts_TK, routing.weights_TK, routing.logits_TE, {"balance": loss})


class Adapting(Sound):
    """Multiplies a coefficient of ReMoE's size by 1.2 where the load is uneven; nothing is wrong."""

    needs_updates = True
    trained_buffers = frozenset({"coefficient"})

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.register_buffer("coefficient", torch.tensor(1e-8))

    def route(self, x_TD, context):
        routing = super().route(x_TD, context)
        loss = self.coefficient * masked_mean(routing.logits_TE.square().mean(-1), context.padding_mask)
        return Routing(routing.experts_TK, routing.weights_TK, routing.logits_TE, {"l2": loss})

    def statistics(self, routing, context):
        return {"load_E": routing.expert_load(self.spec.num_experts)}

    def update(self, statistics):
        load_E = statistics["load_E"]
        self.coefficient = self.coefficient * (1.2 if load_E.max() > load_E.mean() else 1 / 1.2)


class LosesItsCoefficient(Adapting):
    """Leaves the coefficient out of the checkpoint."""

    trained_buffers = frozenset({"coefficient"})

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.register_buffer("coefficient", torch.tensor(1e-8), persistent=False)


class CoefficientIsAnAttribute(Adapting):
    """Keeps the coefficient in a plain tensor."""

    trained_buffers = frozenset()

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        del self.coefficient
        self.coefficient = torch.tensor(1e-8)


class StopsAdaptingLate(Adapting):
    """Counts its updates in a plain integer, which matters from the 10th on."""

    updates = 0

    def update(self, statistics):
        self.updates += 1
        if self.updates <= 10:
            super().update(statistics)


class SignsOfABatch(Adapting):
    """Centers its logits over the batch, and votes for each micro-batch."""

    causal = batch_independent = tokenwise = False

    def logits(self, x_TD, context):
        logits_TE = super().logits(x_TD, context)
        return logits_TE - 2 * logits_TE.sum(0) / max(len(x_TD), 1)

    def statistics(self, routing, context):
        load_E = routing.expert_load(self.spec.num_experts)
        return {"votes_E": (load_E.mean() - load_E).sign()}

    def update(self, statistics):
        self.coefficient = self.coefficient * (1.2 if statistics["votes_E"].max() > 0 else 1 / 1.2)


class AdaptsInRoute(Adapting):
    """Moves the coefficient in the forward pass."""

    def route(self, x_TD, context):
        routing = super().route(x_TD, context)
        if self.training and not self.is_frozen:
            self.coefficient = self.coefficient * 1.2
        return routing

    def update(self, statistics):
        pass


class AdaptsAnAttributeInRoute(AdaptsInRoute):
    """Counts passes in an attribute, and moves something once in a hundred of them."""

    passes = 0

    def route(self, x_TD, context):
        self.passes += 1
        return Adapting.route(self, x_TD, context)


class AdaptsInRouteThoughFrozen(AdaptsInRoute):
    """Moves the coefficient in the forward pass, frozen or not."""

    def route(self, x_TD, context):
        self.coefficient = self.coefficient * 1.2
        return Adapting.route(self, x_TD, context)


class AdaptsThoughFrozen(Adapting):
    """Freezes parameters alone."""

    def freeze(self):
        self.requires_grad_(False)


class LearnsThoughFrozen(Sound):
    """Freezes nothing."""

    def freeze(self):
        self.is_frozen = True


class AdaptsPerMicroBatch(Adapting):
    """Moves the coefficient by each micro-batch."""

    def statistics(self, routing, context):
        super().update(super().statistics(routing, context))
        return {}

    def update(self, statistics):
        pass


class MeanStatistics(Adapting):
    """Returns means where sums are added up."""

    def statistics(self, routing, context):
        load_E = super().statistics(routing, context)["load_E"]
        return {"load_E": load_E / load_E.sum().clamp_min(1)}


class UpdatesThatNobodyCalls(Adapting):
    """Does not say that it needs updates."""

    needs_updates = False


class TableOutsideTheState(Sound):
    """Its random table is a plain attribute (as ParlAI's hash layer)."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.table = torch.randn(spec.num_experts)

    def logits(self, x_TD, context):
        return super().logits(x_TD, context) + self.table


class StageOutsideTheState(Sound):
    """Its stage is a plain attribute (as StableMoE's code)."""

    late = False

    needs_updates = True

    def begin_step(self, step, total_steps):
        self.late = step > total_steps // 2

    def logits(self, x_TD, context):
        return super().logits(x_TD, context) * (-1 if self.late else 1)


class StateOfADict(Sound):
    """Keeps a dict in its state (as the first edition of routerzoo)."""

    def get_extra_state(self):
        return {"k": self.top_k}

    def set_extra_state(self, state):
        pass


class StateThatIsNotContiguous(Sound):
    """Keeps a transposed tensor, which safetensors refuses."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.register_buffer("table", torch.randn(3, 5).T)


class StateThatSharesMemory(Sound):
    """Keeps two views of one tensor, which safetensors refuses."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        table = torch.randn(2, 5)
        self.register_buffer("first", table[0])
        self.register_buffer("second", table[1])


class ResetsItsWeightAlone(Sound):
    """Forgets its table in `reset_parameters`."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.register_buffer("table", torch.randn(spec.num_experts))

    def reset_parameters(self):
        nn.init.normal_(self.weight)


class LosesStateWhenCopied(Sound):
    """A copy starts from 0."""

    def __getstate__(self):
        state = dict(self.__dict__)
        state["_parameters"] = {name: nn.Parameter(torch.zeros_like(p)) for name, p in self._parameters.items()}
        return state


class DriftingBuffer(Sound):
    """Its buffer follows the batches, undeclared."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.register_buffer("mean", torch.zeros(spec.num_experts))

    needs_updates = True

    def update(self, statistics):
        self.mean += 1


class MomentumMovesTheFrozen(Sound):
    """Stops training a parameter, and leaves it to the optimizer's momentum."""

    needs_updates = True

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.extra = nn.Parameter(torch.randn(spec.num_experts))
        self.store_int("late", 0)

    def begin_step(self, step, total_steps):
        self.store_int("late", int(step > total_steps // 2))

    def logits(self, x_TD, context):
        return super().logits(x_TD, context) + (self.extra.detach() if self.stored_int("late") else self.extra)


class DeadParameter(Sound):
    """Has a parameter that nothing trains."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.unused = nn.Parameter(torch.zeros(3))


class LearnsUndeclared(Sound):
    """Declares that it does not learn."""

    trainable = False


class DeclaresTop1(Sound):
    """Says that it learns at k = 1, where its weight is always 1."""

    trains_at_top_1 = True


class RoutesInBfloat16(Sound):
    """Overrides `forward`, so that autocast reaches its gate."""

    def forward(self, x_TD, context=None):
        routing = self.route(x_TD.to(self.weight.dtype), context)
        return Routing(routing.experts_TK, routing.weights_TK.to(x_TD.dtype), routing.logits_TE)


class RoundsItsGate(Sound):
    """Multiplies in bfloat16, whatever it is given, and answers in float32."""

    def logits(self, x_TD, context):
        return (x_TD.bfloat16() @ self.weight.T.bfloat16()).to(torch.promote_types(x_TD.dtype, torch.float32))


class DrawsIn16Bits(Sound):
    """Decomposes what it draws in the default dtype."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        nn.init.orthogonal_(self.weight)


class RoutesInTheAssignedDtype(Sound):
    """Overrides `forward`, so that nothing makes its parameters float32."""

    def forward(self, x_TD, context=None):
        with torch.autocast("cpu", enabled=False):
            logits_TE = F.linear(x_TD.to(self.weight.dtype), self.weight).float()
        weights_TK, experts_TK = self.chosen(logits_TE)
        return Routing(experts_TK, weights_TK.to(x_TD.dtype), logits_TE)


class ReadsTheParameterItWasBuiltWith(Sound):
    """Keeps a reference to its parameter, which assigning replaces."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=top_k)
        self.kept = [self.weight]

    def logits(self, x_TD, context):
        return gate_linear(x_TD, self.kept[0])


class Overflows(Sound):
    """Takes exponents of logits as they are."""

    def chosen(self, logits_TE):
        scores_TE = logits_TE.exp()
        scores_TK, experts_TK = (scores_TE / scores_TE.sum(-1, keepdim=True)).topk(self.top_k)
        return scores_TK / scores_TK.sum(-1, keepdim=True), experts_TK


class HidesNaN(Sound):
    """Routes broken tokens as if they were 0."""

    def logits(self, x_TD, context):
        return super().logits(x_TD, context).nan_to_num()


class ReadsUndeclared(Sound):
    """Reads token ids, and does not say so."""

    def logits(self, x_TD, context):
        logits_TE = super().logits(x_TD, context)
        return (
            logits_TE
            if context.token_ids is None
            else logits_TE + context.token_ids.unsqueeze(1) % 3 * self.weight[:, 0]
        )


class RequiresNothingOfIt(Sound):
    """Requires what it never reads, and takes its absence."""

    requires = frozenset({"positions"})

    def forward(self, x_TD, context=None):
        self.__dict__["requires"] = frozenset()
        try:
            return super().forward(x_TD, context)
        finally:
            del self.__dict__["requires"]


class TakesAnyK(Sound):
    """Clips k instead of refusing it."""

    def __init__(self, spec, *, top_k: int = 2):
        super().__init__(spec, top_k=max(1, min(top_k, spec.num_experts)))


class CountsCallsInTraining(Sound):
    """Every call in training changes the next, so that recomputation gives other gradients."""

    scale = 1.0

    def logits(self, x_TD, context):
        if self.training:
            self.scale *= 1.5
        return super().logits(x_TD, context) * self.scale


class BreaksTheGraph(Sound):
    """Branches on the value of a tensor."""

    def logits(self, x_TD, context):
        logits_TE = super().logits(x_TD, context)
        return logits_TE * 2 if float(logits_TE.detach().sum()) == 0.5 else logits_TE


class ChoosesOtherwise(Sound):
    """Tells policies that it would take the worst experts."""

    def select_experts(self, logits_TE):
        return (-logits_TE).topk(self.top_k, dim=-1).indices


class WeighsOtherwise(Sound):
    """Tells policies other weights than it gives."""

    def combine_weights(self, logits_TE, experts_TK):
        return torch.full(experts_TK.shape, 0.25).masked_fill(experts_TK < 0, 0.0)


class TakesWhatIsRuledOut(Sound):
    """Takes minus infinity for the largest logit."""

    def select_experts(self, logits_TE):
        return logits_TE.masked_fill(logits_TE == -torch.inf, 1e9).topk(self.top_k, dim=-1).indices


class FlagBesideALevel(Sound):
    """Says in a flag whether what training measures holds: an averaged model averages them apart."""

    trained_buffers = frozenset({"level", "is_known"})

    def __init__(self, spec, *, top_k=2):
        super().__init__(spec, top_k=top_k)
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("is_known", torch.tensor(False))


BROKEN = {
    WithoutPaper: ("declaration", "paper is empty"),
    FlagBesideALevel: ("frozen", "trained_buffers names a flag beside other buffers"),
    PositionalArguments: ("declaration", "(spec, *, keywords)"),
    PropertyThatIsNone: ("declaration", "causal is None; a property is a bool or a ByMode"),
    WeightOfNoLoss: ("declaration", "default_loss_weights names a loss that it has no loss 'distillation'"),
    UpdatesThatNobodyCalls: ("declaration", "implements statistics and update, which nobody calls"),
    Float64Weights: ("output", "weights are torch.float64 where the hidden states are torch.float32"),
    FailsWithoutTokens: ("output", "with {'length': 0} in training: RuntimeError"),
    SumsToTwo: ("weights", "the weights of token 0 sum to 2"),
    NegativeWeights: ("weights", "declares nonnegative, but has the weight -"),
    WeightOfNoExpert: ("choices", "gives a choice of -1 (no expert) a weight other than 0"),
    PromisesNoPadding: ("choices", "promises may_drop=False, but selects expert -1"),
    ChoosesTwice: ("choices", "selects expert 0 2 times"),
    NoisyInEvaluation: ("deterministic", "advances the global random state in evaluation"),
    RemembersCalls: ("deterministic", "the second time in evaluation"),
    SharedState: ("isolated", "after another router was built and used"),
    Reseeds: ("isolated", "reseeds the global random state"),
    WritesIntoItsInput: ("isolated", "writes into the hidden states that it is given"),
    BatchOrderCapacity: ("batch_independent", "declares batch_independent, but in training other sequences change"),
    LooksAhead: ("causal", "declares causal, but in training later tokens change"),
    LooksAheadInTraining: ("causal", "declares causal, but in training later tokens change"),
    NeedlesslyNotCausal: ("causal", "declare causal = True"),
    BatchStatistics: ("batch_independent", "declares batch_independent, but in training other sequences change"),
    PlaceInTheBatch: ("tokenwise", "differently when it is alone"),
    CountsPadding: ("padding", "the loss 'balance' depends on what stands at padded places"),
    CountsPaddingInStatistics: ("padding", "the statistic 'sum_E' depends on what stands at padded places"),
    TableOutsideTheState: ("state_dict", "loaded into a router built with another seed, routes differently"),
    StageOutsideTheState: ("state_dict", "loaded into a router built with another seed, routes differently"),
    StateOfADict: ("state_dict", "the state_dict holds _extra_state, a dict: keep state in tensors"),
    StateThatIsNotContiguous: ("state_dict", "table in the state_dict is not contiguous"),
    StateThatSharesMemory: ("state_dict", "first and second in the state_dict share memory"),
    ResetsItsWeightAlone: ("reset_parameters", "is not what the constructor draws from the same seed"),
    LosesStateWhenCopied: ("copies", "a copy routes differently"),
    LosesItsCoefficient: (
        "resume",
        "it has another loss 'l2' than after 2 steps: keep all that adapts in the state_dict",
    ),
    CoefficientIsAnAttribute: ("resume", "it has another loss 'l2' than after 2 steps"),
    StopsAdaptingLate: (
        "resume",
        "the attribute updates is 1, and 2 after 2 steps: keep it by `store_int`, or in a buffer",
    ),
    AdaptsInRoute: ("stateless", "changes coefficient in a forward pass in training: return sums from `statistics`"),
    AdaptsAnAttributeInRoute: ("stateless", "changes passes in a forward pass in training"),
    AdaptsPerMicroBatch: (
        "accumulation",
        "over one batch of both: move it in `update`, by sums over tokens",
    ),
    MeanStatistics: ("processes", "the statistic 'load_E' of a batch is not the sum of its halves'"),
    SignsOfABatch: ("processes", "the statistic 'votes_E' of a batch is not the sum of its halves'"),
    BalancesEachProcess: ("processes", "the loss 'balance' of a batch is not the mean of its halves'"),
    DriftingBuffer: ("frozen", "mean is frozen, but changed"),
    MomentumMovesTheFrozen: (
        "frozen",
        "extra is no longer trained at the end of training, but the optimizer still moves it",
    ),
    AdaptsInRouteThoughFrozen: ("freeze", "changes coefficient after freeze(): adapt in `update` alone"),
    AdaptsThoughFrozen: ("freeze", "changes coefficient after freeze()"),
    LearnsThoughFrozen: ("freeze", "weight learns after freeze(): call `super().freeze()`"),
    DeadParameter: ("gradients", "no gradient reaches unused"),
    LearnsUndeclared: ("gradients", "declares trainable = False, but weight require"),
    DeclaresTop1: ("gradient_at_top_1", "the largest gradient at k = 1 is 0"),
    RoutesInBfloat16: ("float32_scores", "logits are torch.bfloat16 under autocast"),
    DrawsIn16Bits: ("default_dtype", "raises NotImplementedError under the default dtype torch.bfloat16"),
    RoundsItsGate: ("float32_scores", "rounds float32 hidden states to 16 bits in training (aten._to_copy"),
    RoutesInTheAssignedDtype: ("assigned_bfloat16", "parameters that were assigned in bfloat16 are not computed with"),
    ReadsTheParameterItWasBuiltWith: ("assigned_bfloat16", "parameters that were assigned in bfloat16"),
    Overflows: ("extremes", "weights are not finite for hidden states around 1e15"),
    HidesNaN: ("nan", "routes a token whose hidden state is NaN as if nothing were wrong"),
    ReadsUndeclared: ("requirements", "reads fields of the context that it does not require"),
    RequiresNothingOfIt: ("requirements", "requires positions, but routes without it"),
    TakesAnyK: ("top_k", "accepts top_k = 0"),
    CountsCallsInTraining: ("recomputation", "the gradient of weight differs"),
    ChoosesOtherwise: ("selection", "select_experts(logits) returns other experts than route"),
    WeighsOtherwise: ("selection", "combine_weights(logits, experts) gives other weights than route"),
    TakesWhatIsRuledOut: ("selection", "whose logit is minus infinity"),
    BreaksTheGraph: ("compiles", "does not compile in training"),
}


def test_every_check_has_a_router_that_breaks_it():
    assert {check for check, _ in BROKEN.values()} == set(CHECKS)


@pytest.mark.full
@pytest.mark.parametrize("router", [Sound, Adapting, BalancesAllProcesses], ids=lambda router: router.__name__)
def test_nothing_is_wrong_with_the_sound_ones(router):
    check_router(router)


@pytest.mark.parametrize("router", BROKEN, ids=lambda router: router.__name__)
def test_a_broken_router_is_caught_by_its_check(router):
    check, told = BROKEN[router]
    with pytest.raises(RouterCheckError) as caught:
        check_router(router, only=[check])
    (failure,) = caught.value.failures
    assert failure.check == check
    assert told in failure.failure
    message = str(caught.value)
    assert message.startswith(f"{router.__name__} fails 1 check.")
    assert f"help(routerzoo.testing.CHECKS['{failure.check}'])" in message


def test_capacity_in_the_order_of_the_batch_is_causal_all_the_same():
    check_router(BatchOrderCapacity, only=["causal"])


def test_a_failure_names_the_check_the_token_and_the_smallest_sizes():
    with pytest.raises(RouterCheckError) as caught:
        check_router(LooksAhead, only=["causal"])
    message = str(caught.value)
    assert "declares causal, but in training later tokens change a token's routing (first at token" in message
    assert "[num_experts=2, top_k=1, d_model=4, num_sequences=1, length=2, " in message
    assert "declare `causal = ByMode(training=False)`" in message


def test_all_failures_are_told_at_once():
    class SumsToTwoWithoutPaper(SumsToTwo):
        """Two things are wrong."""

        paper = ""

    with pytest.raises(RouterCheckError, match=f"fails 2 of {len(CHECKS)} checks") as caught:
        check_router(SumsToTwoWithoutPaper, only=["declaration", "weights"])
    assert [failure.check for failure in caught.value.failures] == ["declaration", "weights"]


def test_factories_are_taken_as_classes_are():
    few = ["declaration", "top_k", "weights", "gradients"]
    check_router(partial(LinearRouter, score="sigmoid", bias=True), only=few)
    check_router(lambda spec: LinearRouter(spec, top_k=min(2, spec.num_experts), noisy=True), only=few)


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="no check is called caucal; there are declaration, output"):
        check_router(Sound, only=["caucal"])


def test_without_hypothesis_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"pip install 'routerzoo\[testing\]'"):
        check_router(Sound)
    from routerzoo.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(["check", "HashRouter"])
    assert stopped.value.code == 2


def test_a_router_that_refuses_every_size_is_told_so():
    class Choosy(Sound):
        """Takes no sizes."""

        def __init__(self, spec, *, top_k: int = 2):
            raise ValueError(f"never {spec.num_experts} experts")

    with pytest.raises(RouterCheckError, match="refuses all sizes that were tried, at last with: never"):
        check_router(Choosy, only=["weights"])


def test_the_command_shows_every_check_and_fails_where_one_fails(capsys, monkeypatch):
    from routerzoo.__main__ import main

    main(["check", "HashRouter", "--examples", "1"])
    shown = capsys.readouterr().out
    assert all(check in shown for check in CHECKS)
    assert f"HashRouter passes all {len(CHECKS)} checks" in shown
    monkeypatch.setattr(LinearRouter, "paper", "")
    with pytest.raises(SystemExit) as stopped:
        main(["check", "LinearRouter", "--examples", "1"])
    assert stopped.value.code == 1
    assert "LinearRouter.paper is empty" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["check", "LinearRuoter"])
    assert "did you mean 'LinearRouter'?" in capsys.readouterr().err
