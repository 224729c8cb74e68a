"""Names become objects; clashes, typos and bad options are one clear line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from drift_scheduler import OptionError, PluginError, UnknownNameError, plugins
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.lifecycle import TRANSITIONS, Signal, State, advance
from drift_scheduler.plugins import hookimpl


def plugin(**hooks):
    return SimpleNamespace(**{name: hookimpl(hook) for name, hook in hooks.items()})


def test_built_ins_register_like_anyone() -> None:
    registry = plugins.load(installed=False)
    assert {"gang", "chunked-prefill", "alternate"} <= set(registry.dispatch_policies)
    assert {"tightest-decode", "static"} <= set(registry.partition_policies)
    assert isinstance(registry.create("dispatch policy", "gang", max_batch_tokens=64), GangPolicy)
    assert registry.plugin_of("dispatch policy", "gang") == "drift-scheduler"


def test_a_third_party_registers_without_forking() -> None:
    class Mine:
        def __init__(self, weight: float = 1.0) -> None:
            self.weight = weight

        def choose(self, view, costs, partitions):
            return None

    def drift_dispatch_policies():
        return {"mine": Mine}

    registry = plugins.load(
        [("acme", plugin(drift_dispatch_policies=drift_dispatch_policies))], installed=False
    )
    assert registry.create("dispatch policy", "mine", weight=2.0).weight == 2.0
    with pytest.raises(
        OptionError, match=r"'mine' \(plugin acme\) takes no option 'wieght'; options: weight"
    ):
        registry.create("dispatch policy", "mine", wieght=2.0)


def test_an_unknown_name_lists_what_is_installed() -> None:
    registry = plugins.load(installed=False)
    with pytest.raises(UnknownNameError, match=r"no dispatch policy 'edf'; installed: alternate, .*gang"):
        registry.create("dispatch policy", "edf")
    with pytest.raises(UnknownNameError, match="did you mean 'tightest-decode'"):
        registry.create("partition policy", "tightest-decod")


def test_missing_and_refused_options_name_the_option() -> None:
    registry = plugins.load(installed=False)
    with pytest.raises(OptionError, match="needs option 'decode_units'"):
        registry.create("partition policy", "static")
    with pytest.raises(OptionError, match="option 'decode_units' is 0"):
        registry.create("partition policy", "static", decode_units=0)


def test_a_clash_names_both_plugins() -> None:
    def drift_dispatch_policies():
        return {"gang": GangPolicy}

    with pytest.raises(PluginError, match=r"'gang' is registered by both '(drift-scheduler|acme)' and"):
        plugins.load([("acme", plugin(drift_dispatch_policies=drift_dispatch_policies))], installed=False)


def test_a_misspelt_hook_lists_the_hooks() -> None:
    def drift_dispatch_policy():
        return {}

    with pytest.raises(PluginError, match=r"plugin 'acme': .*hooks are: .*drift_dispatch_policies"):
        plugins.load([("acme", plugin(drift_dispatch_policy=drift_dispatch_policy))], installed=False)


@pytest.mark.parametrize("offered", [["mine"], {"": GangPolicy}, {"mine": 3}])
def test_registering_nonsense_is_an_error(offered) -> None:
    def drift_dispatch_policies():
        return offered

    with pytest.raises(PluginError, match="plugin 'acme': drift_dispatch_policies"):
        plugins.load([("acme", plugin(drift_dispatch_policies=drift_dispatch_policies))], installed=False)


def test_a_hook_that_raises_names_its_plugin() -> None:
    def drift_workloads():
        raise RuntimeError("no settings")

    with pytest.raises(PluginError, match="plugin 'acme': drift_workloads raised RuntimeError: no settings"):
        plugins.load([("acme", plugin(drift_workloads=drift_workloads))], installed=False)


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value, dist = "acme", "acme.plugin", SimpleNamespace(name="acme")

        def load(self):
            raise ImportError("no module named acme")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Entry()])
    with pytest.raises(PluginError, match=r"plugin 'acme' \(acme.plugin\) cannot be imported"):
        plugins.load()
    registry = plugins.load(strict=False)
    assert "acme" in str(registry.problems[0])
    assert "gang" in registry.dispatch_policies


def test_observers_are_collected() -> None:
    def drift_observers(config):
        return [config["who"]]

    registry = plugins.load([("acme", plugin(drift_observers=drift_observers))], installed=False)
    assert registry.observers({"who": "me"}) == ["me"]


def test_a_hook_may_leave_out_what_it_does_not_need() -> None:
    def drift_observers():
        return ("me",)

    registry = plugins.load([("acme", plugin(drift_observers=drift_observers))], installed=False)
    assert registry.observers({"who": "you"}) == ["me"]


@pytest.mark.parametrize(
    ("offered", "complaint"),
    [
        (3, "must return a sequence of observers, not int"),
        ("me", "must return a sequence of observers, not str"),
        (ZeroDivisionError("twice"), "raised ZeroDivisionError: twice"),
    ],
)
def test_observers_that_are_none_name_their_plugin(offered: object, complaint: str) -> None:
    def drift_observers(config):
        if isinstance(offered, Exception):
            raise offered
        return offered

    registry = plugins.load([("acme", plugin(drift_observers=drift_observers))], installed=False)
    with pytest.raises(PluginError, match=f"plugin 'acme': drift_observers {complaint}"):
        registry.observers({})


def test_the_lifecycle_is_one_table() -> None:
    for state in State:
        for signal in Signal:
            if (state, signal) in TRANSITIONS:
                assert advance(state, signal) is TRANSITIONS[state, signal]
            else:
                with pytest.raises(AssertionError, match=f"no transition {signal.name} from {state.name}"):
                    advance(state, signal)
    assert all(state is not State.ENDED for state, _ in TRANSITIONS)
    assert all((state, Signal.END) in TRANSITIONS for state in State if state is not State.ENDED)
