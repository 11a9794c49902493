"""What torchmetrics' own tests check of a metric, of every metric."""

import copy
import io
import pickle
import socket
import warnings
from dataclasses import fields as fields_of
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from torch import nn
from torchmetrics import MetricCollection

from routerzoo import Routing, metrics
from tests.metrics.cases import CASES


def assert_equal(result, expected, rtol=1e-5, atol=1e-6):
    if isinstance(expected, dict):
        assert set(result) == set(expected)
        for name in expected:
            assert_equal(result[name], expected[name], rtol, atol)
        return
    result = result.double().cpu().numpy()
    assert result.size == np.size(expected)
    np.testing.assert_allclose(result.reshape(np.shape(expected)), expected, rtol, atol, equal_nan=True)


@pytest.fixture(params=sorted(CASES))
def name(request):
    return request.param


@pytest.fixture
def case(name):
    return CASES[name]


@pytest.fixture
def all_batches(case):
    return case.expected(list(case.batches))


def test_every_metric_is_here():
    assert set(CASES) == set(metrics.__all__) - {"expert_sets"}


@pytest.mark.parametrize("options", [{}, {"compute_on_cpu": True}, {"compute_with_cache": False}])
def test_values_of_each_batch_and_of_all(case, all_batches, options):
    metric = case.build(**options)
    for place, given in enumerate(case.batches):
        result = metric(*case.update(place, given))
        seen = list(case.batches[: place + 1]) if case.cumulative else [given]
        assert_equal(result, case.expected(seen))
        assert_equal(metric._forward_cache, case.expected(seen))
        assert metric.update_count == place + 1
    assert_equal(metric.compute(), all_batches)
    assert_equal(case.whole(**options).compute(), all_batches)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_continue_by_themselves(case, all_batches, carry):
    metric = case.updated(case.build(), range(2))
    other = carry(metric)
    assert_equal(case.updated(other, range(2, 4)).compute(), all_batches)
    assert_equal(metric.compute(), case.expected(list(case.batches[:2])))
    assert hash(metric) != hash(other)


def test_state_dicts(case, all_batches):
    metric = case.updated(case.build(), range(2))
    assert metric.state_dict() == {}
    metric.persistent(True)
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"metric": metric}).state_dict(), file)
    file.seek(0)
    loaded = case.build()
    nn.ModuleDict({"metric": loaded}).load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert_equal(case.updated(loaded, range(2, 4)).compute(), all_batches)


def test_merging(case, all_batches):
    one, other = case.updated(case.build(), range(1)), case.updated(case.build(), range(1, 4))
    if case.cumulative:
        with pytest.raises(RuntimeError, match="merge_state"):
            one.merge_state(other)
        return
    state = copy.deepcopy(one.metric_state)
    one.merge_state(other)
    other.merge_state(state)
    for metric in (one, other):
        result = metric.compute()
        if isinstance(result, dict) and "correlations_MM" in result:  # runs are in another order
            result["correlations_MM"], all_batches["correlations_MM"] = torch.zeros(1), 0
        assert_equal(result, all_batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_of_sums(case, all_batches, dtype):
    metric = case.updated(case.build().set_dtype(dtype), range(4))
    states = [s for state in metric.metric_state.values() for s in (state if isinstance(state, list) else [state])]
    assert {state.dtype for state in states if state.is_floating_point()} <= {dtype}
    tolerance = 1e-5 if dtype.itemsize > 2 else 0.1
    assert_equal(metric.compute(), all_batches, tolerance, tolerance)
    metric.reset()
    assert_equal(case.updated(metric, range(4)).compute(), all_batches, tolerance, tolerance)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float", "to"])
def test_a_model_of_another_dtype_leaves_sums_alone(case, all_batches, convert):
    metric = case.updated(case.build(), range(2))
    module = nn.ModuleDict({"metric": metric})
    module.to(torch.bfloat16) if convert == "to" else getattr(module, convert)()
    assert_equal(case.updated(metric, range(2, 4)).compute(), all_batches)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_inputs_of_other_dtypes_give_float32(case, all_batches, dtype):
    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, int) or value.logits_TE is None:
            return value
        return type(value)(value.experts_TK, value.weights_TK.to(dtype), value.logits_TE.to(dtype))

    metric = case.build()
    for place, given in enumerate(case.batches):
        metric.update(*map(cast, case.update(place, given)))
    result = metric.compute()
    tolerance = 1e-5 if dtype.itemsize > 2 else 0.02
    assert_equal(result, all_batches, tolerance, tolerance)
    floats = [v for v in (result.values() if isinstance(result, dict) else [result]) if v.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}


def requiring_grad(value):
    if isinstance(value, Routing):
        fields = {f.name: requiring_grad(getattr(value, f.name)) for f in fields_of(value)}
        return replace(value, **fields)
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.clone().requires_grad_() if floats else value


def assert_no_graph(result):
    for value in result.values() if isinstance(result, dict) else [result]:
        assert not value.requires_grad


def test_results_hold_no_graph(case):
    metric = case.build()
    assert_no_graph(metric(*map(requiring_grad, case.update(0, case.batches[0]))))
    metric.update(*map(requiring_grad, case.update(1, case.batches[1])))
    assert_no_graph(metric.compute())


def test_the_load_of_a_merged_routing_holds_no_graph():
    merge_GE = torch.rand(3, 4, requires_grad=True)
    assert_no_graph(metrics.ExpertLoad(4)(Routing(merge_GE=merge_GE, group_T=torch.tensor([0, 1, 2, 2]))))


def test_states_move_to_a_device(case):
    metric = case.whole().to("meta")
    for state in metric.metric_state.values():
        for tensor in state if isinstance(state, list) else [state]:
            assert tensor.device.type == "meta"
    metric.reset()
    assert metric.device.type == "meta"


def test_reset_starts_over(case, all_batches):
    metric = case.updated(case.build(), range(2))
    metric.compute()
    metric.reset()
    assert metric.update_count == 0
    for name, state in metric.metric_state.items():
        default = metric._defaults[name]
        assert state == [] if isinstance(default, list) else torch.equal(state, default)
    assert_equal(case.updated(metric, range(4)).compute(), all_batches)


def test_a_reset_in_inference_mode_leaves_it_usable(case, all_batches):
    metric = case.build()
    with torch.inference_mode():
        case.updated(metric, range(2)).compute()
        metric.reset()
    assert_equal(case.updated(metric, range(4)).compute(), all_batches)


def test_without_an_update_it_warns_and_has_a_value(name, case):
    with pytest.warns(UserWarning, match=f"method of metric {name} was called before the ``update``"):
        result = case.build().compute()
    expected = {
        "ExpertLoad": {"load_entropy": 1, "dead_experts": 4},
        "GateConfidence": {"active_experts": 0},
        "LastFluctuation": {},
        "CoActivation": {},
    }.get(name)
    if expected is None:
        values = result.values() if isinstance(result, dict) else [result]
        assert all(value.isnan().all() for value in values)
    for key, value in (expected or {}).items():
        assert result[key] == value


def test_what_torchmetrics_reads_is_constant(case):
    metric = case.build()
    for attribute in ("is_differentiable", "higher_is_better", "full_state_update", "plot_lower_bound"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, attribute, True)
    assert metric.is_differentiable is False
    assert metric.higher_is_better in (None, True, False)
    assert metric.plot_lower_bound is not None


def test_in_a_collection(name, case, all_batches):
    collection = MetricCollection({name: case.build()})
    for place, given in enumerate(case.batches):
        collection.update(*case.update(place, given))
    result = collection.compute()
    if isinstance(all_batches, dict):
        assert_equal(result, all_batches)
    else:
        assert_equal(result[name], all_batches)


def test_pictures(case, tmp_path):
    metric = case.build()
    results = [metric(*case.update(place, given)) for place, given in enumerate(case.batches)]
    for draw in ((), (metric.compute(),), (results[0],), (results,), (tuple(results),)):
        figure, axes = metric.plot(*draw)
        assert isinstance(figure, Figure)
        assert axes.figure is figure
        figure.savefig(tmp_path / "drawn.png", dpi=40)
    for draw in (None, results):
        own = Figure().subplots()
        figure, axes = metric.plot(draw, ax=own)
        assert (figure, axes) == (own.figure, own)
    assert matplotlib.pyplot.get_fignums() == []  # pyplot would keep them alive
    with pytest.raises(ValueError, match="has no result to draw: the list is empty"):
        metric.plot([])


def test_curves_hold_the_results():
    case = CASES["RoutingFluctuation"]
    metric = case.build()
    results = [metric(*case.update(place, given)) for place, given in enumerate(case.batches)]
    _, axes = metric.plot(results)
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    for label in ("fluctuation", "changed_tokens"):
        np.testing.assert_allclose(drawn[label], [float(result[label]) for result in results])
    _, axes = metric.plot(results[1])
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([float(v) for v in results[1].values()])
    assert axes.get_ylim()[0] == 0


def test_runs_of_different_sizes_are_refused():
    metric = metrics.InterRunConsistency()
    for load_E in (torch.ones(2, 4), torch.ones(0)):
        with pytest.raises(ValueError, match="expected the load of each expert of one run"):
            metric.update(load_E)
    other = metrics.InterRunConsistency()
    metric.update(torch.rand(4))
    other.update(torch.rand(8))
    metric.merge_state(other)
    with pytest.raises(ValueError, match="different numbers of experts, 8 at most"):
        metric.compute()


SHARES = {"some each": [(0, 1), (1, 4)], "one has none": [(0, 4), (4, 4)]}
"""Which of four batches each of two processes has."""


def of_process(case, first, last):
    """Return the case with the tokens of a process, and the places of its batches."""
    if not case.cumulative:
        return case, range(first, last)
    tokens = slice(first * 30 // 4, last * 30 // 4)
    return replace(case, batches=[experts[tokens] for experts in case.batches]), range(4 if last > first else 0)


def work(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    warnings.simplefilter("ignore")  # compute before update
    results = {}
    for name, case in CASES.items():
        for shares, bounds in SHARES.items():
            own, places = of_process(case, *bounds[rank])
            metric = own.updated(own.build(), places)
            results[name, shares] = metric.compute()
            metric._computed = None
            results[name, f"{shares}, again"] = metric.compute()  # its own state is back
        if case.cumulative:
            own, places = of_process(case, *SHARES["some each"][rank])
        else:
            own, places = case, range(rank, 4, 2)
        metric = own.build(dist_sync_on_step=True)
        results[name, "at each step"] = [metric(*own.update(place, own.batches[place])) for place in places]
    other = metrics.LastFluctuation(4)
    other.update(rank, CASES["LastFluctuation"].update(0, CASES["LastFluctuation"].batches[0])[1])
    try:
        other.compute()
    except ValueError as error:
        results["refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.full
@pytest.mark.parametrize("shares", [*SHARES, *(f"{shares}, again" for shares in SHARES)])
def test_two_processes_are_as_one(name, shares, all_batches, of_two_processes):
    for results in of_two_processes:
        assert_equal(results[name, shares], all_batches)


@pytest.mark.full
def test_forward_may_synchronize(name, case, of_two_processes):
    for results in of_two_processes:
        at_each_step = results[name, "at each step"]
        assert len(at_each_step) == (4 if case.cumulative else 2)
        for step, result in enumerate(at_each_step):
            seen = case.batches[: step + 1] if case.cumulative else case.batches[2 * step : 2 * step + 2]
            assert_equal(result, case.expected(list(seen)))


@pytest.mark.full
def test_processes_record_the_same_steps(of_two_processes):
    for results in of_two_processes:
        assert results["refused"] == "processes have recorded different steps: [[0], [1]]"
