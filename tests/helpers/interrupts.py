"""Ctrl-C at any instruction of the engine, on purpose: an Interrupter raises it at a chosen one.

Python looks for signals after calls, at the start of a function and when a loop jumps back. The
Interrupter comes at every instruction, which is stricter, with two exceptions. Both would separate
a `with` block from the call of its `__exit__`, and Python takes care that no signal does that: the
instructions between the block's end, good or bad, and that call, and the empty one of a `try:`.
"""

import dis
import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import nanovllm

ENGINE = str(Path(nanovllm.__file__).parent)


@cache
def without_signals(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions at which no interrupt is raised.

    The call of `__exit__` at a `with` block's end is prepared by pushing None three times. A value
    that the block returns is moved out of the way before.
    """
    found: set[int] = set()
    run: list[int] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("NOP", "PUSH_EXC_INFO", "WITH_EXCEPT_START"):
            found.add(instruction.offset)
        if instruction.opname == "SWAP" and not run:
            run = [instruction.offset]
        elif instruction.opname == "LOAD_CONST" and instruction.argval is None:
            run.append(instruction.offset)
        else:
            if instruction.opname in ("PRECALL", "CALL") and len(run) >= 3:
                found.update(run, [instruction.offset])
            keeps = instruction.opname == "PRECALL" and run
            run = run if keeps else []
    return frozenset(found)


class Interrupter:
    """Counts the engine's instructions in this thread, and raises KeyboardInterrupt at one.

    with Interrupter(at=1000) as interrupter: ...

    within: the qualified name of the only function whose instructions count.
    """

    def __init__(self, at: int | None = None, within: str = ""):
        self.at, self.count, self.within = at, 0, within
        self.where = ""  # function and line of the interrupt, once it was raised

    def __enter__(self) -> "Interrupter":
        sys.settrace(self._enter_function)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter_function(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(ENGINE) or self.within not in ("", code.co_qualname):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._instruction

    def _instruction(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode" and not self.where:
            self.count += 1
            due = self.at is not None and self.count >= self.at
            if due and frame.f_lasti not in without_signals(frame.f_code):
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._instruction
