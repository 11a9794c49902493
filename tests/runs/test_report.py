"""`RunReport`, and what a sweep's report reads of it."""

import copy
import json
import pickle
import time

import pytest
import torch
from lightning import Trainer

from routerzoo import LayerSpec, create_router
from routerzoo.report.collect import read_sweep
from routerzoo.report.page import write_report
from routerzoo.runs.predictions import PredictionWriter
from routerzoo.runs.report import RunReport
from routerzoo.runs.routing_pictures import RoutingPictures
from routerzoo.sweep.ledger import Ledger
from routerzoo.sweep.progress import headline
from tests.callbacks.plain import QUIET, Plain, loader
from tests.tasks.test_tasks import language, text_data


class Retrieval(Plain):
    """Reports a metric that no table of ours knows."""

    headline_metric = "recall"
    headline_higher_is_better = True

    def __init__(self, recall):
        super().__init__()
        self.recall = recall

    def test_step(self, batch, batch_idx):
        self.log("test/recall", self.recall)
        self.log("test/loss", 1.0)


def results_of(folder, recall):
    trainer = Trainer(**QUIET, callbacks=[RunReport(str(folder))])
    trainer.test(Retrieval(recall), loader(), verbose=False)
    return json.loads((folder / "results.json").read_text())


def test_a_headline_metric_and_its_direction_reach_the_report(tmp_path):
    ledger = Ledger(tmp_path)
    recalls = {"Linear": (0.5, 0.52), "Better": (0.8, 0.83)}
    known = {"task": "retrieval", "stage": "final", "config": "", "test": []}
    rows = [
        {
            "key": f"{name}{seed}",
            "router": name,
            "variant": name,
            "seed": seed,
            "folder": f"runs/{name}/{seed}",
            **known,
        }
        for name in recalls
        for seed in range(2)
    ]
    ledger.plan(rows)
    for row in rows:
        ledger.claim("code")
        results = results_of(tmp_path / row["folder"], recalls[row["router"]][row["seed"]])
        assert (results["test"]["headline_metric"], results["test"]["higher_is_better"]) == ("recall", True)
        ledger.finish(row["key"], "finished", results=results)
    assert headline(results) == "recall 0.8300"
    plan = {"config": "", "baseline": "Linear", "margins": {}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    sweep = read_sweep(tmp_path)
    (task,) = sweep.tasks
    assert (task.metric, task.lower_is_better) == ("recall", False)
    assert {name: [round(v, 3) for v in values.values()] for name, values in task.values.items()} == {
        "Linear": [0.5, 0.52],
        "Better": [0.8, 0.83],
    }
    write_report(sweep)
    assert "higher is better" in (tmp_path / "report.html").read_text()


def test_the_best_value_follows_the_direction():
    report, module = RunReport(), Retrieval(0.0)
    trainer = Trainer(**QUIET)
    for value in (0.5, 0.7, 0.6):
        trainer.callback_metrics["val/recall"] = torch.tensor(value)
        trainer._logger_connector._callback_metrics["val/recall"] = torch.tensor(value)
        report.on_validation_end(trainer, module)
    assert round(report.best, 4) == 0.7


def test_callbacks_can_be_copied():
    for callback in (RunReport("run"), PredictionWriter("run")):
        assert copy.deepcopy(callback).folder == pickle.loads(pickle.dumps(callback)).folder == callback.folder


def test_time_before_training_is_not_counted():
    assert RunReport().state_dict()["seconds"] == 0
    report = RunReport()
    report.load_state_dict({**RunReport().state_dict(), "seconds": 100.0})
    assert report.state_dict()["seconds"] == 100
    report._started = time.monotonic() - 5
    assert 105 <= report.state_dict()["seconds"] < 106


@pytest.mark.parametrize(
    ("router", "told"), [("LinearRouter", "top 2"), ("TopPRouter", "k set by the router"), ("ThorRouter", "k set by")]
)
def test_the_header_names_a_k_where_there_is_one(router, told, capsys):
    module = Plain()
    module.first.router = create_router(router, LayerSpec(8, 4, layer=0, num_layers=1))
    RunReport().on_fit_start(Trainer(**QUIET), module)
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["", "{", "null", "[1]", "\0\0\0", '{"earlier": 3}'])
def test_damaged_results_are_set_aside(tmp_path, damaged, capsys):
    (tmp_path / "results.json").write_text(damaged)
    assert results_of(tmp_path, 0.5)["test"]["recall"] == 0.5
    assert (tmp_path / "results.damaged.json").read_text() == damaged
    assert f"results.json was damaged; it is now {tmp_path}/results.damaged.json" in capsys.readouterr().out


def test_one_instance_reports_each_run_by_itself(tmp_path):
    report, pictures = RunReport(str(tmp_path)), RoutingPictures()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        options = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": -1}
        trainer = Trainer(**{**QUIET, **options}, callbacks=[report, pictures])
        trainer.fit(language("LinearRouter"), text_data())
        value = float(trainer.callback_metrics["val/bpb"])
        state = report.state_dict()
        assert state["last"] == value
        assert state["best"] < state["metric_at_start"]
        assert report.state_dict() == state  # the clock has stopped
        assert pictures.validations == 2
        states.append(state)
    assert states[0]["metric_at_start"] != states[1]["metric_at_start"]
    trained = states[1]["seconds"]
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(trainer.lightning_module, text_data())
    assert report.state_dict()["metric_at_start"] == states[1]["metric_at_start"]
    assert report.state_dict()["seconds"] > trained
