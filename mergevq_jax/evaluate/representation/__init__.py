"""How much of an image's class its features tell: k nearest neighbours, a linear probe, fine-tuning."""
