"""A small DINOv2 trained by self-distillation, without labels: a teacher where no published one fits the images."""
