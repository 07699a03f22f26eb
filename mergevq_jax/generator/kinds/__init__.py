"""The kinds of generators."""
