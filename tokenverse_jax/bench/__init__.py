"""The benchmark on mini_scenes: concepts composed in new pictures, measured by the judge.

The questions are in `cases`, the figures and how they could be fooled in `metrics`, the methods in `rows`.
"""
