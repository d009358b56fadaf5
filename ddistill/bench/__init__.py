"""Benchmarks whose right answers are known."""
