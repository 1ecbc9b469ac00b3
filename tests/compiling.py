"""Compiles pipelines for tests: each once, and from a short stack.

kfp asks `inspect.stack()` for the name of a caller. Below pytest that looks at many frames, and for
some of them at all modules that were ever imported: seconds instead of a fifth of one.
"""

import functools
import typing as tp
from concurrent.futures import ThreadPoolExecutor

from pipelines import definition
from pipelines.definition import Compiled
from pipelines.options import CompileOptions, PipelineName

T = tp.TypeVar("T")

_COMPILED: dict[str, Compiled] = {}


def compile_pipeline(name: PipelineName, options: CompileOptions) -> Compiled:
    """A pipeline. Equal options get the same object."""
    key = f"{name} {options.model_dump_json()}"
    if key not in _COMPILED:
        _COMPILED[key] = compile_anew(name, options)
    return _COMPILED[key]


def compile_anew(name: PipelineName, options: CompileOptions) -> Compiled:
    """A pipeline, as if nothing had been compiled before."""
    return from_short_stack(functools.partial(definition.compile_pipeline, name, options))


def from_short_stack(work: tp.Callable[[], T]) -> T:
    """The result of a call in a thread of its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
