"""Adapters, versions and reports as tables."""

import json
from collections.abc import Iterable, Sequence

from quickchange_client.adapter import (
    Adapter,
    AdapterAction,
    AdapterReport,
    AdapterVersion,
    ModuleReport,
)
from quickchange_client.cli.output import format_bytes, format_time, print_pairs, print_table

DIGEST_CHARS = 12
MAX_NAMES = 5


def print_adapters(adapters: Sequence[Adapter]) -> None:
    """Print a row for each adapter; tier, rank and bytes are those of its default version."""
    headings = ("NAME", "ALIASES", ">VERSIONS", "TIER", ">RANK", ">BYTES", "LAST USED", ">REQUESTS")
    print_table(headings, [_adapter_row(adapter) for adapter in adapters])


def print_adapter(adapter: Adapter) -> None:
    """Print an adapter and a row for each of its versions."""
    print_pairs(
        [
            ("adapter", adapter.name),
            ("visibility", adapter.visibility),
            ("tags", ", ".join(adapter.tags) or None),
            ("created", format_time(adapter.created_at)),
        ]
    )
    print()
    headings = (">VERSION", "ALIASES", "STATE", "TIER", "MERGED", ">RANK", ">BYTES")
    more = (">REQUESTS", "DIGEST")
    rows = [_version_row(adapter, version) for version in adapter.versions]
    print_table((*headings, *more), rows)


def print_version(version: AdapterVersion) -> None:
    """Print one version, and the report of its upload."""
    print_pairs([*_version_pairs(version), *_report_pairs(version.report)])
    _print_targets(version.report)


def print_report(report: AdapterReport) -> None:
    """Print what the server found in an upload."""
    print_pairs(_report_pairs(report))
    _print_targets(report)


def print_action(action: AdapterAction) -> None:
    """Print what an action did."""
    freed = sum(action.freed_bytes.values())
    print_pairs(
        [
            ("version", f"{action.name}:{action.version}"),
            ("state", None if action.state == "ready" else action.state),
            ("tier", action.tier),
            ("pinned", "yes" if action.pinned else None),
            ("merged", "yes" if action.merged else "no"),
            *((f"{tier} bytes", format_bytes(n)) for tier, n in action.bytes.items() if n),
            ("freed", format_bytes(freed) if freed else None),
            ("took", f"{action.seconds:.3f} s"),
        ]
    )


def _version_pairs(version: AdapterVersion) -> list[tuple[str, object]]:
    held = version.bytes
    return [
        ("version", f"{version.name}:{version.version}"),
        ("digest", version.digest),
        ("state", version.state),
        ("tier", version.tier),
        ("pinned", "yes" if version.pinned else None),
        ("merged", "yes" if version.merged else None),
        ("file", format_bytes(held.file)),
        ("host", format_bytes(held.host) if held.host else None),
        ("device", format_bytes(held.device) if held.device else None),
        ("created", format_time(version.created_at)),
        ("last used", format_time(version.last_used_at) if version.last_used_at else None),
        ("requests", version.requests),
        *((f"task {key}", _task_value(value)) for key, value in (version.task or {}).items()),
    ]


def _task_value(value: object) -> str:
    """Return a value of a task.json as it stands there: line ends and spaces are seen."""
    return json.dumps(value, ensure_ascii=False)


def _report_pairs(report: AdapterReport | None) -> list[tuple[str, object]]:
    if report is None:
        return []
    modules = report.modules
    return [
        ("base", report.base),
        ("ranks", ", ".join(map(str, report.ranks)) or None),
        ("targets", ", ".join(report.target_modules) or None),
        ("matched", f"{len(modules.matched)} modules"),
        ("missed", _names(modules.missed)),
        ("unexpected", _names(modules.unexpected)),
        ("probe", _probe_text(report)),
        ("no effect", "yes: it changes nothing" if report.no_effect else None),
        *(("warning", warning) for warning in report.warnings),
    ]


def _adapter_row(adapter: Adapter) -> tuple[object, ...]:
    aliases = ", ".join(f"{alias}={number}" for alias, number in sorted(adapter.aliases.items()))
    default = _default_version(adapter)
    cells = ("-", "-", "-") if default is None else _default_cells(default)
    used = max((each.last_used_at or 0 for each in adapter.versions), default=0)
    requests = [each.requests for each in adapter.versions if each.requests is not None]
    use = (format_time(used or None), sum(requests) if requests else "-")
    return (adapter.name, aliases, len(adapter.versions), *cells, *use)


def _default_cells(version: AdapterVersion) -> tuple[object, ...]:
    tier = f"{version.tier} (merged)" if version.merged else version.tier
    return tier, version.rank, format_bytes(version.bytes.file)


def _default_version(adapter: Adapter) -> AdapterVersion | None:
    number = adapter.aliases.get("default")
    return next((each for each in adapter.versions if each.version == number), None)


def _version_row(adapter: Adapter, version: AdapterVersion) -> tuple[object, ...]:
    aliases = sorted(alias for alias, n in adapter.aliases.items() if n == version.version)
    return (
        version.version,
        ", ".join(aliases),
        version.state,
        version.tier,
        "yes" if version.merged else "no",
        version.rank,
        format_bytes(version.bytes.file),
        "-" if version.requests is None else version.requests,
        short_digest(version.digest),
    )


def short_digest(digest: str) -> str:
    """Return as much of a digest as a model string needs."""
    return "sha256:" + digest.removeprefix("sha256:")[:DIGEST_CHARS]


def _names(names: Sequence[str]) -> str | None:
    if not names:
        return None
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} modules: {', '.join(names[:MAX_NAMES])}{more}"


def _probe_text(report: AdapterReport) -> str | None:
    probe = report.probe
    if probe is None:
        return report.probe_reason and f"not measured: {report.probe_reason}"
    return (
        f"another likeliest token at {probe.num_top_changed} of {probe.num_tokens} places; log "
        f"probabilities move by {probe.mean_change:.3g} on average, {probe.max_change:.3g} at most"
    )


def _print_targets(report: AdapterReport | None) -> None:
    """Print a row for the modules of each name: what they are, and how strong their updates."""
    if report is None or not report.modules.matched:
        return
    groups: dict[str, list[ModuleReport]] = {}
    for module in report.modules.matched:
        groups.setdefault(target_of(module), []).append(module)
    print()
    headings = ("TARGET", ">MODULES", ">RANK", ">SCALING", "LORA_A", "LORA_B", "UPDATE NORM")
    print_table(headings, [_target_row(name, groups[name]) for name in sorted(groups)])


def target_of(module: ModuleReport) -> str:
    """Return the last part of a module's name, which is what configs target."""
    return module.module.rpartition(".")[2]


def _target_row(name: str, modules: Sequence[ModuleReport]) -> tuple[object, ...]:
    norms = [module.update_norm for module in modules if module.update_norm is not None]
    return (
        name,
        len(modules),
        _spread(module.rank for module in modules),
        _spread(module.scaling for module in modules),
        _all_of("×".join(map(str, module.lora_a)) for module in modules),
        _all_of("×".join(map(str, module.lora_b)) for module in modules),
        _spread(norms),
    )


def _spread(values: Iterable[float]) -> str:
    """Return the smallest and the largest value, or the one that all have."""
    found = sorted(set(values))
    if not found:
        return "-"
    low, high = f"{found[0]:.4g}", f"{found[-1]:.4g}"
    return low if low == high else f"{low} to {high}"


def _all_of(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts)))
