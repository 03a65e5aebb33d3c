"""Benchmarks that print JSON, and the plain baseline they measure against."""
