"""Kernels, and the functions that launch them on tensors; nothing here knows plans or programs."""
