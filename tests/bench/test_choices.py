import pytest

from routerzoo.bench.choices import RouterChoice, read_choice, read_choices
from routerzoo.errors import UserError


def test_a_router_by_name_class_path_and_with_arguments(own_routers):
    assert read_choice("LinearRouter") == RouterChoice("LinearRouter")
    assert read_choice("own_router.OwnRouter").label == "OwnRouter"
    noisy = read_choice("{class_path: LinearRouter, init_args: {noisy: true, top_k: 1}, label: noisy}")
    assert (noisy.label, noisy.arguments(2)) == ("noisy", {"noisy": True, "top_k": 1})
    assert noisy.declared_k(2) == 1


def test_the_task_decides_k_where_the_router_takes_one():
    assert read_choice("HashRouter").arguments(2) == {"top_k": 2}
    assert read_choice("TopPRouter").arguments(2) == {}
    assert read_choice("TopPRouter").declared_k(2) is None


def test_all_are_the_registered_ones():
    labels = [choice.label for choice in read_choices(["all"])]
    assert "TemplateRouter" in labels  # by its entry point
    assert not {"oracle", "blind", "dense"} & set(labels)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["HyperRoute"], "unknown router 'HyperRoute'; did you mean 'HyperRouter'"),
        (["nowhere.Router"], "cannot import nowhere.Router: ModuleNotFoundError"),
        (["mine/own_router.py"], "own_router.py is a file, but a router is named by its class: own_router.MyRouter"),
        (["routerzoo.MoE"], "routerzoo.MoE is no subclass of routerzoo.Router"),
        (["{class_path: LinearRouter, args: {}}"], "a router has no 'args'; it has class_path, init_args, label"),
        (["{class_path: LinearRouter, init_args: {nosy: true}}"], "no argument 'nosy'; did you mean 'noisy'"),
        (["{class_path: [}"], "cannot read the router"),
        (["{label: mine}"], "a router has a class_path"),
        (["LinearRouter", "LinearRouter"], "two routers are called 'LinearRouter': give one a label"),
        (["{class_path: LinearRouter, label: blind}"], "'blind' is a control, which every task has: leave it out"),
    ],
)
def test_what_is_no_router_is_refused_in_a_sentence(texts, message):
    with pytest.raises(UserError, match=message):
        read_choices(texts)
