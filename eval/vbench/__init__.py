"""VBench: the real package in an environment of its own, and guards around it.

Its pins (transformers 4.33, numpy 1) cannot live beside a current diffusers, so `runner.py` is a
script with dependencies of its own, started by uv or by an interpreter that the user names. What it
says is not taken on trust: how many videos were there is counted, NaN is no score, and a total is
None unless all its dimensions are there.
"""
