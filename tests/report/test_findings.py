"""What a report says in sentences."""

from pathlib import Path

from routerzoo.report.collect import Sweep, Task
from routerzoo.report.page import findings


def test_a_mean_over_fewer_seeds_is_not_called_the_best():
    values = {"LinearRouter": {0: 3.0, 1: 3.2}, "HashRouter": {0: 3.3, 1: 3.1}, "XMoERouter": {0: 2.0}}
    task = Task("language", "bpb", True, values, {}, {})
    sweep = Sweep(Path(), "", "LinearRouter", 0.01, [task], [], [])
    (sentence,) = findings(sweep, {"language": {}}, {})
    assert sentence == "language: the best mean bpb is 3.1000, of LinearRouter. Left out, with fewer seeds: XMoERouter."
