"""Wrong and right answers to lesson 09's exercises."""

from course.checks.learner import joined
from course.serving import start_engine
from exercise_cases import Case
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler


def my_engine(pieces, **options):
    """By cases, into the options."""
    prefixes, blocks = pieces["my_prefix_cache"], pieces["my_blocks"]
    if prefixes and blocks:
        manager = joined(prefixes, blocks)
    else:
        manager = prefixes or blocks or BlockManager
    options["block_manager_class"] = manager
    if pieces["my_scheduler"]:
        options["scheduler_class"] = pieces["my_scheduler"]
    return start_engine(store_kv=pieces["my_store"], **options)


def literally(pieces, **options):
    """As the page says it: where a piece is None, the engine's own takes its place."""
    return start_engine(
        joined(pieces["my_blocks"] or BlockManager, pieces["my_prefix_cache"] or BlockManager),
        scheduler_class=pieces["my_scheduler"] or Scheduler,
        store_kv=pieces["my_store"],
        **options,
    )


def benchmark(engine, prompts, count):
    """Warm with one short request."""
    engine.generate(prompts[:1], 1)
    engine.synchronize()
    before = engine.clock()
    lengths = [len(answer) for answer in engine.generate(prompts, count)]
    engine.synchronize()
    after = engine.clock()
    if lengths != [count] * len(prompts):
        raise ValueError(lengths)
    return len(prompts) * count / (after - before)


WAIT = "    engine.synchronize()\n"
CASES = {
    "roofline": Case(
        mutants=[
            ("1000 * 2 * 28", "1000 * 28", "a key and a value"),
            ("0.6e9 * 2 +", "128 * 0.6e9 * 2 +", "All rows share"),
            ("(0.6e9 * 2 + 128 * 1000 * 2 * 28 * 8 * 128 * 2)", "0.6e9 * 2", "Attention reads"),
            ("read_gb / 3350 * 1e3", "read_gb / 3350", "In milliseconds"),
            ("128 / step_ms", "1 / step_ms", "one token to each"),
            ("step_ms / 7.1", "7.1 / step_ms", "below 1"),
            ("990 / 3.35", "990 / 3.35 / 2", "two FLOPs"),
        ],
        other={
            "read_gb": 15.9,
            "step_ms": 4.74,
            "tokens_per_second": 27000,
            "share": 0.67,
            "rows": 296,
        },
    ),
    "my_engine": Case(
        mutants=[
            ('("my_prefix_cache", "my_blocks")', '("my_blocks",)', "is not in the engine's block"),
            ("joined(*managers)", "managers[0]", "Both count"),
            (" if pieces[name]]", "]", "leave out what is None"),
            ('pieces["my_scheduler"] or Scheduler', "Scheduler", "its own scheduler"),
            ('store_kv=pieces["my_store"]', "store_kv=None", "not called"),
            ("        **options,\n", "", "options do not reach"),
        ],
        other=my_engine,
        more=({"my_engine": literally},),
    ),
    "benchmark": Case(
        mutants=[
            (
                "len(answer) for answer in answers) /",
                "len(p) + count for p in prompts) /",
                "it counts prompts",
            ),
            ("    engine.generate(prompts, count)  # compiles\n", "", "Compiling is in the time"),
            (WAIT + "    seconds", "    seconds", "nothing is done"),
            (WAIT + "    start", "    start", "before, too"),
            ("        raise ValueError", "        print", "delivers less"),
            ("raise ValueError", "raise AssertionError", "yours raises AssertionError"),
            (
                "any(len(answer) != count for answer in answers)",
                "sum(len(answer) for answer in answers) != count * len(prompts)",
                "the sum is as it should be",
            ),
        ],
        other=benchmark,
    ),
}
