"""Metrics by networks: LPIPS, CLIP score, FID and FVD, each through a library that is well kept.

LPIPS and FID need torchvision, which must not be imported beside Kinora (its wheel for CUDA breaks
a torch for CPUs): `runner.py` is a script with dependencies of its own, as VBench's is. Nothing is
downloaded: what is missing is told, with the command that brings it.
"""
