"""Finding plugins and turning names into objects.

Built-ins register through the same hooks as a third party's package (entry-point group `drift`). What goes wrong
is a `PluginError`, `UnknownNameError` or `OptionError` whose one line names the plugin, the name or the option.
This module knows nothing of what the registered objects do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

import pluggy

from drift_scheduler import builtin, hookspecs
from drift_scheduler.errors import DriftError, OptionError, PluginError, UnknownNameError
from drift_scheduler.hookspecs import PROJECT, hookimpl

__all__ = ["KINDS", "Registry", "hookimpl", "load"]

BUILTIN = "drift-scheduler"

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "dispatch policy": "drift_dispatch_policies",
        "partition policy": "drift_partition_policies",
        "cost model": "drift_cost_models",
        "workload": "drift_workloads",
        "executor": "drift_executors",
        "partition mechanism": "drift_partition_mechanisms",
        "model": "drift_models",
        "command": "drift_cli_commands",
    }
)
"""What can be registered by name -> the hook that registers it."""


@dataclass(frozen=True, slots=True)
class Registered:
    """One registered factory and the plugin it came from."""

    factory: Callable[..., Any]
    plugin: str


@dataclass(frozen=True)
class Registry:
    """Names of every kind, each with its factory."""

    manager: pluggy.PluginManager
    names: Mapping[str, Mapping[str, Registered]]
    problems: tuple[PluginError, ...] = field(default=())
    """Plugins that could not be loaded; `load(strict=True)` raises the first instead."""

    def of(self, kind: str) -> Mapping[str, Callable[..., Any]]:
        """Every registered name of a kind with its factory."""
        return {name: entry.factory for name, entry in self.names[kind].items()}

    @property
    def dispatch_policies(self) -> Mapping[str, Callable[..., Any]]:
        """Dispatch policies by name."""
        return self.of("dispatch policy")

    @property
    def partition_policies(self) -> Mapping[str, Callable[..., Any]]:
        """Partition policies by name."""
        return self.of("partition policy")

    @property
    def cost_models(self) -> Mapping[str, Callable[..., Any]]:
        """Cost models by name."""
        return self.of("cost model")

    @property
    def workloads(self) -> Mapping[str, Callable[..., Any]]:
        """Workloads by name."""
        return self.of("workload")

    def plugin_of(self, kind: str, name: str) -> str:
        """The plugin that registered `name`. Raises UnknownNameError."""
        return self._entry(kind, name).plugin

    def create(self, kind: str, name: str, /, *args: Any, **options: Any) -> Any:
        """Build the named object.

        Raises UnknownNameError (lists what is installed), OptionError (names the plugin, the option and
        the options it takes).
        """
        entry = self._entry(kind, name)
        _check_options(kind, name, entry, args, options)
        try:
            return entry.factory(*args, **options)
        except DriftError:
            raise
        except (TypeError, ValueError) as error:
            written = {
                option: value for option, value in options.items() if isinstance(value, str | int | float)
            }
            given = ", ".join(f"{option}={value!r}" for option, value in written.items())
            told = f"{kind} '{name}' (plugin {entry.plugin}){f' with {given}' if given else ''}: {error}"
            raise OptionError(told) from error

    def observers(self, config: Mapping[str, Any]) -> list[Any]:
        """Every observer the plugins offer for this configuration.

        Raises PluginError (names the plugin) where a hook raises or returns no sequence.
        """
        found: list[Any] = []
        for impl in self.manager.hook.drift_observers.get_hookimpls():
            offered = _call(impl, "drift_observers", config=config)
            if offered is None:
                continue
            if isinstance(offered, str) or not isinstance(offered, Sequence):
                raise PluginError(
                    f"plugin '{impl.plugin_name}': drift_observers must return a sequence of observers, "
                    f"not {type(offered).__name__}"
                )
            found.extend(offered)
        return found

    def _entry(self, kind: str, name: str) -> Registered:
        names = self.names[kind]
        if name not in names:
            raise UnknownNameError(kind, name, names)
        return names[name]


def load(
    plugins: Iterable[tuple[str, object]] = (), *, installed: bool = True, strict: bool = True
) -> Registry:
    """Collect the built-ins, the installed plugins (unless `installed=False`) and those given as `(name, plugin)`.

    With `strict`, a plugin that cannot be loaded raises PluginError; otherwise it is left out and listed in
    `Registry.problems`. A name that two plugins register always raises.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, name=BUILTIN)
    problems = _load_installed(manager) if installed else []
    for name, plugin in plugins:
        _register(manager, name, plugin)
    if strict and problems:
        raise problems[0]
    names = {kind: _collect(manager, kind, hook) for kind, hook in KINDS.items()}
    return Registry(manager, names, tuple(problems))


def _load_installed(manager: pluggy.PluginManager) -> list[PluginError]:
    problems: list[PluginError] = []
    seen: set[str] = set()
    for entry in sorted(entry_points(group=PROJECT), key=lambda e: (e.name, e.value)):
        label = entry.dist.name if entry.dist is not None else entry.name
        if entry.value in seen:  # one package found twice on the path
            continue
        seen.add(entry.value)
        try:
            _register(
                manager, label if not manager.has_plugin(label) else f"{label}:{entry.name}", entry.load()
            )
        except PluginError as error:
            problems.append(error)
        except Exception as error:  # a third party's import may raise anything
            problems.append(PluginError(f"plugin '{label}' ({entry.value}) cannot be imported: {error!r}"))
    return problems


def _register(manager: pluggy.PluginManager, name: str, plugin: object) -> None:
    try:
        manager.register(plugin, name=name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        hooks = ", ".join(sorted(h for h in vars(hookspecs) if h.startswith("drift_")))
        raise PluginError(
            f"plugin '{name}': {str(error).splitlines()[-1].strip()}; hooks are: {hooks}"
        ) from error


def _collect(manager: pluggy.PluginManager, kind: str, hook: str) -> dict[str, Registered]:
    found: dict[str, Registered] = {}
    for impl in getattr(manager.hook, hook).get_hookimpls():
        plugin = impl.plugin_name
        offered = _call(impl, hook)
        if offered is None:
            continue
        if not isinstance(offered, Mapping):
            raise PluginError(
                f"plugin '{plugin}': {hook} must return a mapping of names, not {type(offered).__name__}"
            )
        for name, factory in offered.items():
            if not isinstance(name, str) or not name or not callable(factory):
                raise PluginError(
                    f"plugin '{plugin}': {hook} maps {name!r} to {factory!r}; need a name and a callable"
                )
            if name in found:
                raise PluginError(
                    f"{kind} '{name}' is registered by both '{found[name].plugin}' and '{plugin}'"
                )
            found[name] = Registered(factory, plugin)
    return dict(sorted(found.items()))


def _call(impl: pluggy.HookImpl, hook: str, **given: Any) -> Any:
    """What one plugin's hook returns; it may take fewer arguments than are given."""
    try:
        return impl.function(*(given[name] for name in impl.argnames))
    except Exception as error:  # a third party's hook may raise anything
        raise PluginError(
            f"plugin '{impl.plugin_name}': {hook} raised {type(error).__name__}: {error}"
        ) from error


def _check_options(
    kind: str, name: str, entry: Registered, args: Sequence[Any], options: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(entry.factory)
    except (TypeError, ValueError):  # a builtin callable without a signature: let the call itself tell
        return
    parameters = signature.parameters.values()
    takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][len(args) :]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    where = f"{kind} '{name}' (plugin {entry.plugin})"
    for option in options:
        if option not in takes and not anything:
            raise OptionError(f"{where} takes no option '{option}'; options: {', '.join(takes) or 'none'}")
    required = [p.name for p in parameters if p.default is p.empty and p.name in takes]
    for option in required:
        if option not in options:
            raise OptionError(f"{where} needs option '{option}'; options: {', '.join(takes)}")
