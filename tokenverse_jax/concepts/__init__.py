"""Concepts: learned from an image, kept in files, composed on the words of prompts."""
