"""headstart beside PEFT, on the same work in one run: CPU seconds, peak memory, and how right the results are.

    python -m benchmarks                     everything, at the sizes of the tables (about an hour on one core)
    python -m benchmarks lifecycle --quick   one topic, smaller

Each topic is a plain script with a function `rows(scale)`; each row holds ours, the peer's, and the target.
"""
