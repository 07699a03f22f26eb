"""Concepts measured in DreamBench++'s protocol (Peng et al., arXiv 2406.16855): concept preservation, prompt following.

`benchmark` reads the folder, `samples` writes the images. `similarity` scores them with CLIP and DINO, `scenes` with
mini_scenes' judge, and `requests` through a judge outside of this library.
"""
