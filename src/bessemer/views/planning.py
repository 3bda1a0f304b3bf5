"""What `bessemer plan` prints: memory, traffic and time of the best layout, and the other layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from bessemer.core.metrics import duration, percent, short_count, size
from bessemer.views.parts_terminal import listing, literal, section


def show_plan(plan: Mapping[str, Any]) -> RenderableType:
    """A plan, as `scaling.planner.outcome` gives it."""
    best = plan["plans"][0]
    price = _price(plan)
    active = plan["active_parameters"]
    sparse = f", {short_count(active)} active" if active != plan["parameters"] else ""
    parts: list[RenderableType] = [
        literal(f"{plan['name']} on {plan['gpus']} × {plan['card']}", "bold #d9622b"),
        literal(f"{short_count(plan['parameters'])} parameters{sparse}, {short_count(plan['tokens'])} tokens; {price}"),
        literal(
            f"{_days(best['days'])}, {_dollars(best['dollars'])}, {short_count(best['tokens_per_second'])} tokens/s, "
            f"MFU {percent(best['model_flops_utilisation'])}; predicted, not measured"
        ),
    ]
    parts += section("Best layout", literal(_yaml(best["settings"])))
    parts += section("Memory of a rank", _memory(plan, best))
    parts += section("Seconds of a step", _seconds(plan, best))
    if best["traffic"]:
        parts += section("Sent by a rank in a step", _traffic(best))
    parts += section("Layouts", _layouts(plan))
    return Group(*parts)


def show_serving_plan(plan: Mapping[str, Any]) -> RenderableType:
    """A plan of serving, as `scaling.serving.serving_plan` gives it."""
    price = _price(plan)
    usual = plan["prompt_tokens"] + plan["answer_tokens"]
    memory = [
        (f"weights in {plan['weights']}", size(plan["weight_bytes"])),
        ("keys and values of a token", size(plan["kv_bytes_per_token"])),
        ("left for keys and values", size(plan["kv_memory_bytes"])),
        (f"conversations of {usual:,} tokens", f"{plan['conversations']:,}"),
        (f"conversations of {plan['context']:,} tokens, the whole context", f"{plan['conversations_of_whole_context']:,}"),
    ]
    loads = [
        (
            f"{load['conversations']:,}",
            f"{load['tokens_per_second_each']:,.0f}",
            f"{load['answer_tokens_per_second']:,.0f}",
            f"{1000 * load['prompt_seconds']:,.0f} ms",
            f"{load['dollars_per_million_answer_tokens']:,.2f}",
        )
        for load in plan["loads"]
    ]
    speeds = ("Conversations at once", "tokens/s each", "tokens/s in all", "prompt", "$ / 1M tokens")
    head = literal(f"{plan['name']} served on {plan['gpus']} × {plan['card']}", "bold #d9622b")
    summary = f"{short_count(plan['parameters'])} parameters; prompts of {plan['prompt_tokens']:,} tokens, answers of "
    summary += f"{plan['answer_tokens']:,}; {price}; predicted, not measured"
    return Group(
        head,
        literal(summary),
        *section("Memory", listing("Memory", "", rows=memory)),
        *section("Load", listing(*speeds, rows=loads)),
    )


def show_finetune_plan(model: str, data: str, plan: Mapping[str, Any]) -> RenderableType:
    """What a fine-tuning takes, as `FinetunePlan.figures` gives it."""
    data_rows = [
        ("conversations to learn from", f"{plan['conversations']:,}"),
        ("held out", f"{plan['held_out']:,}"),
        ("tokens of a pass, and learnt of them", f"{plan['tokens']:,}, {plan['learnt_tokens']:,}"),
        (f"rows of {plan['context_length']:,} tokens", f"{plan['rows']:,}"),
        (f"steps of {plan['batch_size']:,} rows", f"{plan['steps']:,}"),
        ("left out: longer than a row, with nothing to learn", f"{plan['too_long']:,}, {plan['nothing_learnt']:,}"),
        ("their beginning cut off", f"{plan['cut']:,}"),
        ("rows at once, and what is recomputed", f"{plan['micro_batch_size']:,}, {plan['activation_checkpointing']}"),
    ]
    if plan["seconds"] is not None:
        cost = "" if plan["cost"] is None else f", cost {plan['cost']:.2f}"
        data_rows.append(("time of the steps, as this machine is now", f"{duration(plan['seconds'])}{cost}"))
    parts = sorted(plan["memory_parts"].items(), key=lambda part: -part[1])
    free, methods = plan["free_bytes"], []
    for method, needed in plan["memory_bytes"].items():
        fits = "" if free is None or needed <= free else "does not fit"
        methods.append((method, size(needed), "chosen" if method == plan["method"] and not fits else fits))
    usable = "" if free is None else f"{size(free)} can be used; "
    return Group(
        literal(f"{model} tuned on {data}", "bold #d9622b"),
        literal(f"{usable}predicted, not measured"),
        *section("Data", listing("Rows", "", rows=data_rows)),
        *section("Memory", listing("Method", "Memory at most", "", rows=methods)),
        *section(
            f"Memory of {plan['method']}, not all at once",
            listing("Part", "Bytes", rows=[(part, size(needed)) for part, needed in parts]),
        ),
    )


def _memory(plan: Mapping[str, Any], best: Mapping[str, Any]) -> RenderableType:
    rows = [(kind, size(count)) for kind, count in best["memory"].items() if kind != "peak"]
    peak = f"{size(best['memory']['peak'])} of {size(plan['usable_memory'])}"
    last = (literal("peak, not all at once", "bold"), literal(peak, "bold"))
    table = listing("Kind", "Bytes", rows=[*rows, last])
    table.caption = plan.get("assumed_states")
    return table


def _seconds(plan: Mapping[str, Any], best: Mapping[str, Any]) -> RenderableType:
    table = listing("Part", "Time", "Share")
    step = best["seconds"]["step"]
    for name, seconds in best["seconds"].items():
        if name == "step" or not seconds:
            continue
        share = "beside it" if name.endswith("hidden") else percent(seconds / step)
        table.add_row(literal(name), literal(_short(seconds)), literal(share))
    table.add_row(literal("step", "bold"), literal(_short(step), "bold"), literal(""))
    table.caption = f"large products at {percent(plan['achievable_share_of_peak'])} of the card's peak"
    return table


def _traffic(best: Mapping[str, Any]) -> RenderableType:
    rows = [
        (kind["axis"], kind["operation"], f"{kind['ranks']:,}", f"{kind['count']:,}", size(kind["bytes_sent"]))
        for kind in best["traffic"]
    ]
    return listing("Axis", "Collective", "Ranks", "Number", "Bytes", rows=rows)


def _layouts(plan: Mapping[str, Any]) -> RenderableType:
    plans, requested = list(plan["plans"]), plan.get("asked")
    if requested:
        plans.append(requested | {"described": f"as the recipe has it: {requested['described']}"})
    rows = [
        (
            each["described"],
            _short(each["seconds"]["step"]),
            percent(each["model_flops_utilisation"]),
            size(each["memory"]["peak"]) + (" (does not fit)" if each["memory"]["peak"] > plan["usable_memory"] else ""),
            _days(each["days"]),
            _dollars(each["dollars"]),
        )
        for each in plans
    ]
    return listing("Layout", "Step", "MFU", "Memory", "Days", "Cost", rows=rows)


def _price(plan: Mapping[str, Any]) -> str:
    return f"${plan['price_per_gpu_hour']:g} an hour each{' (assumed)' if plan['price_is_assumed'] else ''}"


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else duration(seconds)


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else duration(days * 86_400)


def _dollars(dollars: float) -> str:
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def _yaml(settings: Mapping[str, Any]) -> str:
    """Settings as lines of a recipe."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            value = "{" + ", ".join(f"{name}: {item}" for name, item in value.items()) + "}"
        lines.append(f"{key}: {value}")
    return "\n".join(lines)
