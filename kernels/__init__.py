"""Operators on tensors, each with a plain reference beside every fast one (DESIGN §2.7)."""
