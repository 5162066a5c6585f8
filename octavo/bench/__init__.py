"""The workbench: one way to measure any engine, and figures that can be checked.

`octavo.bench.runner.run` measures one engine with one method; `octavo.bench.record` is the file it leaves.
"""
