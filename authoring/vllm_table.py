"""The tables in docs/vllm_api.md: what of vLLM's offline API is here, by name.

    python -m authoring.vllm_table            whether the page is current; its exit status says so
    python -m authoring.vllm_table --write    write the tables, between the page's marks

The names and defaults of vLLM's parameters and methods are in authoring/vllm_names.json, with the
release that they were read from. What becomes of each is read from the engine's own code.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from nanovllm import LLM, EngineArgs, LLMEngine, SamplingParams
from nanovllm.validation import vllm_defaults

ROOT = Path(__file__).resolve().parent.parent
NAMES = json.loads((ROOT / "authoring/vllm_names.json").read_text(encoding="utf-8"))
PAGE = ROOT / "docs/vllm_api.md"
CLASSES = {"LLM": LLM, "SamplingParams": SamplingParams, "EngineArgs": EngineArgs}
CLASSES |= {"LLMEngine": LLMEngine}
OPTIONS = {  # what the methods take for parameters that they do not have
    ("LLM", "generate"): vllm_defaults.GENERATE,
    ("LLM", "chat"): vllm_defaults.CHAT,
    ("LLMEngine", "add_request"): vllm_defaults.ADD_REQUEST,
    ("LLMEngine", "abort_request"): vllm_defaults.ABORT_REQUEST,
    ("LLM", "reset_prefix_cache"): vllm_defaults.RESET_PREFIX_CACHE,
    ("LLMEngine", "reset_prefix_cache"): vllm_defaults.RESET_PREFIX_CACHE,
    ("LLMEngine", "from_engine_args"): vllm_defaults.FROM_ENGINE_ARGS,
}
MARKS = ("<!-- TABLES: begin -->\n", "<!-- TABLES: end -->\n")
KINDS = ("same", "only", "refused", "absent")


def with_tables(text: str) -> str:
    """The page's text with the tables between its marks made anew."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + "\n" + tables() + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def tables() -> str:
    """A table for each class, and a list of what vLLM does not have, as Markdown."""
    parts = []
    for name in CLASSES:
        rows = [*parameter_rows(name), *method_rows(name)]
        counts = {kind: sum(row[1].startswith(kind) for row in rows) for kind in KINDS}
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"## {name}\n\n{summary}.\n\n| name | here |\n|---|---|\n{table}\n")
    parts.append("## Ours alone\n\n" + "\n".join(f"- {line}" for line in ours()) + "\n")
    return "\n".join(parts)


def parameter_rows(name: str) -> Iterator[tuple[str, str]]:
    for parameter, default in NAMES[name]["parameters"].items():
        if name == "LLMEngine":
            yield f"`{parameter}`", "absent: an engine is made by `from_engine_args`"
        elif name == "LLM" and parameter == "chat_template":
            yield f"`{parameter}`", "same"
        else:
            kind = SamplingParams if name == "SamplingParams" else EngineArgs
            yield f"`{parameter}`", state_of(kind, parameter, default)


def state_of(kind: Any, parameter: str, default: str) -> str:
    """What becomes of a parameter of SamplingParams or EngineArgs; `default` is vLLM's."""
    if parameter in kind.unsupported_parameters:
        return restricted(kind.unsupported_parameters[parameter])
    field = {f.name: f for f in fields(kind)}.get(parameter)
    if field is None:
        return "absent"
    if not field.repr:
        return restricted((field.default,))
    if parameter == "distributed_executor_backend":
        return "only None or 'mp'; 'uni' for one rank, 'external_launcher' under torchrun"
    ours = default_of(field)
    return "same" if default in (ours, "required") else f"same; the default is {ours}"


def default_of(field: Field) -> str:
    return repr(field.default if field.default_factory is MISSING else field.default_factory())


def restricted(accepted: tuple) -> str:
    words = " or ".join(shown(value) for value in accepted)
    return f"only {words}" if len(accepted) > 1 else f"refused, unless it is {words}"


def shown(value: Any) -> str:
    return str(value) if isinstance(value, vllm_defaults.RequestOutputKind) else repr(value)


def method_rows(name: str) -> Iterator[tuple[str, str]]:
    for method, parameters in NAMES[name]["methods"].items():
        found = getattr(CLASSES[name], method, None)
        if found is None:
            yield f"`{method}()`", "absent"
            continue
        yield f"`{method}()`", "same"
        known = set(inspect.signature(found).parameters) if callable(found) else set()
        for parameter in parameters:
            accepted = OPTIONS.get((name, method), {}).get(parameter)
            state = restricted(accepted) if accepted else "same" if parameter in known else "absent"
            yield f"`{method}({parameter}=)`", state


def ours() -> Iterator[str]:
    """What is here and not in vLLM."""
    for kind in (EngineArgs, SamplingParams):
        for name in sorted(
            {f.name for f in fields(kind)} - set(NAMES[kind.__name__]["parameters"])
        ):
            yield f"`{kind.__name__}({name}=)`"
    for name in ("stream", "close"):
        yield f"`LLM.{name}()`"
    yield "`with LLM(...) as llm:` closes the engine at the end"
    yield "`LLMEngine.trace`, a record of each step"


def main(words: list[str]) -> int:
    text = PAGE.read_text(encoding="utf-8")
    if words == ["--write"]:
        PAGE.write_text(with_tables(text), encoding="utf-8")
    elif text != with_tables(text):
        print(f"{PAGE} is old: run `python -m authoring.vllm_table --write`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
