"""`RunReport`, and what a sweep's report reads of it."""

import copy
import json
import pickle
import time

import torch
from lightning import Trainer

from routerzoo.report.collect import read_sweep
from routerzoo.report.page import write_report
from routerzoo.runs.predictions import PredictionWriter
from routerzoo.runs.report import RunReport
from routerzoo.sweep.ledger import Ledger
from routerzoo.sweep.progress import headline
from tests.callbacks.plain import QUIET, Plain, loader


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
    known = {"task": "retrieval", "config": "", "test": []}
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
    plan = {"config": "", "baseline": "Linear", "margin": 0.01}
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
