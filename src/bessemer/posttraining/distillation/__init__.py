"""Distillation: a student learns from a teacher's distributions, from what it writes, or from what it says of the student's own
words."""
