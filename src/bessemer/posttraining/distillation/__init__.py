"""Distillation: a student learns from a teacher's distributions, from its answers, or from its judgement of the student's own
answers.
"""
